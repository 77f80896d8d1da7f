"""One run of the study in small_batch.py: a model is trained on the CPU, scored, and written down.

It is one process with one thread, as many at a time as there are cores: for models of this size
that trains more than one process with all cores does. Images are decoded once, and there is no crop
augmentation, the one thing that differs from a step of train.py, whose functions these are.
"""

import json
import os
import platform
import random
import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import eval as evaluation
import superclip
import train
from scripts import shapes
from scripts.vocab import find_tokenizer

# What there is to say of a run, and what it is if nothing is said.
RUN = dict(
    data="shapes",  # or flickr
    batch_size=32,
    group=None,  # pairs that are contrasted with each other, a part of the batch; None: all
    cls_weight=1.0,  # 0: CLIP
    learning_rate=1e-3,
    samples=24_576,  # seen
    seed=0,
    split="val",  # search: trained and judged on training scenes alone
    captions="mixed",  # short, long or either
    label_captions=None,  # for the words, if others
    loss="softmax",  # or sigmoid
    patch_dropout=0.0,
    idf=True,
)
PER_CLASS = 20  # single objects drawn for each of the 64 pairs of colour and shape
KINDS = {  # attribute -> its values, one of which is true
    "colour": list(shapes.COLOURS), "shape": list(shapes.SHAPES), "size": list(shapes.SIZES),
    "texture": list(shapes.TEXTURES), "background": list(shapes.BACKGROUNDS),
    "position": [f"{r} {c}".strip() or "center" for r in shapes.ROWS for c in shapes.COLUMNS],
    "count": ["one shape", "two shapes", "three shapes"],
    "relation": ["left of", "right of", "above", "below"],
}  # fmt: skip
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


# -----------------------------------------------------------------------------
# What is asked of a model


def questions(scene, i):
    """Scene -> {kind: captions}, the first of which is true: the others differ in that one thing.
    All are worded alike, by i."""
    rng = SimpleNamespace(choice=lambda options: options[i % len(options)])
    first, *others = scene["objects"]
    _, true = shapes.describe(scene, rng)
    result = {}
    for kind in ("colour", "shape", "size", "texture", "position", "background"):
        changed = [
            {**scene, "background": value} if kind == "background"
            else {**scene, "objects": [{**first, kind: value}, *others]}
            for value in KINDS[kind] if value != (first if kind in first else scene)[kind]
        ]  # fmt: skip
        result[kind] = [true, *(shapes.describe(c, rng)[1] for c in changed)]
    if others:
        del result["position"]  # the relation would tell it
        opposite = {**scene, "relation": OPPOSITE[scene["relation"]]}
        result["relation"] = [true, shapes.describe(opposite, rng)[1]]
        names = [f"a {o['colour']} {o['shape']}" for o in scene["objects"]]
        a, b = (name.replace("a orange", "an orange") for name in names[:2])
        # the same words in another order: a bag of words cannot tell
        result["swap"] = [f"{x} {scene['relation']} {y}" for x, y in ((a, b), (b, a))]
    own = KINDS["count"][len(scene["objects"]) - 1]
    result["count"] = [true, *(true.replace(own, c) for c in KINDS["count"] if c != own)]
    return result


def right(scores, answers):
    """scores (N, C), answers (N,) -> score dict of the share that is right, ties as by chance."""
    own = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, answers[:, None], True)
    hits = evaluation.recall(*evaluation.place(scores, own), 1)
    return evaluation.score(hits, 1 / scores.shape[1])


def attributes(model, tokenizer, images, scenes):
    """Accuracy by kind of attribute: which of the captions is true? By the towers, and by the word
    head where there is one."""
    features = model.encode_image(images)
    log_probs = None if model.head is None else model.class_logits(images).float().log_softmax(1)
    asked = {}
    for i, scene in enumerate(scenes):
        for kind, captions in questions(scene, i).items():
            asked.setdefault(kind, []).append((i, captions))
    result = {}
    for kind, items in asked.items():
        texts = [text for _, captions in items for text in captions]
        rows = torch.tensor([i for i, _ in items])
        true = torch.zeros(len(items), dtype=torch.long)
        answers = evaluation.encode_texts(model, tokenizer, texts).view(len(items), -1, 128)
        scores = torch.einsum("ne,nce->nc", features[rows].float(), answers.float())
        result[f"choose {kind}"] = right(scores, true)
        if log_probs is not None:  # mean log-probability of the caption's words: each as often as
            words = [tokenizer.encode(text) for text in texts]  # it comes, else short ones win
            owners = rows.repeat_interleave(scores.shape[1]).tolist()
            pairs = zip(owners, words, strict=True)
            scores = torch.stack([log_probs[i, w].mean() for i, w in pairs])
            result[f"head {kind}"] = right(scores.view(len(items), -1), true)
    return result


