"""Score a checkpoint.

    python eval.py zeroshot  --checkpoint out/best.pt --images DIR       a folder per class
    python eval.py retrieval --checkpoint out/best.pt --data SHARDS      R@1, R@5, R@10, both ways
    python eval.py probe     --checkpoint out/best.pt --train DIR --test DIR

A checkpoint carries its configuration and its vocabulary, so it is all that these commands need to
know of a model. Every score is printed with its chance level, the number of images or captions that
it is a mean of, and a 95 % interval; --json FILE keeps all of that. train.py validates with the
same functions, in float32 as they are here, so that a checkpoint has one score.

The file reads from top to bottom: a file becomes a model, which needs many checks, so you may begin
after them. Images and texts become features, and features become scores. Then come the head's words
and where they are seen, the words that a model does not know, what the log of a run tells, and the
commands.

Axes: B images of a batch, N images, M captions, Q questions, A answers, C classes, D width, E
embedding, F features of a probe, P patches, W windows, K words.
"""

import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

import data
from cli import (
    InputError,
    add_options,
    check,
    is_out_of_memory,
    make_parser,
    number,
    optional,
    output_file,
    pick_device,
    printable,
    run_command,
    write_file,
    write_json,
)
from superclip import SuperCLIP, SuperCLIPConfig, contrastive_loss

# A few of the prompts that CLIP's authors use. A class is the mean of its prompts' features.
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a photo of the {}.", "a {}.")


# -----------------------------------------------------------------------------
# Checkpoints

# weights_only, because any other pickle can run code as it is loaded, and weights come from
# strangers.
read_pickle = partial(torch.load, map_location="cpu", weights_only=True)


def read_file(path, read=read_pickle):
    """Returns what a file of weights holds. Raises InputError."""
    check(Path(path).is_file(), f"there is no file {path}")
    try:
        return read(path)
    except Exception as error:  # torch and safetensors raise a dozen kinds
        if is_out_of_memory(error):
            raise
        reason = "is damaged, or refused because it holds code: save its state_dict"
        raise InputError(f"{path} {reason}") from None


def check_weights(path, weights, config, vocab):
    """Check what a file holds before a model is made of it: that all tensors of such a model are
    there, and no others, with the right shapes and finite values, and that the vocabulary has as
    many tokens.

    weights: dict of name -> tensor; config: dict of SuperCLIPConfig's fields; vocab: text of the
    vocabulary. Returns a SuperCLIPConfig. Raises InputError.
    """
    try:
        config = SuperCLIPConfig(**config)
        check_cost(weights, config)
        with torch.device("meta"):  # names, shapes and dtypes, but no numbers
            expected = SuperCLIP(config).state_dict()
        unlike = weights.keys() ^ expected.keys()
        if unlike:
            raise InputError(f"{min(unlike)} is missing, or unknown")
        for name, tensor in expected.items():
            wanted = f"finite {tensor.dtype} of shape {[*tensor.shape]}"
            check(fits(weights[name], tensor), f"{name} is not {wanted}")
        if config.cls_weight:
            counts = weights["token_counts"]
            in_range = (counts >= 0) & (counts <= weights["num_captions"])
            check(in_range.all(), "token_counts are not between 0 and num_captions")
        n = data.Tokenizer(vocab).vocab_size
        reason = f"it is for {config.vocab_size:,} tokens, and the vocabulary has {n:,}"
        check(n == config.vocab_size, f"{reason} (see --vocab of scripts.convert)")
    except Exception as error:  # an unknown field, a size of 0, a text in place of a number ...
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} holds no model of this version: {reason}") from None
    return config


def check_cost(weights, config):
    """Check that a model costs about as much time and memory as its file is large, before it is
    built: a few bytes can ask for any number of layers, and a tensor can be one number that is
    repeated a billion times, or share its memory with a thousand others."""
    layers = max(config.vision_layers, config.text_layers)
    check(layers <= len(weights), f"its tensors are too few for {layers:,} layers")
    needed = 0  # bytes
    held = {}  # address of a piece of memory -> its bytes
    for tensor in weights.values():
        needed += tensor.nbytes
        storage = tensor.untyped_storage()  # a sparse tensor has none, which is an error
        held[storage.data_ptr()] = storage.nbytes()
    check(needed <= sum(held.values()), "its tensors do not own their memory")


def fits(tensor, expected):
    """Can this tensor of a file become the expected one of the model? load_state_dict would turn
    whole or complex numbers into float32 without a word."""
    if tensor.shape != expected.shape or tensor.is_complex():
        return False
    if tensor.is_floating_point() != expected.is_floating_point():
        return False
    return bool(tensor.isfinite().all())


