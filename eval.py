"""Score a checkpoint.

    python eval.py zeroshot  --checkpoint out/best.pt --images DIR       a folder per class
    python eval.py retrieval --checkpoint out/best.pt --data SHARDS      R@1, R@5, R@10, both ways
    python eval.py probe     --checkpoint out/best.pt --train DIR --test DIR

The checkpoint alone is enough: it carries the configuration and the vocabulary. Every score is
printed with its chance level, the number of images or captions, and a 95 % interval; --json FILE
keeps it all. train.py calls the same functions for its validation, in float32 as they are here.

The file reads from top to bottom: loading a checkpoint, images and texts to features, features to
scores, the head's words and where they are seen, and the commands.

Axes: B images of a batch, N images, M captions, Q questions, A answers, C classes, D width, E
embedding, P patches, W windows, K words.
"""

import argparse
import importlib.util
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision import datasets
from tqdm import tqdm

import data
from superclip import PAD, InputError, SuperCLIP, SuperCLIPConfig, check, cli, number

# A few of the prompts that CLIP's authors use. A class is the mean of its prompts' features.
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a photo of the {}.", "a {}.")


# -----------------------------------------------------------------------------
# Checkpoints


def read_checkpoint(path):
    """A file of train.py or scripts/convert.py -> dict with model, config, vocab and more. Raises
    InputError."""
    check(Path(path).is_file(), f"there is no file {path}")
    try:
        # weights_only: other pickles can run code as they load, and weights come from strangers
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds
        unsafe = "GLOBAL" in str(error)  # the pickle names a class or a function
        reason = "could run code and is refused" if unsafe else "is damaged or not a checkpoint"
        raise InputError(f"{path} {reason}") from None
    known = isinstance(content, dict) and {"model", "config", "vocab"} <= content.keys()
    check(known, f"{path} is not a checkpoint of this project: see scripts/convert.py")
    return content


def load(checkpoint, device="cpu"):
    """A checkpoint, ready for inference: (model, tokenizer, preprocess). Raises InputError.

    The model is in eval mode and its parameters need no gradient, so that a loop over photographs
    keeps no graph: model.encode_image(preprocess(pil_image)[None]), model.encode_text(
    tokenizer(["a dog"])).
    """
    content = read_checkpoint(checkpoint)
    try:
        config = SuperCLIPConfig(**content["config"])
        model = SuperCLIP(config)
        model.load_state_dict(content["model"])
    except (TypeError, RuntimeError):  # another version had other fields or other tensors
        raise InputError(f"{checkpoint} is of another version of this project") from None
    tokenizer = data.Tokenizer(content["vocab"], config.context_length)
    preprocess = partial(data.load_image, size=config.image_size)
    return model.requires_grad_(False).to(device).eval(), tokenizer, preprocess


def device_of(model):
    return model.logit_scale.device


# -----------------------------------------------------------------------------
# Images and texts -> features


# The datasets below give (image, label). In place of an image that cannot be read they give the
# reason, a string, so that one broken file does not end an evaluation of thousands.


def read_image(path, size):
    """An image file -> uint8 tensor (3, size, size), or the reason why not, as a string."""
    try:
        return data.load_image(Path(path).read_bytes(), size)
    except (data.BadSample, OSError) as error:
        return f"{path}: {error}"


class ClassFolders(datasets.ImageFolder):
    """A folder with a folder of images per class; labels are class numbers, by sorted name. An
    empty folder is a class to be confused with."""

    def __init__(self, folder, image_size):
        super().__init__(folder, loader=partial(read_image, size=image_size), allow_empty=True)
        check(self.samples, f"there are no images in the folders of {folder}")

    def find_classes(self, folder):
        # As torchvision does it, but without hidden folders such as .ipynb_checkpoints.
        names = sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and p.name[0] != ".")
        check(names, f"{folder} has no folders in it: there must be one folder of images per class")
        return names, {name: i for i, name in enumerate(names)}