@torch.no_grad()
def evaluate(model, tokenizer, spec, table, cache):
    """All scores of a trained model, as evaluation.score gives them. `table`: held-out pairs."""
    images = torch.cat([model.encode_image(part) for part in table.images.split(256)])
    tokens = table.index[:, 1:2] if spec["data"] == "shapes" else table.index  # long ones alone
    owner = torch.arange(len(images)).repeat_interleave(tokens.shape[1])
    texts = [model.encode_text(trim(part)) for part in tokens.flatten(0, 1).split(256)]
    scores = {}
    for way, part in evaluation.retrieval(images, torch.cat(texts), owner).items():
        scores |= {f"{way} {name}": s for name, s in part.items() if name != "median_rank"}
    for k in ("R@1", "R@5", "R@10"):
        a, b = scores[f"image_to_text {k}"], scores[f"text_to_image {k}"]
        scores[k] = {key: (a[key] + b[key]) / 2 for key in ("value", "chance")}
        scores[k]["n"] = a["n"] + b["n"]
    if spec["data"] != "shapes" or spec["split"] == "search":
        return scores
    singles = torch.load(cache / "singles.pt", mmap=True, weights_only=True)
    features = torch.cat([model.encode_image(part) for part in singles.split(256)]).float()
    own = [pair for pair in shapes.COMBINATIONS for _ in range(PER_CLASS)]
    for name, classes, labels in (
        ("colour", list(shapes.COLOURS), [c for c, _ in own]),
        ("shape", list(shapes.SHAPES), [s for _, s in own]),
        ("both", [" ".join(p) for p in shapes.COMBINATIONS], [" ".join(p) for p in own]),
    ):
        prompts = evaluation.TEMPLATES
        classifier = evaluation.zeroshot_classifier(model, tokenizer, classes, prompts).float()
        logits = features @ classifier.T
        labels = torch.tensor([classes.index(label) for label in labels])
        scores[name] = right(logits, labels)
        if name == "both":
            unseen = torch.tensor([pair in shapes.HELD_OUT for pair in own])
            scores["both, unseen"] = right(logits[unseen], labels[unseen])
    return scores | attributes(model, tokenizer, table.images[:300], table.scenes[:300])


# -----------------------------------------------------------------------------
# One run


class Table:
    """Pairs decoded and tokenised once: images (N, 3, S, S) uint8, index (N, C, T) the C captions
    of each as tokens. All processes map the one file into memory."""

    def __init__(self, path, part=slice(None)):
        content = torch.load(path, mmap=True, weights_only=True)
        self.images, self.index = content["images"][part], content["tokens"][part]
        self.scenes = json.loads(content["scenes"])[part]
        self.vocab = content["vocab"]

    def __len__(self):
        return len(self.images)


def write_table(path, shards, tokenizer, image_size, jobs):
    pairs = data.Pairs(data.expand(shards), tokenizer, image_size, ["json.captions"])
    images, ids = [], []
    dataset = evaluation.ShardImages(pairs)
    for pixels, texts in evaluation.batches(dataset, 256, jobs, f"decoding {path.stem}"):
        images.append(pixels)
        ids += [[tokenizer.encode(text) for text in own] for own in texts]
    C = min(map(len, ids))  # captions of an image
    length = min(77, 2 + max(len(row) for own in ids for row in own[:C]))
    tokens = torch.stack([tokenizer.rows(own[:C], length) for own in ids]).int()
    scenes = [json.loads(pairs.read(row, data.JSON)).get("scene") for row in pairs.index.tolist()]
    content = {"images": torch.cat(images), "tokens": tokens, "vocab": tokenizer.vocab}
    torch.save({**content, "scenes": json.dumps(scenes)}, path)


def shapes_tokenizer():
    if not Path("shapes").exists():
        shapes.make_shapes("shapes")
    return data.Tokenizer.from_file("shapes/vocab.tiktoken")


def prepare(args, cache):
    """Everything that runs read, in the folder `cache`."""
    tokenizer = shapes_tokenizer()
    for name in ("train", "val"):
        path = cache / f"shapes-{name}.pt"
        write_table(path, [f"shapes/{name}-*.tar"], tokenizer, 72, args.jobs)
    singles = []
    for pair in shapes.COMBINATIONS:
        for i in range(PER_CLASS):
            scene = shapes.make_scene(random.Random(f"single {pair} {i}"), count=1, first=pair)
            singles.append(data.load_image(shapes.jpeg(scene, 72), 72))
    torch.save(torch.stack(singles), cache / "singles.pt")
    if args.flickr and "flickr" in args.only:
        tokenizer = find_tokenizer("clip")
        for name, shards in (("train", args.flickr), ("val", args.flickr_val)):
            write_table(cache / f"flickr-{name}.pt", shards, tokenizer, 72, args.jobs)


