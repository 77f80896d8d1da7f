"""Evaluate a checkpoint, and see what it sees.

    python eval.py zeroshot  --checkpoint out/best.pt --images DIR       a folder per class
    python eval.py retrieval --checkpoint out/best.pt --data SHARDS      R@1, R@5, R@10, both ways
    python eval.py probe     --checkpoint out/best.pt --train DIR --test DIR
    python eval.py words     --checkpoint out/best.pt --image FILE ...   top words, and where
    python eval.py export    --checkpoint out/best.pt --out model.pt     for open_clip and its kin

The checkpoint alone is enough: it carries the configuration and the vocabulary. Every score is
printed with what chance would give, the number of images, and a 95 % interval; --json FILE keeps it
all. train.py calls the same functions for its validation."""

import argparse
import inspect
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import superclip
from superclip import InputError

# A few of the prompts that CLIP's authors use for ImageNet: the mean of their features is a class.
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a {}.",
)


# -----------------------------------------------------------------------------
# Scores


def score(hits, chance):
    """hits: a tensor of numbers in 0..1, one for each of n questions -> dict of value, chance, n
    and the 95 % interval (Wilson's, which stays inside 0..1 and is right near its ends)."""
    n, p, z = len(hits), float(hits.double().mean()), 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"value": p, "chance": float(chance), "n": n, "interval": [centre - half, centre + half]}


def line(name, s):
    """A score as a line of text."""
    low, high = s["interval"]
    return (
        f"{name:24s}{100 * s['value']:7.2f} %   chance {100 * s['chance']:6.2f} %   "
        f"95 % interval {100 * low:.1f}-{100 * high:.1f}   n {s['n']:,}"
    )


# -----------------------------------------------------------------------------
# Reading what is evaluated