def check_moments(path, moments, optimizer):
    """What becomes the state of AdamW passes through here: dict of number of a parameter -> dict of
    its moments. A parameter that had no gradient yet has none. Raises InputError.

    AdamW's fused kernel reads and writes as many numbers as the parameter has, so moments of
    another shape would damage memory.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    shape_of = {i: p.shape for i, p in enumerate(params)}
    try:
        for i, state in moments.items():
            shapes = {"step": (), "exp_avg": shape_of[i], "exp_avg_sq": shape_of[i]}
            check({name: x.shape for name, x in state.items()} == shapes, "shapes")
            for x in state.values():
                check(x.dtype == torch.float32 and x.is_contiguous(), "layout")
                check(x.isfinite().all(), "values")
    except Exception:  # a number in place of a tensor, an unknown parameter ...
        raise InputError(f"{path} cannot be resumed: its optimizer does not fit") from None


def read_checkpoint(path):
    """Returns what a file of train.py or scripts/convert.py holds: a dict with model (tensors by
    name), config (a dict), vocab (a text) and whatever else train.py keeps there. Raises InputError
    unless the three fit each other."""
    content = read_file(path)
    is_ours = isinstance(content, dict) and {"model", "config", "vocab"} <= content.keys()
    check(is_ours, f"{path} is not a checkpoint of this project: see scripts.convert")
    check_weights(path, content["model"], content["config"], content["vocab"])
    return content


DIVERGED = "resume with a lower --learning_rate, more --warmup_steps or another --dtype"


def write_checkpoint(path, model, vocab, **more):
    """Write what read_checkpoint reads. Returns whether that worked. If not, as on a full disk, the
    file that was there before is still there. Raises InputError if weights are not finite, which
    are never written."""
    try:
        state = {name: value.cpu() for name, value in model.state_dict().items()}  # loads anywhere
        finite = all(value.isfinite().all() for value in state.values())
        check(finite, f"weights are NaN or infinite, so {path} is not written: {DIVERGED}")
        content = {"model": state, "config": vars(model.config), "vocab": vocab, **more}
        write_file(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:  # torch wraps some of the disk's errors
        tqdm.write(printable(f"warning: cannot write {path}: {error}"))
        return False
    return True


def load(checkpoint, device="cpu"):
    """Read a checkpoint for inference. Returns model, tokenizer and preprocess. Raises InputError.

    The model is in eval mode and its parameters need no gradient, so a loop over photographs keeps
    no graph: model.encode_image(preprocess(pil_image)[None]), model.encode_text(tokenizer(["a
    dog"])).
    """
    content = read_checkpoint(checkpoint)
    model = SuperCLIP(SuperCLIPConfig(**content["config"]))
    model.load_state_dict(content["model"])
    tokenizer = data.Tokenizer(content["vocab"], model.config.context_length)
    preprocess = partial(data.load_image, size=model.config.image_size)
    model.requires_grad_(False).to(device).eval()
    return model, tokenizer, preprocess


def device_of(model):
    return model.logit_scale.device


# -----------------------------------------------------------------------------
# Images and texts -> features


# The datasets below yield (image, label), or (reason: str, label) if the image cannot be read, so
# that one broken file does not end the evaluation of thousands.


def images_in(folder):
    """Returns the image files below a folder, by name, each real file once. Links to folders are
    not followed, because they may run in circles, and pipes and the like are not opened."""
    files = {}
    for path in sorted(Path(folder).rglob("*.*")):
        if path.suffix.lower() in data.SUFFIXES and path.is_file():
            files.setdefault(path.resolve(), path)
    return list(files.values())


def read_image(path, size):
    """Returns an image file as a uint8 tensor (3, size, size), or the reason why not, a string."""
    try:
        return data.load_image(Path(path).read_bytes(), size)
    except (data.BadSample, OSError) as error:
        return f"{path}: {error}"


class ClassFolders(Dataset):
    """A folder with a folder of images per class. Labels are the numbers of the sorted names, and a
    folder without images still is a class that others can be mistaken for."""

    # Not torchvision's ImageFolder, which follows links to folders, even in circles, and takes
    # hidden folders, such as .ipynb_checkpoints, for classes.

    def __init__(self, folder, image_size):
        folders = sorted(p for p in Path(folder).iterdir() if p.is_dir() and p.name[0] != ".")
        self.image_size = image_size
        self.classes = [path.name for path in folders]
        self.samples = []  # (path, number of its class)
        for label, path in enumerate(folders):
            self.samples += [(file, label) for file in images_in(path)]
        check(self.samples, f"{folder} has no folders with images in it, one for each class")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, label = self.samples[i]
        return read_image(path, self.image_size), label


class ShardImages(Dataset):
    """The pairs of shards in order. The label of an image is the list of all its captions."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        pairs = self.pairs
        row = pairs.index[i].tolist()
        try:
            texts = pairs.all_texts(row, pairs.captions)
            return data.load_image(pairs.read(row, data.IMAGE), pairs.image_size), texts
        except (data.BadSample, OSError) as error:
            return f"{pairs.shards[row[0]]}: {pairs.key(row)}: {error}", None


def collate(samples):
    """list of samples -> images stacked (B, 3, S, S), or None if none can be read; the list of
    their B labels; the list of reasons why others cannot be read."""
    images, labels, reasons = [], [], []
    for image, label in samples:
        if isinstance(image, str):
            reasons.append(image)
        else:
            images.append(image)
            labels.append(label)
    # One tensor for all: each tensor on its way out of a worker holds a file open.
    images = torch.stack(images) if images else None
    return images, labels, reasons


def batches(dataset, batch_size, workers, description, any_good=False):
    """Yield (images (B, 3, S, S) uint8, list of B labels), and name the images that cannot be read.
    Raises InputError if none can, unless any_good says that there are others."""
    loader = data.make_loader(dataset, workers, batch_size=batch_size, collate_fn=collate)
    total = math.ceil(len(dataset) / batch_size)
    n_good = 0
    last_reason = ""
    for images, labels, reasons in data.progress(loader, description, total, unit="batch"):
        for reason in reasons:
            tqdm.write(printable(f"skipped {reason}"))
            last_reason = reason
        if labels:
            n_good += len(labels)
            yield images, labels
    check(n_good > 0 or any_good, f"none of the images can be used: {last_reason}")


@torch.no_grad()
def encode_texts(model, tokenizer, texts, batch_size=256):
    """list of M strings -> features (M, E)."""
    features = []
    for i in data.progress(range(0, len(texts), batch_size), "encoding texts"):
        tokens = data.trim(tokenizer(texts[i : i + batch_size]))  # (B, T)
        features.append(model.encode_text(tokens.to(device_of(model))))
    return torch.cat(features)


@torch.no_grad()
def encode_images(model, encode, dataset, batch_size, workers):
    """Returns features of all images of the dataset (N, ...), and the list of their N labels.
    encode: what makes features of images (B, 3, S, S), such as model.encode_image."""
    features = []
    labels = []
    for images, labels_of_batch in batches(dataset, batch_size, workers, "encoding"):
        features.append(encode(images.to(device_of(model))))
        labels += labels_of_batch
    return torch.cat(features), labels


def encode_shards(model, pairs, batch_size=128, workers=0):
    """Returns image features (N, E) of pairs, text features (M, E) of all their captions, and owner
    (M,), the number of each caption's image. Says how many captions are not unique."""
    dataset = ShardImages(pairs)
    images, captions = encode_images(model, model.encode_image, dataset, batch_size, workers)
    texts = []
    owner = []
    for i, texts_of_image in enumerate(captions):
        texts += texts_of_image
        owner += [i] * len(texts_of_image)
    # Each text is encoded once, so that equal captions get equal features and tie.
    number_of = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    repeated = len(texts) - len(number_of)
    if repeated > 0:
        tqdm.write(f"{repeated:,} of {len(texts):,} captions repeat another one: they tie with it")
    features = encode_texts(model, pairs.tokenizer, list(number_of))
    numbers = [number_of[text] for text in texts]
    return images, features[numbers], torch.tensor(owner, device=features.device)


# -----------------------------------------------------------------------------
# Scores


def score(hits, chance):
    """hits: n numbers in 0..1. Returns a dict of value, chance, n and the 95 % interval. That is
    Wilson's, which stays inside 0..1 and is right near its ends, too."""
    n = len(hits)
    p = float(hits.double().mean())
    z = 1.96  # standard deviations to each side that 95 % of a normal distribution lie within
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = [max(0.0, centre - half), min(1.0, centre + half)]
    return {"value": p, "chance": float(chance), "n": n, "interval": interval}


def format_score(name, s, more=""):
    """Returns a score as a line of text, with `more` at its end."""
    low, high = s["interval"]
    text = f"{name:24s}{100 * s['value']:7.2f} %   chance {100 * s['chance']:6.2f} %"
    text += f"   95 % interval {100 * low:.1f}-{100 * high:.1f}   n {s['n']:,}{more}"
    return printable(text)


# Ties need care. A model that has collapsed gives every answer the same score. If ties counted as
# hits it would score 100 %, and if they counted as misses, 0 %. Here it scores what chance would.


def rank_counts(similarity, right):
    """similarity (Q, A) of A answers to Q questions, right (Q, A): which answers are right.
    Returns counts (3, Q), which decide whether a right answer is found: wrong answers above the
    best right one, and wrong and right answers that tie with it."""
    best = similarity.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
    # Equal features may differ in the last bit. NaN, from a model that has diverged, counts as
    # above, so that it is never right.
    above = ~(similarity <= best + 1e-6) & ~right
    tied = (similarity - best).abs() <= 1e-6
    return torch.stack([above.sum(dim=1), (tied & ~right).sum(dim=1), (tied & right).sum(dim=1)])


def recall(counts, k):
    """counts (3, Q) -> R@k of each question (Q,): the probability that a right answer is among the
    first k if tied ones come in random order.

    The tied ones share the k - above places that are left. A wrong one takes the first of them with
    probability wrong / (wrong + right), the second with (wrong - 1) / (wrong - 1 + right) ... The
    product is the probability that no right answer is found. It is 0 if there are fewer wrong ones.
    """
    above, wrong, right = counts.double()
    before = torch.arange(k, device=counts.device)[:, None]  # wrong ones that came so far
    missed = (wrong - before) / (wrong - before + right).clamp(min=1)  # (k, Q)
    return 1 - missed.where(before < k - above, 1.0).prod(dim=0)


def search(questions, question_label, answers, answer_label):
    """features (Q, E) and (A, E), labels (Q,) and (A,), where equal labels are right answers -> the
    counts (3, Q) of rank_counts, and the number of each question's best answer (Q,). Works in
    chunks, so that the matrix (Q, A) never exists."""
    counts = []
    best = []
    chunk = max(1, 2**24 // len(answers))  # 64 MB of similarities
    for i in data.progress(range(0, len(questions), chunk), "searching"):
        right = question_label[i : i + chunk, None] == answer_label
        similarity = questions[i : i + chunk] @ answers.T
        counts.append(rank_counts(similarity, right).cpu())
        best.append(similarity.argmax(dim=1).cpu())
    return torch.cat(counts, dim=1), torch.cat(best)


def mean_by_image(hits, image):
    """hits (Q,) of questions, image (Q,): their images -> the mean of each image (N,). The captions
    of one image are not independent, so an interval must not count each of them."""
    total = torch.bincount(image, weights=hits)
    n = torch.bincount(image)
    return (total / n)[n > 0]


def recall_scores(questions, question_image, answers, answer_image, n_images, ks):
    """R@k of a search for answers of the question's image, as a dict of scores. Arguments as in
    `search`. Each image counts once, with the mean of its questions."""
    counts, _ = search(questions, question_image, answers, answer_image)
    # Chance is the score of a model for which all answers look the same: all of them tie.
    right = torch.bincount(answer_image, minlength=n_images)[question_image].cpu()  # (Q,)
    wrong = len(answers) - right
    all_tie = torch.stack([torch.zeros_like(right), wrong, right])
    question_image = question_image.cpu()
    scores = {}
    for k in ks:
        hits = mean_by_image(recall(counts, k), question_image)
        luck = mean_by_image(recall(all_tie, k), question_image)
        scores[f"R@{k}"] = score(hits, luck.mean())
    return scores


def retrieval(image_features, text_features, owner, ks=(1, 5, 10)):
    """R@k from image to text and from text to image, as a dict of dicts of scores.
    image_features (N, E), text_features (M, E), owner (M,): the number of each text's image."""
    N = len(image_features)
    numbers = torch.arange(N, device=owner.device)
    return {
        "image_to_text": recall_scores(image_features, numbers, text_features, owner, N, ks),
        "text_to_image": recall_scores(text_features, owner, image_features, numbers, N, ks),
    }


@torch.no_grad()
def loss_in_groups(model, image_features, text_features, owner, group):
    """CLIP's contrastive loss in random groups of so many pairs, as a mean over the groups. With
    groups as large as the batches of a training, it compares with the loss of that training.
    Features and owner as in `retrieval`; an image is paired with its first caption."""
    N = len(image_features)
    first_caption = torch.searchsorted(owner, torch.arange(N, device=owner.device))  # (N,)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    scale = model.logit_scale.exp()
    losses = []
    for numbers in order[: N // group * group].view(-1, group):
        texts = text_features[first_caption[numbers]]
        losses.append(contrastive_loss(image_features[numbers], texts, scale))
    return torch.stack(losses).mean().item()


def mean_r1(result):
    """What the best model is chosen by: R@1 of retrieval(), as the mean of both ways."""
    a = result["image_to_text"]["R@1"]["value"]
    b = result["text_to_image"]["R@1"]["value"]
    return (a + b) / 2


def print_retrieval(result):
    """Print a line for each score of retrieval()."""
    for way, scores in result.items():
        for name, value in scores.items():
            # tqdm's, because a plain print would be glued to the bar of a training
            tqdm.write(format_score(f"{way} {name}".replace("_", " "), value))


def zeroshot_classifier(model, tokenizer, classes, templates):
    """One feature per class, (C, E): the normalised mean of its prompts' features."""
    prompts = []
    for name in classes:
        prompts += [template.replace("{}", name) for template in templates]
    features = encode_texts(model, tokenizer, prompts).view(len(classes), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=1)


def zeroshot(model, tokenizer, dataset, classes, templates=None, batch_size=128, workers=0):
    """Top-1 and top-5 accuracy, and top-1 of each class with the one that it is mistaken for most,
    for a dataset of (image, class number). It is a search for the class among all C classes, so its
    top-k is R@k. templates: prompts, by default those of TEMPLATES that the vocabulary has the
    words for."""
    if templates is None:
        templates = usable_templates(tokenizer)
    C = len(classes)
    classifier = zeroshot_classifier(model, tokenizer, classes, templates)  # (C, E)
    features, labels = encode_images(model, model.encode_image, dataset, batch_size, workers)
    labels = torch.tensor(labels)
    numbers = torch.arange(C, device=classifier.device)
    counts, guesses = search(features, labels.to(classifier.device), classifier, numbers)
    result = {"top1": score(recall(counts, 1), 1 / C)}
    if C > 5:
        result["top5"] = score(recall(counts, 5), 5 / C)
    # A list, not a dict, because two of ImageNet's classes have the same name.
    result["per_class"] = []
    for c in labels.unique().tolist():
        is_of_class = labels == c
        wrong = guesses[is_of_class & (guesses != c)]
        mistaken_for = classes[wrong.mode().values] if len(wrong) > 0 else None
        part = score(recall(counts[:, is_of_class], 1), 1 / C)
        result["per_class"].append({"name": classes[c], "mistaken_for": mistaken_for, **part})
    return result


def frozen_features(model, dataset, batch_size=128, workers=0):
    """What a linear probe learns from: class token and mean of the patch tokens, side by side (N,
    2D), and the labels (N,)."""

    def encode(images):
        tokens = model.visual(images)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).float().cpu()

    features, labels = encode_images(model, encode, dataset, batch_size, workers)
    return features, torch.tensor(labels)


def fit_linear(x, y, classes, penalty):
    """Multinomial logistic regression by L-BFGS: features x (N, F), labels y (N,) -> nn.Linear. The
    problem is convex, so it has one solution and needs no learning rate."""
    layer = torch.nn.Linear(x.shape[1], classes)
    for p in layer.parameters():
        torch.nn.init.zeros_(p)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(layer(x), y) + penalty * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return layer


def probe_hits(x, y, x_test, y_test, classes, penalty):
    """Fit a probe to x (N, F), y (N,). Returns 1 for each test image that it puts into the right
    class, and 0 for each other."""
    guesses = fit_linear(x, y, classes, penalty)(x_test).argmax(dim=1)
    return (guesses == y_test).double()


def probe(train, test, classes):
    """Linear probe; train, test: (features (N, F), labels (N,)). A fifth of the training images
    chooses the penalty, and then all of them are fitted. Returns the score on test, and the
    penalty."""
    x, y = train
    x_test, y_test = test
    check(len(x) > 1, "a probe needs at least two training images")
    # Standardised, so that one penalty means the same for all features.
    mean = x.mean(dim=0)
    std = x.std(dim=0).clamp_min(1e-6)
    x = (x - mean) / std
    x_test = (x_test - mean) / std

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    n_val = max(1, len(x) // 5)
    val = order[:n_val]
    rest = order[n_val:]

    def accuracy(penalty):
        return probe_hits(x[rest], y[rest], x[val], y[val], classes, penalty).mean()

    penalties = [10.0**exponent for exponent in range(-6, 1)]
    penalty = max(data.progress(penalties, "choosing the penalty"), key=accuracy)
    return score(probe_hits(x, y, x_test, y_test, classes, penalty), 1 / classes), penalty


# -----------------------------------------------------------------------------
# Words, and where they are seen


def token_text(tokenizer, i):
    """Returns a token as a word. One that is only the beginning of a word is written "skate-"."""
    text = tokenizer.decode([i])
    ends_a_word = tokenizer.encoding.decode_single_token_bytes(i).endswith(b" ")
    return text if ends_a_word else text + "-"


@torch.no_grad()
def top_words(model, tokenizer, images, k=8):
    """images (B, 3, S, S) -> for each image the k tokens that the head finds most probable, as a
    list of (word, probability, id). Probabilities are a softmax over all tokens."""
    probabilities = model.class_logits(images.to(device_of(model))).softmax(dim=-1)
    values, ids = probabilities.topk(min(8 * k, tokenizer.vocab_size))
    result = []
    for values_of_image, ids_of_image in zip(values.tolist(), ids.tolist()):
        words = [(token_text(tokenizer, i), p, i) for p, i in zip(values_of_image, ids_of_image)]
        # Punctuation, padding, start and end are no words.
        words = [word for word in words if has_letters(word[0])]
        result.append(words[:k])
    return result


def has_letters(word):
    """Does it have a letter or a digit?"""
    return any(character.isalnum() for character in word)


def default_window(model):
    """Patches a side that word_maps leaves out: a quarter of the image, about as much as an object
    takes."""
    return max(1, round(model.visual.grid / 4))


@torch.no_grad()
def word_maps(model, image, ids, window, batch_size=64):
    """Where an image (3, S, S) shows each of K tokens (a list of ids).

    Returns falls (K, W): by how much the word's log-probability falls, in nats, when one of the W
    windows of window x window patches is left out; and maps (K, grid, grid): for each patch the
    mean over its windows.

    Why by leaving out? The head is linear on the mean of the patch tokens, so its logit also splits
    exactly into one part per token. But attention has mixed the patches by then, and those parts
    light up the background as much as the object. A window that is left out is simply missing.
    """
    grid = model.visual.grid
    # Row i of a band matrix: the patches of the i-th window along one side. A square is the product
    # of two sides, and kron multiplies every row with every row.
    side = torch.ones(grid - window + 1, grid).triu().tril(window - 1)
    inside = torch.kron(side, side)  # (W, P): 1 for the patches of a window
    outside = [(row == 0).nonzero().flatten() for row in inside]
    keep = torch.stack(outside).to(device_of(model))

    image = image[None].to(device_of(model))

    def log_probability(keep, n):
        logits = model.class_logits(image.expand(n, -1, -1, -1), keep)
        return logits.log_softmax(dim=-1)[:, ids]

    without = torch.cat([log_probability(k, len(k)) for k in keep.split(batch_size)])  # (W, K)
    falls = (log_probability(None, 1) - without).T.cpu()  # (K, W)
    return falls, (falls @ inside / inside.sum(dim=0)).unflatten(1, (grid, grid))


# -----------------------------------------------------------------------------
# Words that a model does not know

# A word that was in at most so many captions in training is hardly known: so large a share of
# them, or so few, whatever the share is.
RARE_SHARE = 2e-4
RARE = 100


def words_in(tokenizer, texts):
    """Returns the words of some texts, as the tokenizer splits them, without punctuation."""
    words = tokenizer.pattern.findall(data.clean("\n".join(texts)))
    return [word for word in words if has_letters(word)]


def unknown_words(tokenizer, texts, model=None):
    """Which words of some texts are not in the vocabulary or, given a model with a word head, were
    hardly ever in the captions of its training? Returns a dict of word -> what is to be said of it.
    CLIP's vocabulary has parts for any word, so that it cannot tell, and the dict is empty."""
    if tokenizer.pattern is not data.WORD:
        return {}
    n = 0  # captions in training; plain CLIP counts none
    if model is not None and model.head is not None:
        n = int(model.num_captions)
    unknown = {}
    for word in words_in(tokenizer, texts):
        ids = tokenizer.encode(word)
        if len(ids) > 1:  # its bytes
            unknown[word] = "is not in the vocabulary"
        elif n > 0 and model.token_counts[ids[0]] <= max(RARE, RARE_SHARE * n):
            unknown[word] = f"was in {model.token_counts[ids[0]]:,} of {n:,} captions in training"
    return unknown


def share_of_known_words(tokenizer, texts):
    """How many of the words in some texts are in the vocabulary, in 0..1. Each counts as often as
    it occurs."""
    words = words_in(tokenizer, texts)
    unknown = unknown_words(tokenizer, texts)
    return sum(word not in unknown for word in words) / max(1, len(words))


def print_unknown_words(tokenizer, texts, model):
    """Name the words of some texts that the model hardly knows, if there are any."""
    for word, reason in unknown_words(tokenizer, texts, model).items():
        tqdm.write(printable(f"{word!r} {reason}: the model hardly knows it"))


def usable_templates(tokenizer, templates=TEMPLATES):
    """Returns the list of templates whose words are all in the vocabulary, because one that is
    spelt in bytes would be most of what the text tower sees of a prompt. (A word of the vocabulary
    is one token, whether training has shown it or not.) If none is left, "{}" is the only one: the
    name alone."""
    usable = [template for template in templates if not unknown_words(tokenizer, [template])]
    return usable or ["{}"]


# -----------------------------------------------------------------------------
# The log of a run


def finite(text):
    """A number of JSON -> float. Raises ValueError for NaN, Infinity and 1e999, which Python reads
    and writes, but no browser does."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def parse_line(line):
    """A line of a log -> dict, which is empty if this is no row. A run that was killed may have
    left half a line, and what a full disk leaves may be anything."""
    try:
        row = json.loads(line, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError):
        return {}
    if isinstance(row, dict) and isinstance(row.get("step"), int):
        return row
    return {}


def read_log(path):
    """A log.jsonl -> the last header in it, and the list of rows that count, each with `samples`,
    the number of pairs that training had seen.

    A run that is resumed adds a header, with the step from which it goes on. What the attempt
    before it has logged beyond that is no part of the run. The batch size may be another, so that
    samples decide and not steps. Raises InputError if the first line is not a header.
    """
    lines = Path(path).read_text("utf-8", "replace").splitlines()
    parsed = [parse_line(line) for line in lines]
    is_ours = bool(parsed) and "header" in parsed[0]
    check(is_ours, f"{path} is not a log of train.py: its first line is no header")
    rows = []
    try:
        for row in parsed:
            if "header" in row:
                header = row["header"]
                batch_size = header["arguments"]["batch_size"]
                start = row["step"] * batch_size
                rows = [earlier for earlier in rows if earlier["samples"] <= start]
            elif row:
                rows.append({**row, "samples": row["step"] * batch_size})
    except (LookupError, TypeError):
        raise InputError(f"{path} is not a log of this version of train.py") from None
    return header, rows


def rows_in(folder):
    """The rows that read_log finds in a folder's log.jsonl, or none if there is no such log."""
    try:
        _, rows = read_log(Path(folder, "log.jsonl"))
    except (OSError, InputError):
        return []
    return rows


def overfitting(rows):
    """Rows of a log, as read_log returns them -> a sentence if the model learns its training pairs
    by heart, else None: if it beats a guess in training, but not among validation pairs, or if the
    loss fell in training, but rose in the last two validations."""
    training = []  # the contrastive loss at each validation
    validation = []
    loss = math.inf
    guess = math.inf
    for row in rows:
        loss = row.get("contrastive_loss", loss)
        if "val_contrastive_loss" in row:
            training.append(loss)
            validation.append(row["val_contrastive_loss"])
            guess = math.log(row["val_group"])
    reason = None
    if validation and training[-1] < guess < validation[-1]:
        reason = "the loss of validation pairs is above a guess's: too sure where it is wrong"
    elif len(validation) > 2:
        before, middle, last = validation[-3:]
        if before < middle < last and training[-1] < training[-3]:
            reason = "the contrastive loss falls in training, and rises among validation pairs"
    if reason is None:
        return None
    return (
        f"Overfitting: {reason}. More pairs help, fewer --epochs, --patch_dropout, --init_from. "
        "To search few pictures, published weights may be better without any training."
    )


def print_overfitting(folder):
    """Say so if the run in a folder overfits."""
    sentence = overfitting(rows_in(folder))
    if sentence is not None:
        print(sentence)


# -----------------------------------------------------------------------------
# Commands


def read_list(path):
    """Returns the lines of a file. Two names stand for lists of open_clip instead: imagenet for
    the names of ImageNet's classes, and openai for CLIP's templates."""
    if path == "imagenet":
        return list(optional("open_clip", "open_clip_torch").IMAGENET_CLASSNAMES)
    if path == "openai":
        published = optional("open_clip", "open_clip_torch").OPENAI_IMAGENET_TEMPLATES
        return [template("{}") for template in published]
    lines = Path(path).read_text("utf-8", "replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def class_names(dataset, path=None):
    """Returns a name for each class: the lines of --classes, or else the names of the folders."""
    if path is None:
        return [name.replace("_", " ") for name in dataset.classes]
    names = read_list(path)
    check(len(names) == len(dataset.classes), f"{path} does not have a line for each folder")
    return names


# Each command prints its scores and returns them for --json.


def command_zeroshot(model, tokenizer, args):
    dataset = ClassFolders(args.images, model.config.image_size)
    classes = class_names(dataset, args.classes)
    templates = TEMPLATES
    if args.templates is not None:
        templates = read_list(args.templates)
        check(all("{}" in t for t in templates), f"{args.templates}: no {{}} in a line")
    usable = usable_templates(tokenizer, templates)
    print_unknown_words(tokenizer, classes, model)
    text = f"{len(classes)} classes, {len(usable)} prompts whose words are in the vocabulary:"
    print(text, *map(printable, usable), sep="\n  ")
    result = zeroshot(model, tokenizer, dataset, classes, usable, args.batch_size, args.workers)
    for name in sorted(result.keys() - {"per_class"}):
        print(format_score(name, result[name]))
    if len(classes) <= 30:
        for c in result["per_class"]:
            more = f"   mistaken for {c['mistaken_for'] or 'none'}"
            print(format_score(f"  {c['name']}", c, more))
    return {"templates": usable, **result}


def command_retrieval(model, tokenizer, args):
    shards = data.expand(args.data)
    sides = {data.side(shard) for shard in shards}
    if {"train", "validation"} <= sides:
        raise InputError("these shards are of training and of validation: name one of the two")
    pairs = data.Pairs(shards, tokenizer, model.config.image_size, args.captions)
    images, texts, owner = encode_shards(model, pairs, args.batch_size, args.workers)
    print(f"{len(images):,} images, {len(texts):,} captions")
    result = retrieval(images, texts, owner)
    print_retrieval(result)
    return {"images": len(images), "captions": len(texts), **result}


def command_probe(model, _, args):
    train = ClassFolders(args.train, model.config.image_size)
    test = ClassFolders(args.test, model.config.image_size)
    check(train.classes == test.classes, f"{args.train} and {args.test} have different classes")
    torch.manual_seed(0)
    untrained = SuperCLIP(model.config).to(device_of(model)).eval()  # random weights
    result = {}
    for kind, tower in (("", model), ("untrained ", untrained)):
        x, y = frozen_features(tower, train, args.batch_size, args.workers)
        x_test, y_test = frozen_features(tower, test, args.batch_size, args.workers)
        halves = zip(("class token", "patch mean"), x.chunk(2, dim=1), x_test.chunk(2, dim=1))
        for name, half, half_test in halves:
            part, _ = probe((half, y), (half_test, y_test), len(train.classes))
            print(format_score(kind + name, part))
            result[kind + name] = part
    return result


def main(argv):
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, function, text, *shared):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(function=function)
        add_options(sub, "checkpoint", *shared, "device")
        add = sub.add_argument
        add("--batch_size", type=number(int, 1), default=128, help="images a batch (default 128)")
        add("--workers", type=number(int, 0), default=2, help="loading processes (default 2)")
        add("--json", type=output_file(".json"), metavar="FILE", help="write the numbers to FILE")
        return add

    add = command("zeroshot", command_zeroshot, "classify images by the names of their classes")
    add("--images", required=True, metavar="DIR", help="a folder with a folder of images per class")
    add("--classes", help="file of names, a line for each folder in sorted order; or imagenet")
    add("--templates", help="file of prompts, one a line, {} for the name; or openai: CLIP's 80")
    text = "find captions by image and images by caption"
    add = command("retrieval", command_retrieval, text, "captions")
    add("--data", nargs="+", required=True, help="tar shards: paths, folders, globs or braces")
    add = command("probe", command_probe, "fit a linear classifier on the frozen image tower")
    add("--train", required=True, metavar="DIR", help="a folder with a folder of images per class")
    add("--test", required=True, metavar="DIR", help="the same classes, other images")
    args = parser.parse_args(argv)
    model, tokenizer, _ = load(args.checkpoint, pick_device(args.device))
    write_json(args.json, args.function(model, tokenizer, args))


if __name__ == "__main__":
    run_command(main)