def trim(tokens):
    """(B, T) -> the columns up to the longest caption's end token, which is the largest id."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1].long()


def read_batch(table, spec, step):
    """-> dict of images (B, 3, S, S), tokens (B, T), label_tokens (B, T'), as train.py loads it."""
    pairs = data.batch_indices(len(table), spec["batch_size"], spec["seed"], step)
    samples = torch.tensor([sample for _, sample in pairs])

    def captions(source):
        if source == "mixed":  # any of an image's captions
            numbers = range(table.index.shape[1])
            which = [random.Random(spec["seed"] << 40 | draw).choice(numbers) for draw, _ in pairs]
            return trim(table.index[samples, torch.tensor(which)])
        return trim(table.index[samples, ("short", "long").index(source)])

    tokens = captions(spec["captions"])
    labels = captions(spec["label_captions"]) if spec["label_captions"] else tokens
    return {"images": table.images[samples], "tokens": tokens, "label_tokens": labels}


def make_model(spec, vocab_size):
    torch.manual_seed(spec["seed"])
    model = superclip.SuperCLIP(superclip.SuperCLIPConfig.preset(
        "tiny", vocab_size=vocab_size, cls_weight=spec["cls_weight"], loss=spec["loss"]
    ))  # fmt: skip
    if not spec["idf"]:  # every word counts the same
        uniform = torch.ones(vocab_size)
        uniform[[superclip.PAD, -2, -1]] = 0
        model.token_weights = lambda: uniform
    if spec["group"]:  # each image is told from the captions of its own group only
        pair_loss = model.pair_loss

        def loss_of_groups(images, texts, scale, bias, rows):  # rows: all, in one process
            groups = zip(images.split(spec["group"]), texts.split(spec["group"]), strict=True)
            return torch.stack([pair_loss(*group, scale, bias) for group in groups]).mean()

        model.pair_loss = loss_of_groups
    return model.train()


def set_up():
    """-> device, dtype, autocast, scaler: bf16 if the CPU has units for it, as a bare train.py."""
    machine = SimpleNamespace(device="cpu", dtype=None, train_data=shapes.BUILT_IN["train_data"])
    _, _, device, dtype = train.set_up(machine)
    torch.backends.cuda.enable_flash_sdp(False)  # as train.py does for small images
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    return device, dtype, autocast, torch.amp.GradScaler("cpu", enabled=False)


def run(task):
    """Train and score one model; write its JSON whole or not at all."""
    spec, cache, path = task
    start = time.perf_counter()
    device, dtype, autocast, scaler = set_up()
    search = spec["split"] == "search"  # it holds out a thousand of the training scenes
    table = Table(cache / f"{spec['data']}-train.pt", slice(-1000) if search else slice(None))
    tokenizer = data.Tokenizer(table.vocab)
    model = make_model(spec, tokenizer.vocab_size)
    settings = SimpleNamespace(**spec, weight_decay=shapes.BUILT_IN["weight_decay"])
    optimizer, towers = train.make_optimizer(model, settings), train.Towers(model)
    steps, patches = spec["samples"] // spec["batch_size"], model.visual.grid**2
    everything = slice(None)
    for step in range(steps):
        parts = [read_batch(table, spec, step)]
        keep = train.patches_to_keep(settings, step, patches, everything, device)
        losses = train.forward_backward(towers, model, parts, keep, everything, autocast, scaler)
        rate = train.learning_rate_at(step, spec["learning_rate"], steps // 10, steps)
        train.update(model, optimizer, scaler, rate)
    trained = time.perf_counter() - start
    name = "train" if search else "val"
    held_out = Table(cache / f"{spec['data']}-{name}.pt", slice(-1000 if search else 0, None))
    # in fp32: bfloat16 makes ties of captions that differ in one word
    scores = evaluate(model.eval(), tokenizer, spec, held_out, cache)
    result = {
        "arguments": spec, "steps": steps, "samples_seen": steps * spec["batch_size"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_seconds": trained, "seconds": time.perf_counter() - start,
        "losses": {k: float(v) for k, v in losses.items()}, "scores": scores,
        **provenance(), "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    write_json(path, result)
    return spec, result


def provenance():
    """What a reader of a result needs to believe it."""
    info = Path("/proc/cpuinfo")  # on Linux; platform is vague there
    names = re.findall("model name\\s*: (.*)", info.read_text()) if info.exists() else []
    machine = f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores"
    describe, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    git = subprocess.run(describe, cwd=here, capture_output=True, text=True)
    return {
        "commit": git.stdout.strip(),
        "torch": torch.__version__,
        "machine": machine,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def write_json(path, content):
    """Whole or not at all, with five digits."""
    content = json.loads(json.dumps(content), parse_float=lambda x: float(f"{float(x):.5g}"))
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