class ShardImages(Dataset):
    """The pairs of shards in order, with all captions of an image; None for a bad sample."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        row = self.pairs.index[i].tolist()
        try:
            texts = self.pairs.texts(row, self.pairs.captions)
            return data.load_image(self.pairs.read(row, data.IMAGE), self.pairs.image_size), texts
        except (data.BadSample, OSError) as error:
            return None, f"{self.pairs.shards[row[0]]}: {self.pairs.key(row)}: {error}"


class FileImages(Dataset):
    """Image files with a label each; None for one that cannot be read."""

    def __init__(self, files, labels, image_size):
        self.files, self.labels, self.image_size = files, labels, image_size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            image = data.load_image(Path(self.files[i]).read_bytes(), self.image_size)
            return image, self.labels[i]
        except (data.BadSample, OSError) as error:
            return None, f"{self.files[i]}: {error}"


class TorchvisionImages(Dataset):
    """A torchvision data set of (PIL image, class number)."""

    def __init__(self, dataset, image_size):
        self.dataset, self.image_size = dataset, image_size

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        image, label = self.dataset[i]
        return data.load_image(image, self.image_size), label


def collate(samples):
    """(image or None, label or reason) of each -> (images stacked or None, labels, reasons). One
    tensor a batch: each that leaves a worker holds a file open, and of those there are not many."""
    good = [(image, label) for image, label in samples if image is not None]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, [label for _, label in good], [why for image, why in samples if image is None]


def batches(dataset, batch_size, workers, desc):
    """Yields (images (B, 3, S, S) uint8, list of B labels or texts). Bad images are named."""
    settings = data.worker_settings(workers)
    loader = DataLoader(dataset, batch_size, collate_fn=collate, **settings)
    for images, labels, reasons in tqdm(
        loader, desc=desc, unit="batch", delay=1, leave=False, disable=None
    ):
        for reason in reasons:
            tqdm.write(f"skipped {reason}")
        if images is not None:
            yield images, labels


def device_of(model):
    return model.logit_scale.device


@torch.no_grad()
def encode_texts(model, tokenizer, texts, batch_size=256):
    """list of M strings -> features (M, E)."""
    features = []
    for i in range(0, len(texts), batch_size):
        ids = [tokenizer.encode(text) for text in texts[i : i + batch_size]]
        tokens = tokenizer.rows(ids, min(tokenizer.context_length, data.round_up(ids)))
        features.append(model.encode_text(tokens.to(device_of(model))))
    return torch.cat(features)


# -----------------------------------------------------------------------------
# Retrieval


@torch.no_grad()
def encode_pairs(model, pairs, batch_size=128, workers=0):
    """Pairs -> image features (N, E), text features (M, E) of all their captions, owner (M,): the
    image of each text."""
    images, texts, owner = [], [], []
    for pixels, captions in batches(ShardImages(pairs), batch_size, workers, "encoding pairs"):
        for number, own in enumerate(captions, start=sum(map(len, images))):
            owner += [number] * len(own)
        images.append(model.encode_image(pixels.to(device_of(model))))
        texts.append(encode_texts(model, pairs.tokenizer, [t for own in captions for t in own]))
    if not images:
        raise InputError("not one of the images could be read")
    return torch.cat(images), torch.cat(texts), torch.tensor(owner, device=device_of(model))


def _first_hit(scores, own):
    """scores (C, M) of C questions, own (C, M): which answers are right. -> how many wrong answers
    score higher than the best right one (C,), how many the same (C,), and how many right ones share
    it (C,)."""
    best = scores.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
    # Equal features can differ in their last bit: products of rows are summed in different orders.
    # Not below or level is above: what a diverged model says, NaN, is then always wrong.
    higher = (~(scores <= best + 1e-6) & ~own).sum(dim=1)
    level = (scores - best).abs() <= 1e-6
    return higher, (level & ~own).sum(dim=1), (level & own).sum(dim=1)


def _recall(higher, ties, right, k):
    """Probability, ties broken at random, that a right answer is among the first k, (C,)."""
    miss = torch.ones(len(higher), dtype=torch.double, device=higher.device)
    for place in range(k):  # walk through the places that the tied answers fill, missing each time
        free = place - higher
        miss *= torch.where(
            free >= 0, ((ties - free).clamp(min=0) / (ties + right - free).clamp(min=1)), 1.0
        )
    return 1 - miss


def chance_recall(own, answers, k):
    """R@k of a model to which all answers look the same; own (C,): right answers a question has."""
    return _recall(torch.zeros_like(own), answers - own, own, k).mean()


def retrieval(image_features, text_features, owner, ks=(1, 5, 10)):
    """R@k and median rank, image to text and text to image; ties count as chance would have it.

    image_features (N, E), text_features (M, E), owner (M,). Works in chunks: never an (N, M)
    matrix."""
    N, M = len(image_features), len(text_features)
    number = torch.arange(N, device=owner.device)
    result = {}
    for name, queries, answers, questions_of, answers_of in (
        ("image_to_text", image_features, text_features, number, owner),
        ("text_to_image", text_features, image_features, owner, number),
    ):
        counts, chunk = [], max(1, 2**24 // len(answers))  # 64 MB of scores
        for i in tqdm(range(0, len(queries), chunk), desc=name, delay=1, leave=False, disable=None):
            own = questions_of[i : i + chunk, None] == answers_of[None]
            with torch.autocast(answers.device.type, enabled=False):  # bfloat16 would make ties
                scores = queries[i : i + chunk] @ answers.T
            counts.append(_first_hit(scores, own))
        higher, ties, right = (torch.cat(c).cpu() for c in zip(*counts))
        own = torch.ones(M) if name == "text_to_image" else torch.bincount(owner.cpu(), minlength=N)
        part = {
            f"R@{k}": score(_recall(higher, ties, right, k), chance_recall(own, len(answers), k))
            for k in ks
        }
        part["median_rank"] = float((higher + 1 + ties / (right + 1)).median())
        result[name] = part
    return result


def print_retrieval(result):
    for way, part in result.items():
        for name, value in part.items():
            if name != "median_rank":
                print(line(f"{way.replace('_', ' ')} {name}", value))
        print(f"{way.replace('_', ' ')} median rank {part['median_rank']:.0f}")


def mean_r1(result):
    """The one number that validation goes by: R@1, the mean of both ways."""
    return (result["image_to_text"]["R@1"]["value"] + result["text_to_image"]["R@1"]["value"]) / 2


# -----------------------------------------------------------------------------
# Zero-shot classification


@torch.no_grad()
def zeroshot_classifier(model, tokenizer, classes, templates):
    """One feature per class, (C, E): the normalised mean of its prompts' features."""
    rows = []
    for name in tqdm(classes, desc="prompts", delay=1, leave=False, disable=None):
        features = encode_texts(model, tokenizer, [t.replace("{}", name) for t in templates])
        rows.append(F.normalize(features.mean(dim=0), dim=0))
    return torch.stack(rows)


