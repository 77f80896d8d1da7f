"""One run of the study in compare.py: train a model on the CPU, score it, and return the numbers.

A run is a process with one thread, and there are as many at a time as there are cores, because for
models of this size that trains more than one process with all cores does. Its steps are made of
train.py's functions. They differ from train.py's in one thing: images are decoded once, so there is
no crop augmentation.

Axes: B pairs of a batch, N images, C captions of an image or classes, T tokens, S pixels a side, V
vocabulary.
"""

import copy
import json
import os
import random
import time
from types import SimpleNamespace

import torch

import data
import eval as evaluation
import train
from scripts import scenes
from superclip import PAD, PRESETS, SuperCLIP, SuperCLIPConfig

# The options of a run, and their defaults.
RUN = dict(
    data="scenes",  # or flickr
    settings=256,  # that the scenes may have (see scripts/scenes.py)
    batch_size=32,
    group=None,  # pairs that are compared with each other, a part of the batch; None: all
    cls_weight=1.0,  # 0: CLIP
    learning_rate=None,
    samples=48_000,  # seen
    seed=0,
    search=False,  # trained and judged on training scenes alone
    captions="mixed",  # short, long or either
    label_captions=None,  # for the words, if others
    loss="softmax",  # or sigmoid
    patch_dropout=0.0,
    idf=True,
    start=None,  # fine-tuning: samples seen of one half of the concepts, before those of the other
)
PER_LOOK = 20  # pictures of one object for each of the 64 combinations of colour and shape
SHOTS = 2  # of these, the ones that a linear probe learns from: few, so that features matter
HELD_OUT = 1000  # training pairs that a search is judged by
START_RATE = 3.5e-4  # learning rate of a model that is fine-tuned later
ATTRIBUTES = {
    "colour": scenes.COLOURS, "shape": scenes.SHAPES, "cloth": scenes.CLOTHS,
    "pattern": scenes.PATTERNS, "border": scenes.BORDERS,
}  # fmt: skip


# -----------------------------------------------------------------------------
# The data, decoded once


class Table:
    """Decoded pairs: images (N, 3, S, S) uint8, and tokens (N, C, T) of the C captions of each. All
    processes map the same file into memory."""

    def __init__(self, path, part=slice(None)):
        content = torch.load(path, mmap=True, weights_only=True)
        self.images, self.tokens = content["images"][part], content["tokens"][part]
        self.scenes, self.vocab = json.loads(content["scenes"])[part], content["vocab"]

    def half(self, second):
        """A table of those scenes that have one half of the cloths and of the shapes alone."""
        part = slice(4, 8) if second else slice(4)
        cloths, shapes = ({*list(names)[part]} for names in (scenes.CLOTHS, scenes.SHAPES))
        numbers = []
        for i, scene in enumerate(self.scenes):
            if scene["cloth"] in cloths and {o["shape"] for o in scene["objects"]} <= shapes:
                numbers.append(i)
        table = copy.copy(self)
        table.images, table.tokens = self.images[numbers], self.tokens[numbers]
        table.scenes = [self.scenes[i] for i in numbers]
        return table


def write_table(path, shards, tokenizer, captions):
    pairs = data.Pairs(data.expand(shards), tokenizer, scenes.SIZE, captions)
    images, ids = [], []  # ids: of each image a list of captions, which are lists of ids
    for pixels, texts in evaluation.batches(evaluation.ShardImages(pairs), 256, None, path.stem):
        images.append(pixels)
        ids += [[tokenizer.encode(text) for text in of_image] for of_image in texts]
    C = min(map(len, ids))
    length = min(77, 2 + max(len(caption) for captions in ids for caption in captions[:C]))
    tokens = torch.stack([tokenizer.pad(captions[:C], length) for captions in ids]).int()
    drawn = [json.loads(pairs.read(row, data.JSON)).get("scene") for row in pairs.index.tolist()]
    content = {"images": torch.cat(images), "tokens": tokens, "vocab": tokenizer.vocab}
    torch.save({**content, "scenes": json.dumps(drawn)}, path)