class ShardImages(Dataset):
    """The pairs of shards, in order; labels are lists of all captions of an image."""

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


def batches(dataset, batch_size, workers, description):
    """Yield (images (B, 3, S, S) uint8, list of B labels). Images that cannot be read are named."""
    loader = data.make_loader(dataset, workers, batch_size=batch_size, collate_fn=collate)
    total, any_good = math.ceil(len(dataset) / batch_size), False
    for images, labels, reasons in data.progress(loader, description, total, unit="batch"):
        for reason in reasons:
            tqdm.write(f"skipped {reason}")
        if labels:
            any_good = True
            yield images, labels
    check(any_good, "none of the samples can be used: " + "".join(reasons[-1:]))


@torch.no_grad()
def encode_texts(model, tokenizer, texts, batch_size=256):
    """list of M strings -> features (M, E)."""
    features = []
    for i in data.progress(range(0, len(texts), batch_size), "encoding texts"):
        ids = [tokenizer.encode(text) for text in texts[i : i + batch_size]]
        tokens = tokenizer.rows(ids, min(tokenizer.context_length, data.round_up(ids)))
        features.append(model.encode_text(tokens.to(device_of(model))))
    return torch.cat(features)


@torch.no_grad()
def encode_shards(model, pairs, batch_size=128, workers=0):
    """Pairs -> image features (N, E), text features (M, E) of all their captions, and owner (M,):
    the image of each text. Says how many captions are not unique."""
    images, texts, owner = [], [], []
    for pixels, captions in batches(ShardImages(pairs), batch_size, workers, "encoding"):
        for number_of_image, own in enumerate(captions, start=sum(map(len, images))):
            owner += [number_of_image] * len(own)
            texts += own
        images.append(model.encode_image(pixels.to(device_of(model))))
    # Each text is encoded once: identical captions get identical features.
    place_of = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    if repeated := len(texts) - len(place_of):
        tqdm.write(f"{repeated:,} of {len(texts):,} captions repeat another one: they tie with it")
    features = encode_texts(model, pairs.tokenizer, list(place_of))[[place_of[t] for t in texts]]
    return torch.cat(images), features, torch.tensor(owner, device=features.device)


# -----------------------------------------------------------------------------
# Scores


def score(hits, chance):
    """hits: n numbers in 0..1 -> dict of value, chance, n and the 95 % interval (Wilson's, which
    stays inside 0..1 and is right near its ends)."""
    n, p, z = len(hits), float(hits.double().mean()), 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = [max(0.0, centre - half), min(1.0, centre + half)]
    return {"value": p, "chance": float(chance), "n": n, "interval": interval}


def line(name, s):
    """A score as a line of text."""
    low, high = s["interval"]
    return (
        f"{name:24s}{100 * s['value']:7.2f} %   chance {100 * s['chance']:6.2f} %   "
        f"95 % interval {100 * low:.1f}-{100 * high:.1f}   n {s['n']:,}"
    )


# Ties need care. A model that has collapsed gives every answer the same score. If ties counted as
# hits it would score 100 %, and if they counted as misses 0 %. Here it scores what chance would.


def place(scores, right):
    """scores (Q, A) of A answers to Q questions, right (Q, A): which answers are right. Returns
    three counts (Q,): wrong answers above the best right one, wrong ones level with it, and right
    ones level with it."""
    best = scores.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
    # Equal features may differ in the last bit. NaN, from a model that has diverged, counts as
    # above: it is never right.
    above = ~(scores <= best + 1e-6) & ~right
    level = (scores - best).abs() <= 1e-6
    return above.sum(dim=1), (level & ~right).sum(dim=1), (level & right).sum(dim=1)


def recall(above, wrong, right, k):
    """R@k of each question (Q,), from its place: the probability that a right answer is among the
    first k if those level with it come in random order. They have m = k - above places, and miss
    them all in C(wrong, m) of C(wrong + right, m) cases."""
    m, wrong, right = k - above, wrong.double(), right.double()
    miss = torch.ones_like(wrong)
    for j in range(k):  # the next of the m places goes to a wrong answer, too
        miss *= torch.where(j < m, (wrong - j).clamp(min=0) / (wrong + right - j).clamp(min=1), 1.0)
    return 1 - miss


