"""Score a checkpoint.

    python eval.py zeroshot  --checkpoint out/best.pt --images DIR       a folder per class
    python eval.py retrieval --checkpoint out/best.pt --data SHARDS      R@1, R@5, R@10, both ways
    python eval.py probe     --checkpoint out/best.pt --train DIR --test DIR

A checkpoint carries its configuration and its vocabulary, so it is all that these commands need to
know of a model. Every score is printed with its chance level, the number of images or captions that
it is a mean of, and a 95 % interval; --json FILE keeps all of that. train.py validates with the
same functions, in float32 as they are here, so that a checkpoint has one score.

The file reads from top to bottom: a file becomes a model, images and texts become features, and
features become scores. Then come the head's words and where they are seen, and the commands.

Axes: B images of a batch, N images, M captions, Q questions, A answers, C classes, D width, E
embedding, F features of a probe, P patches, W windows, K words.
"""

import argparse
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
    check,
    number,
    optional,
    output_file,
    pick_device,
    printable,
    run_command,
    write_file,
    write_json,
)
from superclip import SuperCLIP, SuperCLIPConfig

# A few of the prompts that CLIP's authors use. A class is the mean of its prompts' features.
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a photo of the {}.", "a {}.")


# -----------------------------------------------------------------------------
# Checkpoints

# weights_only, because any other pickle can run code as it is loaded, and weights come from
# strangers.
read_pickle = partial(torch.load, map_location="cpu", weights_only=True)


def read_file(path, read=read_pickle):
    """A file of weights -> what it holds. Raises InputError."""
    check(Path(path).is_file(), f"there is no file {path}")
    try:
        return read(path)
    except Exception:  # torch and safetensors raise a dozen kinds
        raise InputError(f"{path} is damaged, or refused (code?): save a state_dict") from None


def check_weights(path, weights, config, vocab=None):
    """Whatever becomes a model passes through here. weights: dict of name -> tensor; config: dict
    of SuperCLIPConfig's fields; vocab: text of the vocabulary, or None. Returns a SuperCLIPConfig.

    Raises InputError unless all tensors of such a model are there, and no others, with the right
    shapes, dtypes (floating point; counts int64) and finite values, and the vocabulary has as many
    tokens. load_state_dict alone would turn int8, bool or complex weights into float32.
    """
    try:
        config = SuperCLIPConfig(**config)
        with torch.device("meta"):  # names, shapes and dtypes, but no numbers
            expected = SuperCLIP(config).state_dict()
        names = [*weights.keys(), *expected]
        n = data.Tokenizer(vocab).vocab_size if vocab is not None else config.vocab_size
    except Exception as error:  # an unknown field, a size of 0, a text in place of a number ...
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} holds no model of this version: {reason}") from None
    reason = f"{path} has {config.vocab_size:,} tokens, but its vocabulary has {n:,}"
    check(n == config.vocab_size, f"{reason}: see --vocab of scripts.convert")
    for name in names:
        tensor, wanted = weights.get(name), expected.get(name)
        fits = torch.is_tensor(tensor) and torch.is_tensor(wanted) and tensor.shape == wanted.shape
        floats = fits and tensor.is_floating_point() and wanted.is_floating_point()
        fits = (floats or fits and tensor.dtype == wanted.dtype) and tensor.float().isfinite().all()
        wanted = f"finite {wanted.dtype} {[*wanted.shape]}" if wanted is not None else "unknown"
        check(fits, f"{path} does not fit its configuration: {name} ({wanted})")
    return config


def read_checkpoint(path):
    """A file of train.py or scripts/convert.py -> dict with model (tensors by name), config (a
    dict), vocab (a text) and whatever else train.py keeps there. Raises InputError unless the three
    fit each other."""
    content = read_file(path)
    ours = isinstance(content, dict) and {"model", "config", "vocab"} <= content.keys()
    check(ours, f"{path} is not a checkpoint of this project: see scripts.convert")
    check_weights(path, content["model"], content["config"], content["vocab"])
    return content


DIVERGED = "resume with a lower --learning_rate, more --warmup_steps or another --dtype"


