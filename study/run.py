"""One run of the study in compare.py: train a model on the CPU, score it, and return the numbers.

A run is one process with one thread, and there are as many at a time as there are cores: for models
of this size that trains more than one process with all cores does. Images are decoded once, and
there is no crop augmentation, the one thing that differs from a step of train.py, whose functions
these are.
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
from superclip import PAD, SuperCLIP, SuperCLIPConfig

# The options of a run, and their defaults.
RUN = dict(
    data="scenes",  # or flickr
    settings=256,  # of the scenes
    batch_size=32,
    group=None,  # pairs that are contrasted with each other, a part of the batch; None: all
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
PER_LOOK = 20  # single objects drawn for each of the 64 combinations of colour and shape
SHOTS = 2  # the ones that a linear probe learns from: few, so that it needs good features
HELD_OUT = 1000  # training pairs that a search is judged by
START_RATE = 3.5e-4  # of a model that is fine-tuned later
ATTRIBUTES = {
    "colour": scenes.COLOURS, "shape": scenes.SHAPES, "cloth": scenes.CLOTHS,
    "pattern": scenes.PATTERNS, "border": scenes.BORDERS,
}  # fmt: skip


# -----------------------------------------------------------------------------
# The data, decoded once


class Table:
    """Pairs decoded and tokenised: images (N, 3, S, S) uint8, tokens (N, C, T) of the C captions of
    each. All processes map the one file into memory."""

    def __init__(self, path, part=slice(None)):
        content = torch.load(path, mmap=True, weights_only=True)
        self.images, self.tokens = content["images"][part], content["tokens"][part]
        self.scenes, self.vocab = json.loads(content["scenes"])[part], content["vocab"]

    def half(self, second):
        """The scenes with one half of the cloths and of the shapes alone, as a new table."""
        part = slice(4, 8) if second else slice(4)
        cloths, shapes = ({*list(names)[part]} for names in (scenes.CLOTHS, scenes.SHAPES))
        rows = [
            i for i, scene in enumerate(self.scenes)
            if scene["cloth"] in cloths and {o["shape"] for o in scene["objects"]} <= shapes
        ]  # fmt: skip
        table = copy.copy(self)
        table.images, table.tokens = self.images[rows], self.tokens[rows]
        table.scenes = [self.scenes[i] for i in rows]
        return table


def write_table(path, shards, tokenizer, captions):
    pairs = data.Pairs(data.expand(shards), tokenizer, scenes.SIZE, captions)
    images, ids = [], []
    for pixels, texts in evaluation.batches(evaluation.ShardImages(pairs), 256, None, path.stem):
        images.append(pixels)
        ids += [[tokenizer.encode(text) for text in own] for own in texts]
    C = min(map(len, ids))  # captions of an image
    length = min(77, 2 + max(len(row) for own in ids for row in own[:C]))
    tokens = torch.stack([tokenizer.rows(own[:C], length) for own in ids]).int()
    about = [json.loads(pairs.read(row, data.JSON)).get("scene") for row in pairs.index.tolist()]
    content = {"images": torch.cat(images), "tokens": tokens, "vocab": tokenizer.vocab}
    torch.save({**content, "scenes": json.dumps(about)}, path)


def prepare_scenes(folder, settings):
    """Draw a world with so many settings, and decode it into `folder`."""
    chosen = random.Random(0).sample(scenes.SETTINGS, settings)
    world = folder / f"world-{settings}"
    scenes.make_scenes(world, settings=chosen)
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
    """(B, T) -> the columns up to the longest caption's end token, which is the largest id."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1].long()


def read_batch(table, spec, step):
    """-> dict of images (B, 3, S, S), tokens (B, T), label_tokens (B, T'), as train.py loads it."""
    pairs = data.batch_indices(len(table.images), spec["batch_size"], spec["seed"], step)
    samples = torch.tensor([sample for _, sample in pairs])

    def captions(source):
        if source == "mixed":  # any of an image's captions
            numbers = range(table.tokens.shape[1])
            which = [
                random.Random(spec["seed"] << 40 | visit).choice(numbers) for visit, _ in pairs
            ]
            return trim(table.tokens[samples, torch.tensor(which)])
        return trim(table.tokens[samples, ("short", "long").index(source)])

    tokens = captions(spec["captions"])
    labels = captions(spec["label_captions"]) if spec["label_captions"] else tokens
    return {"images": table.images[samples], "tokens": tokens, "label_tokens": labels}


# -----------------------------------------------------------------------------
# Scores


def right(scores, answers):
    """scores (N, C), answers (N,) -> score dict of the share that is right, ties as by chance."""
    own = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, answers[:, None], True)
    hits = evaluation.recall(*evaluation.place(scores, own), 1)
    return evaluation.score(hits, 1 / scores.shape[1])