@torch.no_grad()
def zeroshot(model, tokenizer, dataset, classes, templates=TEMPLATES, batch_size=128, workers=0):
    """Top-1 and top-5 accuracy, and top-1 of each class, of images with class numbers as labels."""
    classifier = zeroshot_classifier(model, tokenizer, classes, templates)
    ranks, labels = [], []
    for images, label in batches(dataset, batch_size, workers, "classifying"):
        label = torch.tensor(label, device=device_of(model))
        features = model.encode_image(images.to(device_of(model)))
        with torch.autocast(features.device.type, enabled=False):  # as in retrieval
            logits = features @ classifier.T  # (B, C)
        own = F.one_hot(label, len(classes)).bool()
        ranks.append(torch.stack(_first_hit(logits, own)).cpu())
        labels.append(label.cpu())
    if not ranks:
        raise InputError("not one of the images could be read")
    ranks, labels = torch.cat(ranks, dim=1), torch.cat(labels)
    C = len(classes)
    top1 = _recall(*ranks, 1)
    result = {"top1": score(top1, 1 / C)}
    if C > 5:
        result["top5"] = score(_recall(*ranks, 5), 5 / C)
    # ImageNet has two cranes and two maillots: a name that comes twice gets its number, too
    names = [n if classes.count(n) == 1 else f"{n} ({c})" for c, n in enumerate(classes)]
    result["per_class"] = {
        name: score(top1[labels == c], 1 / C) for c, name in enumerate(names) if (labels == c).any()
    }
    return result


IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def image_files(folder):
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)


def class_folders(folder, image_size, names_file=None):
    """A folder with a folder per class -> (dataset, class names). Raises InputError."""
    if not Path(folder).is_dir():
        raise InputError(f"there is no folder {folder}")
    folders = sorted(p for p in Path(folder).iterdir() if p.is_dir())
    if not folders:
        raise InputError(
            f"{folder} holds no folders: zero-shot wants one folder of images per class"
        )
    names = [p.name.replace("_", " ") for p in folders]
    if names_file is not None:
        if not Path(names_file).is_file():
            raise InputError(f"there is no file of class names {names_file}")
        names = [name.strip() for name in Path(names_file).read_text().splitlines() if name.strip()]
        if len(names) != len(folders):
            raise InputError(
                f"{names_file} names {len(names)} classes, {folder} has {len(folders)} folders"
            )
    elif all(re.fullmatch(r"n\d{8}", p.name) for p in folders):
        from torchvision.models import ResNet18_Weights  # its list follows the sorted wnids

        names = ResNet18_Weights.DEFAULT.meta["categories"]
        if len(names) != len(folders):
            raise InputError(
                f"{folder} has {len(folders)} of ImageNet's 1,000 folders: name them with --classes"
            )
    files, labels = [], []
    for label, path in enumerate(folders):
        found = image_files(path)
        if not found:
            raise InputError(f"the class folder {path} holds no images")
        files += found
        labels += [label] * len(found)
    return FileImages(files, labels, image_size), names


def torchvision_dataset(name, root, download, image_size, train=False):
    """A data set of torchvision by its name (cifar10, Food101, ...) -> (dataset, class names)."""
    from torchvision import datasets

    known = {n.lower(): n for n in datasets.__all__ if inspect.isclass(getattr(datasets, n))}
    if name.lower() not in known:
        raise InputError(f"torchvision has no data set {name!r}")
    cls = getattr(datasets, known[name.lower()])
    parameters = inspect.signature(cls).parameters
    split = {"train": train} if "train" in parameters else {"split": "train" if train else "test"}
    try:
        dataset = cls(root, download=download, **split)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise InputError(f"{cls.__name__} cannot be read from {root}: {error}") from None
    if not hasattr(dataset, "classes"):
        raise InputError(f"{cls.__name__} of torchvision names no classes")
    return TorchvisionImages(dataset, image_size), [c.replace("_", " ") for c in dataset.classes]