def write_checkpoint(path, model, vocab, **more):
    """Write what read_checkpoint reads, and return whether that worked. If not, as on a full disk,
    the file that was there before is still there. Weights that are not finite are never written."""
    try:
        state = {name: value.cpu() for name, value in model.state_dict().items()}  # loads anywhere
        finite = all(value.isfinite().all() for value in state.values())
        check(finite, f"weights are NaN or infinite, so {path} is not written: {DIVERGED}")
        content = {"model": state, "config": vars(model.config), "vocab": vocab, **more}
        write_file(path, lambda file: torch.save(content, file))
        return True
    except (OSError, RuntimeError) as error:  # torch wraps some of the disk's errors
        tqdm.write(f"warning: cannot write {path}: {error}")
        return False


def load(checkpoint, device="cpu"):
    """A checkpoint, ready for inference: (model, tokenizer, preprocess). Raises InputError.

    The model is in eval mode and its parameters need no gradient, so a loop over photographs keeps
    no graph: model.encode_image(preprocess(pil_image)[None]), model.encode_text(tokenizer(["a
    dog"])).
    """
    content = read_checkpoint(checkpoint)
    model = SuperCLIP(SuperCLIPConfig(**content["config"]))
    model.load_state_dict(content["model"])
    tokenizer = data.Tokenizer(content["vocab"], model.config.context_length)
    preprocess = partial(data.load_image, size=model.config.image_size)
    return model.requires_grad_(False).to(device).eval(), tokenizer, preprocess


def device_of(model):
    return model.logit_scale.device


# -----------------------------------------------------------------------------
# Images and texts -> features


# The datasets below give (image, label). In place of an image that cannot be read they give the
# reason, a string, so that one broken file does not end the evaluation of thousands.


def images_in(folder):
    """The image files below a folder, by name, each real file once. Links to folders are not
    followed, because they may run in circles, and pipes and the like are not opened."""
    found = sorted(p for p in Path(folder).rglob("*.*") if p.suffix.lower() in data.SUFFIXES)
    return sorted({p.resolve(): p for p in reversed(found) if p.is_file()}.values())


def read_image(path, size):
    """An image file -> uint8 tensor (3, size, size), or the reason why not, as a string."""
    try:
        return data.load_image(Path(path).read_bytes(), size)
    except (data.BadSample, OSError) as error:
        return f"{path}: {error}"


class ClassFolders(Dataset):
    """A folder with a folder of images per class. Labels are the numbers of the sorted names, and a
    folder without images still is a class that others can be mistaken for."""

    def __init__(self, folder, image_size):
        # Hidden folders, such as .ipynb_checkpoints, are no classes.
        folders = sorted(p for p in Path(folder).iterdir() if p.is_dir() and p.name[0] != ".")
        check(folders, f"{folder} has no folders in it: there must be one of images per class")
        self.classes, self.image_size = [p.name for p in folders], image_size
        self.samples = [(path, c) for c, p in enumerate(folders) for path in images_in(p)]
        check(self.samples, f"there are no images in the folders of {folder}")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return read_image(self.samples[i][0], self.image_size), self.samples[i][1]