def retrieval_scores(model, spec, table):
    """R@k, the mean of both ways."""
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
    own = [look for look in scenes.COMBINATIONS for _ in range(PER_LOOK)]
    drawn = [
        scenes.make_scene(random.Random(f"object {i}"), [look], 1) for i, look in enumerate(own)
    ]
    images = torch.stack([data.load_image(scenes.jpeg(scene), scenes.SIZE) for scene in drawn])
    features = torch.cat([model.encode_image(part) for part in images.split(256)])
    frozen = torch.cat([model.visual(part)[:, 0] for part in images.split(256)])
    test, scores = torch.arange(len(own)) % PER_LOOK >= SHOTS, {}
    for name, classes, labels in (
        ("colour", [*scenes.COLOURS], [c for c, _ in own]),
        ("shape", [*scenes.SHAPES], [s for _, s in own]),
        ("colour_shape", [" ".join(p) for p in scenes.COMBINATIONS], [" ".join(p) for p in own]),
    ):
        labels = torch.tensor([classes.index(label) for label in labels])
        logits = features @ evaluation.zeroshot_classifier(model, tokenizer, classes).T
        scores[name] = right(logits, labels)
        if name == "colour_shape":
            unseen = torch.tensor([look in scenes.HELD_OUT for look in own])
            scores["held_out"] = right(logits[unseen], labels[unseen])
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
    """Scene -> {attribute: captions}, the first of which is true: the others differ in that one
    thing. All are worded alike, by i. Swap: two objects exchange their colours, so that both
    captions have the same words, and a bag of words cannot tell."""
    rng = SimpleNamespace(choice=lambda options: options[i % len(options)])
    first, *others = scene["objects"]
    result = {}
    for kind, values in ATTRIBUTES.items():
        inside = kind in first
        own = (first if inside else scene)[kind]
        changed = [{**first, kind: v} if inside else {kind: v} for v in values if v != own]
        result[kind] = [{"objects": [c, *others]} if inside else c for c in changed]
    if others:
        exchanged = [
            {**first, "colour": others[0]["colour"]},
            {**others[0], "colour": first["colour"]},
        ]
        result["swap"] = [{"objects": exchanged}]
    return {
        kind: [scenes.describe({**scene, **change}, rng)[1] for change in ({}, *changes)]
        for kind, changes in result.items()
    }


def attribute_scores(model, tokenizer, images, about):
    """Which of the captions is true? By the towers, and by the word head where there is one."""
    features = model.encode_image(images)
    log_probs = None if model.head is None else model.class_logits(images).log_softmax(dim=1)
    asked, scores = {}, {}
    for i, scene in enumerate(about):
        for kind, captions in questions(scene, i).items():
            asked.setdefault(kind, []).append((i, captions))
    for kind, items in asked.items():
        texts = [text for _, captions in items for text in captions]
        rows, true = torch.tensor([i for i, _ in items]), torch.zeros(len(items), dtype=torch.long)
        answers = evaluation.encode_texts(model, tokenizer, texts).unflatten(0, (len(items), -1))
        scores[f"choose {kind}"] = right(torch.einsum("ne,nce->nc", features[rows], answers), true)
        if log_probs is not None:  # mean log-probability of the caption's words
            owners = rows.repeat_interleave(answers.shape[1]).tolist()
            words = zip(owners, map(tokenizer.encode, texts))
            means = torch.stack([log_probs[i, w].mean() for i, w in words])
            scores[f"head {kind}"] = right(means.view(len(items), -1), true)
    return scores


# -----------------------------------------------------------------------------
# One run


def make_model(spec, vocab_size):
    torch.manual_seed(spec["seed"])
    changes = {name: spec[name] for name in ("cls_weight", "loss")}
    model = SuperCLIP(SuperCLIPConfig.preset("tiny", vocab_size=vocab_size, **changes))
    if not spec["idf"]:  # every word counts the same
        uniform = torch.ones(vocab_size)
        uniform[[PAD, -2, -1]] = 0
        model.token_weights = lambda: uniform
    if spec["group"]:  # each image is told from the captions of its own group only
        pair_loss = model.pair_loss

        def loss_of_groups(images, texts, scale, bias, rows):  # rows: all, in one process
            groups = zip(images.split(spec["group"]), texts.split(spec["group"]), strict=True)
            return torch.stack([pair_loss(*group, scale, bias) for group in groups]).mean()

        model.pair_loss = loss_of_groups
    return model.train()


def optimise(model, table, spec):
    """Train as train.py does. Returns the last losses and the dtype, which is bfloat16 if the CPU
    has units for it, and else float32. (That has not mattered: in eight runs made in both, R@1
    differed by 0.2 points at most, and colour_shape by 1.6.)"""
    machine = SimpleNamespace(device="cpu", dtype=None, train_data=scenes.TRAIN_DATA)
    _, _, device, dtype = train.set_up(machine)
    torch.backends.cuda.enable_flash_sdp(False)  # as train.py does for small images
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    args = SimpleNamespace(**spec, weight_decay=scenes.built_in()["weight_decay"])
    optimizer, towers = train.make_optimizer(model, args), train.Towers(model)
    steps, patches, everything = (
        spec["samples"] // spec["batch_size"],
        model.visual.grid**2,
        slice(None),
    )
    losses = {}
    for step in range(steps):
        parts = [read_batch(table, spec, step)]
        keep = train.patches_to_keep(args, step, patches, everything, device)
        losses = train.forward_backward(towers, model, parts, keep, everything, autocast, scaler)
        rate = train.learning_rate_at(step, spec["learning_rate"], steps // 10, steps)
        train.update(model, optimizer, scaler, rate, rate)
    return {name: float(loss) for name, loss in losses.items()}, str(dtype).removeprefix("torch.")


def score_run(model, tokenizer, spec, held_out, folder):
    """What a run is judged by -> dict of score dicts."""
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
    """Train and score one model. task: a spec, and the folder of the tables."""
    spec, folder = task
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
    scores = score_run(model, tokenizer, spec, held_out, folder)
    scores = {k: {x: round(s[x], 5) for x in ("value", "chance", "n")} for k, s in scores.items()}
    seconds = round(time.perf_counter() - start, 1)
    return {"spec": spec, "scores": scores, "losses": losses, "seconds": seconds, "dtype": dtype}