# -----------------------------------------------------------------------------
# Linear probe


@torch.no_grad()
def frozen_features(model, dataset, batch_size=128, workers=0):
    """Class token after ln_post beside the mean of the patch tokens, (N, 2D); labels (N,)."""
    features, labels = [], []
    for images, label in batches(dataset, batch_size, workers, "encoding images"):
        tokens = model.visual(images.to(device_of(model)))
        features.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).float().cpu())
        labels += label
    if not features:
        raise InputError("not one of the images could be read")
    return torch.cat(features), torch.tensor(labels)


def fit_linear(x, y, classes, penalty):
    """Multinomial logistic regression by L-BFGS on standardised x -> nn.Linear."""
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
    """Linear probe: train, test are (features (N, F), labels (N,)). The penalty is chosen on a
    fifth of the training images, held out; then all of them are used. Returns (score on test,
    penalty)."""
    (x, y), (x_test, y_test) = train, test
    mean, std = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: max(1, len(x) // 5)], order[max(1, len(x) // 5) :]

    def accuracy(penalty):
        with torch.no_grad():
            guess = fit(x[rest], y[rest], penalty)(x[held]).argmax(dim=1)
        return (guess == y[held]).double().mean().item()

    def fit(x, y, penalty):
        with torch.enable_grad():
            return fit_linear(x, y, classes, penalty)

    penalties = [10.0**e for e in range(-6, 1)]
    penalty = max(tqdm(penalties, desc="penalty", delay=1, leave=False, disable=None), key=accuracy)
    with torch.no_grad():
        guess = fit(x, y, penalty)(x_test).argmax(dim=1)
    return score((guess == y_test).double(), 1 / classes), penalty


# -----------------------------------------------------------------------------
# Words, and where they are seen


def words_of(tokenizer, ids, probabilities):
    """Tokens in falling order of probability -> [(word, probability, [ids])]. Where a vocabulary of
    subwords has split a word and all its parts are here, they are joined, with the least probable
    part's probability; what stays without its end is written "skate-"."""
    left = dict(zip(ids, probabilities))
    ends_word = {i: tokenizer.encoding.decode_single_token_bytes(i).endswith(b" ") for i in ids}
    words = []
    for i in ids:
        if i not in left:
            continue
        parts = [i]
        if not ends_word[i]:
            # Ends with which the tokenizer would write one word. The parts of a word come together,
            # so the head finds them about equally probable: else "skate" could end in "cat".
            ends = [j for j in ids if j in left and ends_word[j] and 0.5 < left[j] / left[i] < 2]
            ends = [j for j in ends if tokenizer.encode(tokenizer.decode([i, j])) == [i, j]]
            parts += sorted(ends, key=lambda j: abs(math.log(left[j] / left[i])))[:1]
        text = tokenizer.decode(parts) + ("" if ends_word[parts[-1]] else "-")
        words.append((text, min(left[p] for p in parts), parts))
        for p in parts:
            del left[p]
    return words


@torch.no_grad()
def top_words(model, tokenizer, images, k=8):
    """images (B, 3, S, S) -> for each image the k words that the head finds most probable, as
    [(word, probability, ids)]. Probabilities are of a softmax over all tokens: they sum to 1."""
    probabilities = model.class_logits(images).float().softmax(dim=-1)
    probabilities[:, [superclip.PAD, tokenizer.start, tokenizer.end]] = 0  # these are no words
    values, ids = probabilities.topk(min(4 * k, probabilities.shape[1]))
    return [words_of(tokenizer, i, p)[:k] for i, p in zip(ids.tolist(), values.tolist())]


def windows_of(grid, window):
    """All window x window squares of a grid x grid of patches: bool (W, P), True inside."""
    inside = torch.zeros(grid - window + 1, grid - window + 1, grid, grid, dtype=torch.bool)
    for y in range(grid - window + 1):
        for x in range(grid - window + 1):
            inside[y, x, y : y + window, x : x + window] = True
    return inside.flatten(2).flatten(0, 1)


@torch.no_grad()
def word_maps(model, image, words, window, batch_size=64):
    """Where an image (3, S, S) shows each of K words (lists of ids): falls (K, W), the fall of the
    word's log-probability (nats) when each window of patches is left out, and maps (K, grid, grid),
    each patch the mean over the windows that hold it.

    Asked by removal, because attention has mixed the patches by the last layer: the head is linear
    on their mean, so the logit splits exactly into a part of each output token, but those parts
    light up the background as much as the object. A window that is left out is just missing: no
    fill colour to choose."""
    grid = model.visual.grid
    inside = windows_of(grid, window)  # (W, P)
    keep = torch.stack([(~row).nonzero().flatten() for row in inside]).to(device_of(model))
    image = image[None].to(device_of(model))

    def log_probability(keep):
        logits = model.class_logits(
            image.expand(1 if keep is None else len(keep), -1, -1, -1), keep
        )
        log_probs = logits.float().log_softmax(dim=-1)
        return torch.stack([log_probs[:, ids].sum(dim=1) for ids in words], dim=1)  # (B, K)

    without = torch.cat([log_probability(part) for part in keep.split(batch_size)])  # (W, K)
    falls = (log_probability(None) - without).T.cpu()  # (K, W)
    weight = inside.float()
    return falls, (falls @ weight / weight.sum(dim=0)).view(-1, grid, grid)


def localisation(model, pairs, window, limit=200):
    """On the built-in shapes, where every object's place is known: how often the window whose
    removal hurts a word most has its centre on the object that the word describes. Asked of the
    colours and shapes that one object of the scene alone has. Returns (score, chance being the
    share of such windows)."""
    grid, tokenizer = model.visual.grid, pairs.tokenizer
    starts = torch.arange(grid - window + 1)
    centre = (starts + window / 2) / grid  # 0..1 of the image's side
    cy, cx = (c.flatten() for c in torch.meshgrid(centre, centre, indexing="ij"))
    hits, chances = [], []
    for i in tqdm(
        range(min(limit, len(pairs))), desc="localising", delay=1, leave=False, disable=None
    ):
        row = pairs.index[i].tolist()
        scene = json.loads(pairs.read(row, data.JSON)).get("scene") if row[data.JSON] else None
        if scene is None:
            raise InputError(
                "--data wants the built-in shapes: other shards do not say where things are"
            )
        objects = scene["objects"]
        words = [(o[kind], o["box"]) for kind in ("colour", "shape") for o in objects
                 if sum(o[kind] == other[kind] for other in objects) == 1]  # fmt: skip
        if not words:
            continue
        image = data.load_image(pairs.read(row, data.IMAGE), pairs.image_size)
        falls, _ = word_maps(model, image, [tokenizer.encode(word) for word, _ in words], window)
        for fall, (_, (x0, y0, x1, y1)) in zip(falls, words):
            on = (cx >= x0) & (cx <= x1) & (cy >= y0) & (cy <= y1)
            hits.append(float(on[fall.argmax()]))
            chances.append(float(on.double().mean()))
    if not hits:
        raise InputError("no scene has a colour or shape that one object alone has")
    return score(torch.tensor(hits), sum(chances) / len(chances))


# ---- the picture

INK, PAPER, FAINT = (30, 30, 30), (255, 255, 255), (120, 120, 120)
CELL, GAP, HEAD, FOOT = 168, 12, 62, 58  # pixels


def heat(value):
    """-1..1 -> colour and opacity: red where the word loses without the patch, else blue."""
    colour = (200, 20, 30) if value > 0 else (25, 80, 200)
    return (*colour, int(220 * min(1.0, abs(value))))


def draw_words(rows, window, path):
    """rows of (title, image (3, S, S) uint8, words, maps (K, grid, grid)) -> a PNG."""
    font = ImageFont.load_default
    columns = max(len(words) for _, _, words, _ in rows) + 1
    row_height = CELL + 44
    sheet = Image.new(
        "RGB", (GAP + columns * (CELL + GAP), HEAD + len(rows) * row_height + FOOT), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 10), "What the head sees, and where", INK, font(20))
    explanation = (
        f"Colour: fall of the word's log-probability when a window of {window} x {window} patches "
        "is left out, mean over the windows that hold a patch"
    )
    draw.text((GAP, 36), explanation, FAINT, font(13))
    for r, (title, pixels, words, maps) in enumerate(rows):
        y = HEAD + r * row_height
        photo = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((CELL, CELL), Image.BICUBIC)
        sheet.paste(photo, (GAP, y))
        draw.text((GAP, y + CELL + 3), shorten(draw, title, font(13), CELL), INK, font(13))
        grey = photo.convert("L").convert("RGB")
        grey = Image.blend(grey, Image.new("RGB", grey.size, PAPER), 0.55)
        top = float(maps.abs().max()) or 1.0  # one scale for the words of an image: they compare
        draw.text((GAP, y + CELL + 20), f"full colour: {top:.2f} nats", FAINT, font(13))
        for c, ((word, p, _), values) in enumerate(zip(words, maps), start=1):
            x = GAP + c * (CELL + GAP)
            grid = values.shape[-1]
            overlay = Image.new("RGBA", (grid, grid))
            overlay.putdata([heat(v / top) for v in values.flatten().tolist()])
            # a patch stays a square: smoothing would show detail that was not measured
            overlay = overlay.resize((CELL, CELL), Image.NEAREST)
            sheet.paste(Image.alpha_composite(grey.convert("RGBA"), overlay).convert("RGB"), (x, y))
            draw.text((x, y + CELL + 3), shorten(draw, word, font(16), CELL - 60), INK, font(16))
            draw.text((x + CELL, y + CELL + 5), f"{100 * p:.1f} %", FAINT, font(13), anchor="ra")
    y = HEAD + len(rows) * row_height + 8
    for i in range(200):  # the scale
        paper = Image.new("RGBA", (1, 14), (*PAPER, 255))
        paper.alpha_composite(Image.new("RGBA", (1, 14), heat((i - 99.5) / 100)))
        sheet.paste(paper.convert("RGB"), (GAP + i, y))
    legend = "red: the word loses without these patches, its evidence is here; blue: it gains"
    draw.text((GAP + 212, y - 2), legend, FAINT, font(13))
    percent = "percent: the head's probability of the word among all tokens of the vocabulary"
    draw.text((GAP, y + 22), percent, FAINT, font(13))
    sheet.save(path)