class ShardImages(Dataset):
    """The pairs of shards in order. The label of an image is the list of all its captions."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        pairs, row = self.pairs, self.pairs.index[i].tolist()
        try:
            sources = dict.fromkeys(pairs.captions)
            texts = [text for source in sources for text in pairs.texts(row, source)]
            return data.load_image(pairs.read(row, data.IMAGE), pairs.image_size), texts
        except (data.BadSample, OSError) as error:
            return f"{pairs.shards[row[0]]}: {pairs.key(row)}: {error}", None


def collate(samples):
    """list of samples -> (images stacked (B, 3, S, S), or None; list of B labels; reasons)."""
    good = [(image, label) for image, label in samples if not isinstance(image, str)]
    # One tensor for all: each tensor on its way out of a worker holds a file open.
    images = torch.stack([image for image, _ in good]) if good else None
    return images, [label for _, label in good], [why for why, _ in samples if isinstance(why, str)]


def batches(dataset, batch_size, workers, description, any_good=False):
    """Yield (images (B, 3, S, S) uint8, list of B labels), and name the images that cannot be read.
    Raises InputError if none can, unless any_good says that there are others."""
    loader = data.make_loader(dataset, workers, batch_size=batch_size, collate_fn=collate)
    total, reasons = math.ceil(len(dataset) / batch_size), []
    for images, labels, reasons in data.progress(loader, description, total, unit="batch"):
        for reason in reasons:
            tqdm.write(printable(f"skipped {reason}"))
        if labels:
            any_good = True
            yield images, labels
    check(any_good, "none of the images can be used: " + "".join(reasons[-1:]))


@torch.no_grad()
def encode_texts(model, tokenizer, texts, batch_size=256):
    """list of M strings -> features (M, E)."""
    features = []
    for i in data.progress(range(0, len(texts), batch_size), "encoding texts"):
        tokens = tokenizer(texts[i : i + batch_size])  # (B, T)
        tokens = tokens[:, : tokens.argmax(dim=1).max() + 1]  # up to the last end token
        features.append(model.encode_text(tokens.to(device_of(model))))
    return torch.cat(features)


@torch.no_grad()
def encode_images(model, encode, dataset, batch_size, workers):
    """encode: what makes features of images (B, 3, S, S), such as model.encode_image -> features of
    all images of the dataset (N, ...), and the list of their N labels."""
    features, labels = [], []
    for images, labels_of_batch in batches(dataset, batch_size, workers, "encoding"):
        features.append(encode(images.to(device_of(model))))
        labels += labels_of_batch
    return torch.cat(features), labels


def encode_shards(model, pairs, batch_size=128, workers=0):
    """Pairs -> image features (N, E), text features (M, E) of all their captions, and owner (M,):
    the number of each caption's image. Says how many captions are not unique."""
    dataset = ShardImages(pairs)
    images, captions = encode_images(model, model.encode_image, dataset, batch_size, workers)
    texts = [text for texts_of_image in captions for text in texts_of_image]
    # Each text is encoded once, so that equal captions get equal features and tie.
    number_of = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    if repeated := len(texts) - len(number_of):
        tqdm.write(f"{repeated:,} of {len(texts):,} captions repeat another one: they tie with it")
    features = encode_texts(model, pairs.tokenizer, [*number_of])[[number_of[t] for t in texts]]
    owner = torch.arange(len(captions)).repeat_interleave(torch.tensor([*map(len, captions)]))
    return images, features, owner.to(features.device)


# -----------------------------------------------------------------------------
# Scores


def score(hits, chance):
    """hits: n numbers in 0..1 -> dict of value, chance, n and the 95 % interval. The interval is
    Wilson's, which stays inside 0..1 and is right near its ends, too."""
    n, p, z = len(hits), float(hits.double().mean()), 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = [max(0.0, centre - half), min(1.0, centre + half)]
    return {"value": p, "chance": float(chance), "n": n, "interval": interval}


def line(name, s, more=""):
    """A score as a line of text, with `more` at its end."""
    value, chance, low, high = (100 * x for x in (s["value"], s["chance"], *s["interval"]))
    text = f"{name:24s}{value:7.2f} %   chance {chance:6.2f} %   95 % interval {low:.1f}-{high:.1f}"
    return printable(f"{text}   n {s['n']:,}{more}")


# Ties need care. A model that has collapsed gives every answer the same score. If ties counted as
# hits it would score 100 %, and if they counted as misses, 0 %. Here it scores what chance would.


def rank_counts(scores, right):
    """scores (Q, A) of A answers to Q questions, right (Q, A): which answers are right -> counts
    (3, Q), which decide whether a right answer is found: wrong answers above the best right one,
    and wrong and right answers that tie with it."""
    best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
    # Equal features may differ in the last bit. NaN, from a model that has diverged, counts as
    # above, so that it is never right.
    above = ~(scores <= best + 1e-6) & ~right
    tied = (scores - best).abs() <= 1e-6
    return torch.stack([above.sum(dim=1), (tied & ~right).sum(dim=1), (tied & right).sum(dim=1)])