def prepare_scenes(folder, settings, **numbers):
    """Draw scenes of so many settings, and decode them into `folder`. numbers: of scenes, train and
    val, if others than make_scenes has."""
    world, some = folder / f"world-{settings}", random.Random(0).sample(scenes.SETTINGS, settings)
    scenes.make_scenes(world, settings=some, **numbers)
    tokenizer = data.Tokenizer.from_file(world / "vocab.tiktoken")
    for part in ("train", "val"):
        path = folder / f"scenes-{settings}-{part}.pt"
        write_table(path, [f"{world}/{part}-*.tar"], tokenizer, ["json.short", "json.long"])


def prepare_flickr(folder, train_shards, val_shards, classes):
    for part, shards in (("train", train_shards), ("val", val_shards)):
        path = folder / f"flickr-256-{part}.pt"
        write_table(path, shards, data.Tokenizer.from_file("clip"), ["json.captions"])
    os.symlink(os.path.abspath(classes), folder / "classes")


def trim(tokens):
    """(B, T) -> the columns up to the longest caption's end token, the largest id of a caption."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1].long()


def read_batch(table, spec, step):
    """-> dict of images (B, 3, S, S), tokens (B, T), label_tokens (B, T'), as train.py loads it."""
    pairs = data.batch_indices(len(table.images), spec["batch_size"], spec["seed"], step)
    samples = torch.tensor([sample for _, sample in pairs])

    def captions(source):
        numbers = range(table.tokens.shape[1])
        if source == "mixed":  # any of an image's captions, drawn as in data.Pairs
            rngs = [random.Random(spec["seed"] << 40 | visit) for visit, _ in pairs]
            return trim(table.tokens[samples, torch.tensor([rng.choice(numbers) for rng in rngs])])
        return trim(table.tokens[samples, ("short", "long").index(source)])

    tokens = captions(spec["captions"])
    labels = captions(spec["label_captions"]) if spec["label_captions"] else tokens
    return {"images": table.images[samples], "tokens": tokens, "label_tokens": labels}


# -----------------------------------------------------------------------------
# Scores


def accuracy(scores, answers):
    """scores (N, C), answers (N,) -> score dict. Ties count as chance would have it."""
    right = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, answers[:, None], True)
    hits = evaluation.recall(evaluation.rank_counts(scores, right), 1)
    return evaluation.score(hits, 1 / scores.shape[1])


def retrieval_scores(model, spec, table):
    """R@k, as the mean of both ways, whose numbers of questions are added."""
    images = torch.cat([model.encode_image(part) for part in table.images.split(256)])
    tokens = table.tokens[:, 1:2] if spec["data"] == "scenes" else table.tokens  # long ones alone
    owner = torch.arange(len(images)).repeat_interleave(tokens.shape[1])
    texts = [model.encode_text(trim(part)) for part in tokens.flatten(0, 1).split(256)]
    a, b = evaluation.retrieval(images, torch.cat(texts), owner).values()
    return {
        k: {"n": a[k]["n"] + b[k]["n"]} | {x: (a[k][x] + b[k][x]) / 2 for x in ("value", "chance")}
        for k in ("R@1", "R@5", "R@10")
    }


def object_scores(model, tokenizer):
    """Zero-shot classification of pictures of one object, and linear probes on the class token."""
    looks = [look for look in scenes.COMBINATIONS for _ in range(PER_LOOK)]
    images = []
    for i, look in enumerate(looks):
        scene = scenes.make_scene(random.Random(f"object {i}"), [look], 1)
        images.append(data.load_image(scenes.jpeg(scene), scenes.SIZE))
    images = torch.stack(images).split(256)
    features = torch.cat([model.encode_image(part) for part in images])
    frozen = torch.cat([model.visual(part)[:, 0] for part in images])
    test, scores = torch.arange(len(looks)) % PER_LOOK >= SHOTS, {}
    for name, classes, labels in (
        ("colour", [*scenes.COLOURS], [c for c, _ in looks]),
        ("shape", [*scenes.SHAPES], [s for _, s in looks]),
        ("colour_shape", [*map(" ".join, scenes.COMBINATIONS)], [*map(" ".join, looks)]),
    ):
        labels = torch.tensor([classes.index(label) for label in labels])
        logits = features @ evaluation.zeroshot_classifier(model, tokenizer, classes).T
        scores[name] = accuracy(logits, labels)
        if name == "colour_shape":
            unseen = torch.tensor([look in scenes.HELD_OUT for look in looks])
            scores["held_out"] = accuracy(logits[unseen], labels[unseen])
        with torch.enable_grad():
            parts = ((frozen[which], labels[which]) for which in (~test, test))
            scores[f"probe {name}"] = evaluation.probe(*parts, len(classes))[0]
    return scores