def shorten(draw, text, font, width):
    """The text, with its end cut off if it is wider than `width` pixels."""
    while draw.textlength(text, font) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text


# -----------------------------------------------------------------------------
# Commands


def open_model(args):
    model, tokenizer, _ = superclip.load(args.checkpoint, device_name(args.device))
    if getattr(args, "untrained", False):
        torch.manual_seed(0)
        model = superclip.SuperCLIP(model.config).to(device_of(model)).eval()
    return model, tokenizer


def device_name(name):
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name} is not there: {str(error).splitlines()[0]}") from None
    return name


def command_zeroshot(args):
    model, tokenizer = open_model(args)
    size = model.config.image_size
    if args.dataset:
        dataset, classes = torchvision_dataset(args.dataset, args.root, args.download, size)
    elif args.images:
        dataset, classes = class_folders(args.images, size, args.classes)
    else:
        raise InputError("zeroshot wants --images DIR or --dataset NAME")
    templates = TEMPLATES
    if args.templates == "none":
        templates = ("{}",)
    elif args.templates:
        if not Path(args.templates).is_file():
            raise InputError(f"there is no file of templates {args.templates}")
        templates = [t.strip() for t in Path(args.templates).read_text().splitlines() if t.strip()]
        if not templates or any("{}" not in t for t in templates):
            raise InputError(
                f"every line of {args.templates} must hold {{}}, the place of the class name"
            )
    print(f"{len(classes)} classes, prompts: {' | '.join(templates)}")
    result = zeroshot(model, tokenizer, dataset, classes, templates, args.batch_size, args.workers)
    print(line("top-1", result["top1"]))
    if "top5" in result:
        print(line("top-5", result["top5"]))
    if len(classes) <= 30:
        for name, value in result["per_class"].items():
            print(line(f"  {name}", value))
    return {"templates": list(templates), **result}