def retrieval(image_features, text_features, owner, ks=(1, 5, 10)):
    """R@k and median rank, image to text and text to image, as a dict of dicts.

    image_features (N, E), text_features (M, E), owner (M,). Chance is the score of a model for
    which all answers look the same. Works in chunks, so an (N, M) matrix never exists.
    """
    number_of_image = torch.arange(len(image_features), device=owner.device)
    # Each side with the number of the image that it belongs to: equal numbers are right answers.
    images, texts = (image_features, number_of_image), (text_features, owner)
    ways, result = {"image_to_text": (images, texts), "text_to_image": (texts, images)}, {}
    for way, ((questions, asked), (answers, given)) in ways.items():
        places, counts = [], []  # counts: right answers to each question
        chunk = max(1, 2**24 // len(answers))  # 64 MB of scores
        for i in data.progress(range(0, len(questions), chunk), way):
            right = asked[i : i + chunk, None] == given
            places.append(torch.stack(place(questions[i : i + chunk] @ answers.T, right)).cpu())
            counts.append(right.sum(dim=1).cpu())
        (above, wrong, level), counts = torch.cat(places, dim=1), torch.cat(counts)
        blind = torch.zeros_like(counts), len(answers) - counts, counts  # the place of a guess
        result[way] = {
            f"R@{k}": score(recall(above, wrong, level, k), recall(*blind, k).mean()) for k in ks
        }
        result[way]["median_rank"] = float((above + 1 + wrong / (level + 1)).median())
    return result


def mean_r1(result):
    """The number that validation goes by: R@1, the mean of both ways."""
    return (result["image_to_text"]["R@1"]["value"] + result["text_to_image"]["R@1"]["value"]) / 2


def print_retrieval(result):
    """A line for each score of retrieval()."""
    for way, part in result.items():
        for name, value in part.items():
            label = f"{way} {name}".replace("_", " ")
            print(line(label, value) if isinstance(value, dict) else f"{label} {value:.0f}")


def zeroshot_classifier(model, tokenizer, classes, templates=TEMPLATES):
    """One feature per class, (C, E): the normalised mean of its prompts' features."""
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    features = encode_texts(model, tokenizer, prompts).view(len(classes), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=1)


@torch.no_grad()
def zeroshot(model, tokenizer, dataset, classes, templates=TEMPLATES, batch_size=128, workers=0):
    """Top-1 and top-5 accuracy, and top-1 of each class, for a dataset of (image, class number)."""
    classifier, C = zeroshot_classifier(model, tokenizer, classes, templates), len(classes)
    places, labels = [], []
    for images, label in batches(dataset, batch_size, workers, "classifying"):
        logits = model.encode_image(images.to(device_of(model))) @ classifier.T  # (B, C)
        right = F.one_hot(torch.tensor(label), C).bool().to(logits.device)
        places.append(torch.stack(place(logits, right)).cpu())
        labels += label
    places, labels = torch.cat(places, dim=1), torch.tensor(labels)
    top1 = recall(*places, 1)
    result = {f"top{k}": score(recall(*places, k), k / C) for k in (1, 5) if k == 1 or k < C}
    # A list, not a dict: two of ImageNet's classes may have the same name.
    counted = [(name, top1[labels == c]) for c, name in enumerate(classes)]
    result["per_class"] = [{"name": n, **score(hits, 1 / C)} for n, hits in counted if len(hits)]
    return result


@torch.no_grad()
def frozen_features(model, dataset, batch_size=128, workers=0):
    """What a linear probe reads: class token and mean of the patch tokens, side by side (N, 2D);
    and the labels (N,)."""
    features, labels = [], []
    for images, label in batches(dataset, batch_size, workers, "encoding"):
        tokens = model.visual(images.to(device_of(model)))
        features.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).float().cpu())
        labels += label
    return torch.cat(features), torch.tensor(labels)