def photograph_scores(model, tokenizer, table, folder):
    """Of photographs: zero-shot and a linear probe on folders of classes, and how well the head's
    logit of a word ranks the images that have it in a caption (mean average precision over the
    words of at least ten images; chance is the share of images that have the word)."""
    dataset = evaluation.ClassFolders(folder, scenes.SIZE)
    zeroshot = evaluation.zeroshot(model, tokenizer, dataset, dataset.classes)["top1"]
    features, labels = evaluation.frozen_features(model, dataset)
    test = torch.arange(len(labels)) % 2 == 0
    with torch.enable_grad():
        parts = ((features[which], labels[which]) for which in (~test, test))
        probe = evaluation.probe(*parts, len(dataset.classes))[0]
    scores = {"zero-shot": zeroshot, "probe": probe}
    if model.head is not None:
        logits = torch.cat([model.class_logits(part) for part in table.images.split(256)])
        has = torch.zeros_like(logits, dtype=torch.bool)  # (N, V)
        has.scatter_(1, table.tokens.flatten(1).long(), True)
        has[:, [PAD, tokenizer.start, tokenizer.end]] = False
        words = (has.sum(dim=0) >= 10).nonzero().flatten()
        precisions = torch.stack([average_precision(logits[:, w], has[:, w]) for w in words])
        chance = has[:, words].float().mean()
        scores["words, AP"] = evaluation.score(precisions, chance)
    return scores


def average_precision(scores, right):
    """scores (N,), right (N,) bool -> going down the scores, the share of right ones so far, as a
    mean over the right ones."""
    right = right[scores.argsort(descending=True)].double()
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    return (precision * right).sum() / right.sum()


def questions(scene, i):
    """Scene -> {attribute: captions}. The first caption is true, and the others differ from it in
    that one thing. All are worded alike, by i. In "swap" two objects exchange their colours, so
    that both captions have the same words, and a bag of words cannot tell them apart."""
    rng = SimpleNamespace(choice=lambda options: options[i % len(options)])
    first, *others = scene["objects"]
    changes = {}
    for kind, values in ATTRIBUTES.items():
        thing = first if kind in first else scene  # that has the attribute
        changes[kind] = [{kind: value} for value in values if value != thing[kind]]
        if thing is first:
            changes[kind] = [{"objects": [{**first, **new}, *others]} for new in changes[kind]]
    if others:
        second = {**others[0], "colour": first["colour"]}
        changes["swap"] = [{"objects": [{**first, "colour": others[0]["colour"]}, second]}]
    return {
        kind: [scenes.describe({**scene, **change}, rng)[1] for change in ({}, *new)]
        for kind, new in changes.items()
    }


def attribute_scores(model, tokenizer, images, drawn):
    """Which of the captions is true? By the towers, and by the word head where there is one.
    images (N, 3, S, S); drawn: their N scenes."""
    features = model.encode_image(images)
    log_probs = None if model.head is None else model.class_logits(images).log_softmax(dim=1)
    asked, scores = {}, {}
    for i, scene in enumerate(drawn):
        for kind, captions in questions(scene, i).items():
            asked.setdefault(kind, []).append((i, captions))
    for kind, items in asked.items():
        numbers = torch.tensor([i for i, _ in items])  # of the images that are asked about
        texts, first = [text for _, captions in items for text in captions], 0 * numbers
        answers = evaluation.encode_texts(model, tokenizer, texts).unflatten(0, (len(items), -1))
        cosines = torch.einsum("ne,nce->nc", features[numbers], answers)
        scores[f"choose {kind}"] = accuracy(cosines, first)
        if log_probs is not None:  # mean log-probability of the caption's words
            owner = numbers.repeat_interleave(answers.shape[1]).tolist()
            ids = map(tokenizer.encode, texts)
            means = torch.stack([log_probs[i, words].mean() for i, words in zip(owner, ids)])
            scores[f"head {kind}"] = accuracy(means.view(len(items), -1), first)
    return scores