def command_retrieval(args):
    model, tokenizer = open_model(args)
    pairs = data.Pairs(data.expand(args.data), tokenizer, model.config.image_size, args.captions)
    images, texts, owner = encode_pairs(model, pairs, args.batch_size, args.workers)
    print(f"{len(images):,} images, {len(texts):,} captions")
    result = retrieval(images, texts, owner)
    print_retrieval(result)
    return {"images": len(images), "captions": len(texts), **result}


def command_probe(args):
    model, _ = open_model(args)
    size = model.config.image_size
    if args.dataset:
        (train, classes), (test, _) = (
            torchvision_dataset(args.dataset, args.root, args.download, size, train)
            for train in (True, False)
        )
    elif args.train and args.test:
        (train, classes), (test, test_classes) = (
            class_folders(args.train, size),
            class_folders(args.test, size),
        )
        if classes != test_classes:
            raise InputError(f"{args.train} and {args.test} have different class folders")
    else:
        raise InputError("probe wants --train DIR --test DIR, or --dataset NAME")
    parts = []
    for name, dataset in (("train", train), ("test", test)):
        cache = Path(f"{args.cache}-{name}.pt") if args.cache else None
        stamp = f"{args.checkpoint} {Path(args.checkpoint).stat().st_mtime_ns} {args.untrained} "
        stamp += f"{args.dataset or getattr(args, name)} {len(dataset)}"
        if cache and cache.is_file():
            cached = torch.load(cache, weights_only=True)
            if cached["stamp"] == stamp:  # of the same model and the same images
                parts.append(cached["features"])
                print(f"features from {cache}")
                continue
        parts.append(frozen_features(model, dataset, args.batch_size, args.workers))
        if cache:
            torch.save({"stamp": stamp, "features": parts[-1]}, cache)
    (x, y), (x_test, y_test) = parts
    D = model.config.vision_width
    result = {}
    for name, columns in (
        ("class token", slice(0, D)),
        ("patch mean", slice(D, 2 * D)),
        ("both", slice(0, 2 * D)),
    ):
        value, penalty = probe((x[:, columns], y), (x_test[:, columns], y_test), len(classes))
        result[name] = {**value, "penalty": penalty}
        print(line(f"linear probe {name}", value) + f"   penalty {penalty:g}")
    return result