def recall(counts, k):
    """counts (3, Q) -> R@k of each question (Q,): the probability that a right answer is among the
    first k if tied ones come in random order.

    The tied ones share the k - above places that are left. A wrong one takes the first of them with
    probability wrong / (wrong + right), the second with (wrong - 1) / (wrong - 1 + right) ... The
    product is the probability that no right answer is found. It is 0 if there are fewer wrong ones.
    """
    above, wrong, right = counts.double()
    taken = torch.arange(k, device=counts.device)[:, None]  # places taken by wrong ones so far
    missed = (wrong - taken) / (wrong - taken + right).clamp(min=1)  # (k, Q)
    return 1 - missed.where(taken < k - above, 1.0).prod(dim=0)


def search_counts(questions, question_label, answers, answer_label):
    """features (Q, E) and (A, E), labels (Q,) and (A,), where equal labels are right answers -> the
    counts (3, Q) of rank_counts. Works in chunks, so that the matrix (Q, A) never exists."""
    counts, chunk = [], max(1, 2**24 // len(answers))  # 64 MB of scores
    for i in data.progress(range(0, len(questions), chunk), "searching"):
        right = question_label[i : i + chunk, None] == answer_label
        scores = questions[i : i + chunk] @ answers.T
        counts.append(rank_counts(scores, right).cpu())
    return torch.cat(counts, dim=1)


def mean_by_image(hits, image):
    """hits (Q,) of questions, image (Q,): their images -> the mean of each image (N,). The captions
    of one image are not independent, so an interval must not count each of them."""
    total = torch.zeros(int(image.max()) + 1).double().index_add(0, image, hits)
    return total[image.unique()] / image.unique(return_counts=True)[1]


def retrieval(image_features, text_features, owner, ks=(1, 5, 10)):
    """R@k from image to text and from text to image, as a dict of dicts. Each image counts once,
    with the mean of its captions.

    image_features (N, E), text_features (M, E), owner (M,): the number of each text's image. Chance
    is the score of a model for which all answers look the same.
    """
    images = image_features, torch.arange(len(image_features), device=owner.device)
    texts, result = (text_features, owner), {}
    for way, asked, given in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        right = torch.bincount(given[1], minlength=len(image_features))[asked[1]].cpu()  # (Q,)
        # of a model for which all answers look the same
        all_tie = torch.stack([0 * right, len(given[1]) - right, right])
        counts = search_counts(*asked, *given), all_tie
        found = {k: [mean_by_image(recall(x, k), asked[1].cpu()) for x in counts] for k in ks}
        result[way] = {f"R@{k}": score(hits, luck.mean()) for k, (hits, luck) in found.items()}
    return result


def mean_r1(result):
    """What the best model is chosen by: R@1, as the mean of both ways, and the upper end of its
    95 % interval."""
    a, b = result["image_to_text"]["R@1"], result["text_to_image"]["R@1"]
    return (a["value"] + b["value"]) / 2, (a["interval"][1] + b["interval"][1]) / 2


def print_retrieval(result):
    """A line for each score of retrieval()."""
    for way, scores in result.items():
        for name, value in scores.items():
            print(line(f"{way} {name}".replace("_", " "), value))


def zeroshot_classifier(model, tokenizer, classes, templates=TEMPLATES):
    """One feature per class, (C, E): the normalised mean of its prompts' features."""
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    features = encode_texts(model, tokenizer, prompts).view(len(classes), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=1)


def zeroshot(model, tokenizer, dataset, classes, templates=TEMPLATES, batch_size=128, workers=0):
    """Top-1 and top-5 accuracy, and top-1 of each class with the one that it is mistaken for most,
    for a dataset of (image, class number). It is a search for the class among all C classes, so its
    top-k is R@k."""
    classifier, C = zeroshot_classifier(model, tokenizer, classes, templates), len(classes)
    features, labels = encode_images(model, model.encode_image, dataset, batch_size, workers)
    labels, numbers = torch.tensor(labels), torch.arange(C).to(classifier.device)
    counts = search_counts(features, labels.to(classifier.device), classifier, numbers)
    result = {f"top{k}": score(recall(counts, k), k / C) for k in (1, 5) if k == 1 or k < C}
    guesses, result["per_class"] = (features @ classifier.T).argmax(dim=1).cpu(), []
    # A list, not a dict, because two of ImageNet's classes have the same name.
    for c in labels.unique().tolist():
        wrong = guesses[(labels == c) & (guesses != c)]
        often = classes[wrong.mode()[0]] if len(wrong) else None
        part = score(recall(counts[:, labels == c], 1), 1 / C)
        result["per_class"].append({"name": classes[c], "mistaken_for": often, **part})
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


def probe(train, test, classes, seed=0):
    """Linear probe; train, test: (features (N, F), labels (N,)). A fifth of the training images
    chooses the penalty, and then all of them are fitted. Returns (score on test, penalty)."""
    (x, y), (x_test, y_test) = train, test
    check(len(x) > 1, "a probe needs at least two training images")
    # Standardised, so that one penalty means the same for all features.
    mean, std = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    val, rest = order[: max(1, len(x) // 5)], order[max(1, len(x) // 5) :]

    def hits(x, y, x_test, y_test, penalty):
        return (fit_linear(x, y, classes, penalty)(x_test).argmax(dim=1) == y_test).double()

    penalties = data.progress([10.0**e for e in range(-6, 1)], "choosing the penalty")
    penalty = max(penalties, key=lambda p: hits(x[rest], y[rest], x[val], y[val], p).mean())
    return score(hits(x, y, x_test, y_test, penalty), 1 / classes), penalty


# -----------------------------------------------------------------------------
# Words, and where they are seen


def token_text(tokenizer, i):
    """A token as a word. One that is only the beginning of a word is written "skate-"."""
    whole = tokenizer.encoding.decode_single_token_bytes(i).endswith(b" ")
    return tokenizer.decode([i]) + ("" if whole else "-")


@torch.no_grad()
def top_words(model, tokenizer, images, k=8):
    """images (B, 3, S, S) -> for each image the k tokens that the head finds most probable, as a
    list of (word, probability, id). Probabilities are a softmax over all tokens."""
    probabilities = model.class_logits(images.to(device_of(model))).softmax(dim=-1)
    best = zip(*(x.tolist() for x in probabilities.topk(min(8 * k, tokenizer.vocab_size))))
    tokens = [[(token_text(tokenizer, i), p, i) for p, i in zip(*row)] for row in best]
    # Punctuation, padding, start and end are not words: they have no letter or digit.
    return [[x for x in row if any(map(str.isalnum, x[0]))][:k] for row in tokens]


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
    keep = torch.stack([(row == 0).nonzero().flatten() for row in inside]).to(device_of(model))
    image = image[None].to(device_of(model))

    def log_probability(keep, n):
        return model.class_logits(image.expand(n, -1, -1, -1), keep).log_softmax(dim=-1)[:, ids]

    without = torch.cat([log_probability(k, len(k)) for k in keep.split(batch_size)])  # (W, K)
    falls = (log_probability(None, 1) - without).T.cpu()  # (K, W)
    return falls, (falls @ inside / inside.sum(dim=0)).unflatten(1, (grid, grid))


# -----------------------------------------------------------------------------
# Commands


# Words in place of a file's name, and the lists of open_clip that they stand for.
PUBLISHED = {"imagenet": "IMAGENET_CLASSNAMES", "openai": "OPENAI_IMAGENET_TEMPLATES"}


def read_list(path):
    """The lines of a file, or one of the PUBLISHED lists."""
    if path in PUBLISHED:
        items = getattr(optional("open_clip", "open_clip_torch"), PUBLISHED[path])
        return [item if isinstance(item, str) else item("{}") for item in items]
    return [s.strip() for s in Path(path).read_text("utf-8", "replace").splitlines() if s.strip()]


def class_names(dataset, path=None):
    """A name for each class: the lines of --classes, or else the names of the folders."""
    names = read_list(path) if path else [name.replace("_", " ") for name in dataset.classes]
    check(len(names) == len(dataset.classes), f"{path} does not have a line for each folder")
    return names


# Each command prints its scores and returns them for --json.


def command_zeroshot(model, tokenizer, args):
    dataset = ClassFolders(args.images, model.config.image_size)
    classes = class_names(dataset, args.classes)
    templates = read_list(args.templates) if args.templates else TEMPLATES
    check(templates and all("{}" in t for t in templates), f"{args.templates}: no {{}} in a line")
    print(f"{len(classes)} classes, {len(templates)} prompts:", *templates, sep="\n  ")
    result = zeroshot(model, tokenizer, dataset, classes, templates, args.batch_size, args.workers)
    for name in sorted(result.keys() - {"per_class"}):
        print(line(name, result[name]))
    for c in result["per_class"] if len(classes) <= 30 else ():
        print(line(f"  {c['name']}", c, f"   mistaken for {c['mistaken_for'] or 'none'}"))
    return {"templates": list(templates), **result}


def command_retrieval(model, tokenizer, args):
    pairs = data.Pairs(data.expand(args.data), tokenizer, model.config.image_size, args.captions)
    sides = {Path(shard).name.partition("-")[0] for shard in pairs.shards}
    check(not {"train", "val"} <= sides, "these shards are of training and of validation: name one")
    images, texts, owner = encode_shards(model, pairs, args.batch_size, args.workers)
    print(f"{len(images):,} images, {len(texts):,} captions")
    result = retrieval(images, texts, owner)
    print_retrieval(result)
    return {"images": len(images), "captions": len(texts), **result}


def command_probe(model, _, args):
    train, test = (ClassFolders(f, model.config.image_size) for f in (args.train, args.test))
    check(train.classes == test.classes, f"{args.train} and {args.test} have different classes")
    result, D = {}, model.config.vision_width
    torch.manual_seed(0)
    untrained = SuperCLIP(model.config).to(device_of(model)).eval()  # what was there before
    for kind, tower in (("", model), ("untrained ", untrained)):
        parts = [frozen_features(tower, f, args.batch_size, args.workers) for f in (train, test)]
        for name, columns in (("class token", slice(D)), ("patch mean", slice(D, None))):
            part = probe(*((x[:, columns], y) for x, y in parts), len(train.classes))[0]
            print(line(kind + name, part))
            result[kind + name] = part
    return result


def main(argv):
    parser = argparse.ArgumentParser(usage=__doc__.replace("%", "%%"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, function, text):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(function=function)
        sub.add_argument("--checkpoint", required=True, help="best.pt or last.pt of a run")
        sub.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
        sub.add_argument("--json", type=output_file(".json"), help="file to write the numbers to")
        sub.add_argument("--batch_size", type=number(int, 1), default=128, help="(default 128)")
        sub.add_argument("--workers", type=number(int, 0), default=2, help="(default 2 processes)")
        return sub.add_argument

    add = command("zeroshot", command_zeroshot, "classify images by the names of their classes")
    add("--images", required=True, help="a folder with a folder of images per class")
    add("--classes", help="file of names, a line for each folder in sorted order; or imagenet")
    add("--templates", help="file of prompts, one a line, {} for the name; or openai: CLIP's 80")
    add = command("retrieval", command_retrieval, "find captions by image and images by caption")
    add("--data", nargs="+", required=True, help="tar shards: paths, folders, globs or braces")
    add("--captions", nargs="+", default=["txt"], help="txt or json.FIELD (default txt)")
    add = command("probe", command_probe, "fit a linear classifier on the frozen image tower")
    add("--train", required=True, help="a folder with a folder of images per class")
    add("--test", required=True, help="the same classes, other images")
    args = parser.parse_args(argv)
    # A command takes model and tokenizer, the first two of what load returns.
    write_json(args.json, args.function(*load(args.checkpoint, pick_device(args.device))[:2], args))


if __name__ == "__main__":
    run_command(main)