def fit_linear(x, y, classes, penalty):
    """Multinomial logistic regression by L-BFGS, x (N, F), y (N,) -> nn.Linear. The problem is
    convex, so that it has one solution and needs no learning rate."""
    layer = torch.nn.Linear(x.shape[1], classes)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(layer(x), y) + penalty * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return layer


def probe(train, test, classes, seed=0):
    """Linear probe; train, test: (features (N, F), labels (N,)). The penalty is chosen on a fifth
    of the training images; the fit then uses all of them. Returns (score on test, penalty)."""
    (x, y), (x_test, y_test) = train, test
    check(len(x) > 1, "a probe needs at least two training images")
    # Standardised features make one penalty mean the same for all of them.
    mean, std = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order[: max(1, len(x) // 5)], order[max(1, len(x) // 5) :]

    def hits(x, y, x_test, y_test, penalty):
        return (fit_linear(x, y, classes, penalty)(x_test).argmax(dim=1) == y_test).double()

    parts = x[rest], y[rest], x[held_out], y[held_out]
    penalties = data.progress([10.0**e for e in range(-6, 1)], "choosing the penalty")
    penalty = max(penalties, key=lambda penalty: hits(*parts, penalty).mean())
    return score(hits(x, y, x_test, y_test, penalty), 1 / classes), penalty


# -----------------------------------------------------------------------------
# Words, and where they are seen


@torch.no_grad()
def top_words(model, tokenizer, images, k=8):
    """images (B, 3, S, S) -> for each image the k tokens that the head finds most probable, as
    [(word, probability, id)]. Probabilities are a softmax over all tokens. A token that is only the
    beginning of a word is written "skate-"."""
    probabilities = model.class_logits(images.to(device_of(model))).softmax(dim=-1)
    probabilities[:, [PAD, tokenizer.start, tokenizer.end]] = 0  # these are not words
    values, ids = probabilities.topk(k)

    def word(i):
        ends = tokenizer.encoding.decode_single_token_bytes(i).endswith(b" ")
        return tokenizer.decode([i]) + ("" if ends else "-")

    rows = zip(ids.tolist(), values.tolist())
    return [[(word(i), p, i) for i, p in zip(*row)] for row in rows]


def windows_of(grid, window):
    """All window x window squares in a grid x grid of patches: bool (W, P), True inside."""
    # Row i of a band matrix: the patches of the i-th window along one side. A square is the product
    # of two sides, and kron multiplies every row with every row.
    side = torch.ones(grid - window + 1, grid).triu().tril(window - 1)
    return torch.kron(side, side).bool()


@torch.no_grad()
def word_maps(model, image, ids, window, batch_size=64):
    """Where an image (3, S, S) shows each of K tokens (a list of ids).

    Returns falls (K, W): by how much the word's log-probability falls, in nats, when a window of
    patches is left out; and maps (K, grid, grid): for each patch the mean over its windows.

    Why by leaving out? The head is linear on the mean of the patch tokens, so its logit also splits
    exactly into one part per token. But attention has mixed the patches by then, and those parts
    light up the background as much as the object. A window that is left out is simply missing.
    """
    grid = model.visual.grid
    inside = windows_of(grid, window)  # (W, P)
    keep = torch.stack([(~row).nonzero().flatten() for row in inside]).to(device_of(model))
    image = image[None].to(device_of(model))

    def log_probability(keep, n):
        return model.class_logits(image.expand(n, -1, -1, -1), keep).log_softmax(dim=-1)[:, ids]

    without = torch.cat([log_probability(k, len(k)) for k in keep.split(batch_size)])  # (W, K)
    falls = (log_probability(None, 1) - without).T.cpu()  # (K, W)
    weight = inside.float()
    return falls, (falls @ weight / weight.sum(dim=0)).unflatten(1, (grid, grid))


# -----------------------------------------------------------------------------
# Commands


def pick_device(name):
    """--device, or the first one there is. Raises InputError."""
    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    name = name or ("cuda" if torch.cuda.is_available() else mps)
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"no device {name}: {str(error).splitlines()[0]}") from None


def read_lines(path):
    check(Path(path).is_file(), f"there is no file {path}")
    return [s.strip() for s in Path(path).read_text("utf-8", "replace").splitlines() if s.strip()]


def published(name):
    """A list that open_clip comes with. Raises InputError."""
    check(importlib.util.find_spec("open_clip"), "this needs: pip install open_clip_torch")
    return getattr(importlib.import_module("open_clip"), name)


def class_names(dataset, path=None):
    """A name for each class: the lines of --classes, or else the names of the folders."""
    if path is None:
        return [name.replace("_", " ") for name in dataset.classes]
    names = published("IMAGENET_CLASSNAMES") if path == "imagenet" else read_lines(path)
    n, given = len(dataset.classes), len(names)
    check(given == n, f"{path} names {given} classes, but there are {n} folders")
    return names


# Each command prints its scores and returns them for --json.


def command_zeroshot(model, tokenizer, args):
    dataset, templates = ClassFolders(args.images, model.config.image_size), TEMPLATES
    classes = class_names(dataset, args.classes)
    if args.templates == "openai":
        templates = [template("{}") for template in published("OPENAI_IMAGENET_TEMPLATES")]
    elif args.templates:
        templates = read_lines(args.templates)
        usable = templates and all("{}" in template for template in templates)
        check(usable, f"every line of {args.templates} must have {{}} where the class name goes")
    print(f"{len(classes)} classes, {len(templates)} prompts: {' | '.join(templates)}")
    result = zeroshot(model, tokenizer, dataset, classes, templates, args.batch_size, args.workers)
    for name in sorted(result.keys() - {"per_class"}):
        print(line(name, result[name]))
    for part in result["per_class"] if len(classes) <= 30 else ():
        print(line(f"  {part['name']}", part))
    return {"templates": list(templates), **result}


def command_retrieval(model, tokenizer, args):
    pairs = data.Pairs(data.expand(args.data), tokenizer, model.config.image_size, args.captions)
    images, texts, owner = encode_shards(model, pairs, args.batch_size, args.workers)
    print(f"{len(images):,} images, {len(texts):,} captions")
    result = retrieval(images, texts, owner)
    print_retrieval(result)
    return {"images": len(images), "captions": len(texts), **result}


def command_probe(model, _, args):
    folders = [ClassFolders(f, model.config.image_size) for f in (args.train, args.test)]
    same = folders[0].classes == folders[1].classes
    check(same, f"{args.train} and {args.test} have different class folders")
    parts = [frozen_features(model, f, args.batch_size, args.workers) for f in folders]
    result, D = {}, model.config.vision_width
    for name, columns in (("class token", slice(D)), ("patch mean", slice(D, None))):
        train, test = ((x[:, columns], y) for x, y in parts)
        value, penalty = probe(train, test, len(folders[0].classes))
        result[name] = {**value, "penalty": penalty}
        print(line(f"linear probe {name}", value) + f"   penalty {penalty:g}")
    return result


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, function, text):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(function=function)
        sub.add_argument("--checkpoint", required=True, help="best.pt or last.pt of a run")
        sub.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
        sub.add_argument("--json", help="file to write the numbers to")
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
    return parser


def main(argv):
    args = make_parser().parse_args(argv)
    # Checked now, and not after an evaluation. The suffix protects checkpoints and shards.
    fine = not args.json or (args.json.endswith(".json") and Path(args.json).parent.is_dir())
    check(fine, "--json needs a name that ends in .json, in a folder that exists")
    model, tokenizer, _ = load(args.checkpoint, pick_device(args.device))
    result = args.function(model, tokenizer, args)
    if args.json:
        data.write_file(args.json, lambda file: file.write(json.dumps(result, indent=2).encode()))


if __name__ == "__main__":
    cli(main)