def command_words(args):
    model, tokenizer = open_model(args)
    if model.head is None:
        raise InputError(f"{args.checkpoint} is plain CLIP (cls_weight 0): it has no word head")
    grid = model.visual.grid
    window = args.window or max(1, round(grid / 4))
    if window >= grid:
        raise InputError(f"--window {window} leaves nothing of {grid} x {grid} patches")
    result = {}
    if args.data:
        pairs = data.Pairs(data.expand(args.data), tokenizer, model.config.image_size)
        result["localisation"] = localisation(model, pairs, window, args.limit)
        print(line("strongest window on it", result["localisation"]))
    files = [
        file
        for path in args.image
        for file in (image_files(path) if Path(path).is_dir() else [Path(path)])
    ]
    if not files and not args.data:
        raise InputError("words wants --image FILE or folder, or --data with the built-in shapes")
    rows = []
    for file in tqdm(files, desc="images", delay=1, leave=False, disable=None):
        try:
            image = data.load_image(file.read_bytes(), model.config.image_size)
        except (OSError, data.BadSample) as error:
            if len(files) == 1:
                raise InputError(f"{file} cannot be read: {error}") from None
            tqdm.write(f"skipped {file}: {error}")
            continue
        words = top_words(model, tokenizer, image[None].to(device_of(model)), args.k)[0]
        print(f"{file}: " + ", ".join(f"{word} {p:.3f}" for word, p, _ in words))
        result[str(file)] = {word: p for word, p, _ in words}
        if args.out:
            _, maps = word_maps(model, image, [ids for _, _, ids in words], window)
            rows.append((file.name, image, words, maps))
    if args.out and rows:
        draw_words(rows, window, args.out)
        print(f"wrote {args.out}: windows of {window} x {window} of the {grid} x {grid} patches")
    return result