# -----------------------------------------------------------------------------
# One run


def make_model(spec, vocab_size):
    torch.manual_seed(spec["seed"])
    changes = {name: spec[name] for name in ("cls_weight", "loss")}
    model = SuperCLIP(SuperCLIPConfig(**PRESETS["tiny"], vocab_size=vocab_size, **changes))
    if not spec["idf"]:  # every word counts the same
        uniform = torch.ones(vocab_size)
        uniform[[PAD, -2, -1]] = 0
        model.token_weights = lambda: uniform
    if spec["group"]:  # each image is told from the captions of its own group only
        compare = model.compare

        def compare_in_groups(*features):
            groups = zip(*(x.split(spec["group"]) for x in features))
            return torch.stack([compare(*group) for group in groups]).mean()

        model.compare = compare_in_groups
    return model.train()


def optimise(model, table, spec):
    """Train as train.py does. Returns the last losses and the dtype, which is bfloat16 if the CPU
    has units for it, and else float32. (That has not mattered: in eight runs made in both, R@1
    differed by 0.2 points at most, and colour_shape by 1.6.)"""
    device, rate = torch.device("cpu"), spec["learning_rate"]
    dtype = train.pick_dtype(device, scenes=True)
    torch.backends.cuda.enable_flash_sdp(False)  # as train.py does for small images
    autocast = torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = train.make_optimizer(model, rate, scenes.built_in()["weight_decay"])
    B, grid, losses = spec["batch_size"], model.visual.grid, {}
    steps = spec["samples"] // B
    for step in range(steps):
        batch = read_batch(table, spec, step)
        keep = train.patches_to_keep(spec["patch_dropout"], grid, B, spec["seed"], step, device)
        with autocast:
            losses = model(**batch, keep=keep)
        losses["loss"].backward()
        now = train.learning_rate_at(step, rate, steps // 10, steps)
        train.update(model, optimizer, scaler, now, now)
    names = "contrastive_loss", "classification_loss"
    return {name: losses[name].item() for name in names if losses}, dtype


def score_run(model, tokenizer, spec, held_out, folder):
    """What a run is judged by, a dict of score dicts."""
    if spec["start"] is not None:
        halves = {"old": held_out.half(0), "new": held_out.half(1)}
        return {f"R@1 {k}": retrieval_scores(model, spec, t)["R@1"] for k, t in halves.items()}
    scores = retrieval_scores(model, spec, held_out)
    if spec["search"]:
        return scores
    if spec["data"] == "flickr":
        return scores | photograph_scores(model, tokenizer, held_out, folder / "classes")
    few = held_out.images[:500], held_out.scenes[:500]
    return scores | object_scores(model, tokenizer) | attribute_scores(model, tokenizer, *few)


def run(task):
    """Train and score one model. task: a spec, the folder of the tables, and perhaps a file to keep
    the model in."""
    spec, folder, *kept = task
    start, name = time.perf_counter(), f"{spec['data']}-{spec['settings']}"
    if spec["search"]:  # judged by training pairs, so that no rate is chosen by the validation data
        parts = slice(-HELD_OUT), slice(-HELD_OUT, None)
        table, held_out = (Table(folder / f"{name}-train.pt", part) for part in parts)
    else:
        table, held_out = (Table(folder / f"{name}-{part}.pt") for part in ("train", "val"))
    tokenizer = data.Tokenizer(table.vocab)
    model = make_model(spec, tokenizer.vocab_size)
    if spec["start"] is not None:  # fine-tuning: first one half of the concepts, then the other
        before = {**spec, "samples": spec["start"], "learning_rate": START_RATE}
        optimise(model, table.half(0), before)
        table = table.half(1)
    losses, dtype = optimise(model, table, spec)
    model.eval().requires_grad_(False)  # scores are of float32
    for path in kept:
        evaluation.write_checkpoint(path, model, table.vocab, arguments=spec)
    scores = score_run(model, tokenizer, spec, held_out, folder)
    scores = {k: {x: round(s[x], 5) for x in ("value", "chance", "n")} for k, s in scores.items()}
    seconds = round(time.perf_counter() - start, 1)
    return {"spec": spec, "scores": scores, "losses": losses, "seconds": seconds, "dtype": dtype}