def command_export(args):
    model, _ = open_model(args)
    model.save_pretrained(args.out)
    config = Path(args.out).with_suffix(".json")
    print(
        f"wrote {args.out} and {config}. In Python:\n"
        f"  import open_clip\n"
        f"  open_clip.add_model_config({str(config)!r})\n"
        f"  model = open_clip.create_model({config.stem!r}, pretrained={str(args.out)!r})"
    )
    return {}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, function, text):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(function=function)
        sub.add_argument(
            "--checkpoint", required=True, metavar="FILE", help="best.pt or last.pt of train.py"
        )
        sub.add_argument(
            "--device", metavar="NAME", help="cuda or cpu (default: cuda if there is one)"
        )
        sub.add_argument("--json", metavar="FILE", help="write the numbers there")
        return sub

    def images(sub):
        sub.add_argument(
            "--dataset",
            metavar="NAME",
            help="a data set of torchvision: cifar10, cifar100, food101 ...",
        )
        sub.add_argument("--root", default=".", metavar="DIR", help="where it lies")
        sub.add_argument("--download", action="store_true", help="fetch it if it is not there")

    def speed(sub):
        sub.add_argument(
            "--batch_size", type=int, default=128, metavar="IMAGES", help="at a time (default 128)"
        )
        sub.add_argument(
            "--workers", type=int, default=2, metavar="N", help="processes that decode (default 2)"
        )

    sub = command("zeroshot", command_zeroshot, "classify images by the text of their class names")
    sub.add_argument("--images", metavar="DIR", help="a folder of images per class")
    sub.add_argument(
        "--classes", metavar="FILE", help="class names, a line each, in the folders' sorted order"
    )
    sub.add_argument(
        "--templates", metavar="FILE", help="prompts with {}, a line each; none: the bare name"
    )
    images(sub)
    speed(sub)
    sub = command(
        "retrieval", command_retrieval, "find the caption of an image, and the image of a caption"
    )
    sub.add_argument(
        "--data", nargs="+", required=True, metavar="SHARDS", help="tar files, globs or braces"
    )
    sub.add_argument(
        "--captions",
        default="txt",
        metavar="SOURCE",
        help="txt, or json.FIELD: all of a list count",
    )
    speed(sub)
    sub = command("probe", command_probe, "linear classifier on the frozen image tower")
    sub.add_argument("--train", metavar="DIR", help="a folder of images per class")
    sub.add_argument("--test", metavar="DIR", help="the same classes, other images")
    sub.add_argument(
        "--untrained", action="store_true", help="the baseline: the same model with random weights"
    )
    sub.add_argument(
        "--cache", metavar="STEM", help="keep the features in STEM-train.pt and STEM-test.pt"
    )
    images(sub)
    speed(sub)
    sub = command(
        "words", command_words, "the head's top words, and a picture of where each is seen"
    )
    sub.add_argument(
        "--image", nargs="+", default=[], metavar="FILE", help="images, or folders of them"
    )
    sub.add_argument("--k", type=int, default=8, help="words per image (default 8)")
    sub.add_argument("--out", metavar="PNG", help="draw where: a row per image")
    sub.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="patches per side left out at once (default: a quarter)",
    )
    sub.add_argument(
        "--data", nargs="+", metavar="SHARDS", help="built-in shapes: score whether where is right"
    )
    sub.add_argument(
        "--limit", type=int, default=200, metavar="N", help="scenes of --data to use (default 200)"
    )
    sub = command("export", command_export, "write the towers in open_clip's layout")
    sub.add_argument("--out", required=True, metavar="FILE", help=".pt or .safetensors")

    args = parser.parse_args(argv)
    result = args.function(args)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    data.cli(main)
