"""The paper's claims, reproduced small: CLIP against SuperCLIP on the built-in shapes.

    python scripts/small_batch.py --quick        the effect, in five minutes
    python scripts/small_batch.py                everything, about an hour on two cores
    python scripts/small_batch.py report         figure and tables again, from results/

Parts, for --only: search (learning rates of the other parts), negatives (how many pairs a pair is
told from), main (batch sizes), captions (mixes), ablations, flickr (photographs, if --flickr names
shards of them), cost. A run is a JSON file in out_dir/runs with what is needed to believe it; what
is there is not run again, so a study that was stopped goes on. CLIP is --cls_weight 0, and all runs
of a table have seen the same number of samples.

Each run is one process with one thread, as many at a time as there are cores: for models of this
size that trains more than one process with all cores does. Images are decoded once, and there is
no crop augmentation, the one thing that differs from a step of train.py, whose functions these are.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import eval as evaluation
import superclip
import train
from scripts import shapes

PARTS = ("search", "negatives", "main", "captions", "ablations", "flickr", "cost")
METHODS = {"CLIP": 0.0, "SuperCLIP": 1.0}  # name -> cls_weight
RUN = dict(data="shapes", batch_size=32, cls_weight=1.0, learning_rate=1e-3, samples=24_576, seed=0,
           split="val", captions="mixed", label_captions=None, loss="softmax", patch_dropout=0.0,
           idf=True, group=None)  # fmt: skip
SEARCH = dict(split="search", seed=100)  # a seed and scenes that no other run is judged by
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
    hits = evaluation._recall(*evaluation._first_hit(scores, own), 1)
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
        if log_probs is not None:  # sum of the log-probabilities of the caption's set of words
            words = [sorted(set(tokenizer.encode(text))) for text in texts]
            owners = rows.repeat_interleave(scores.shape[1]).tolist()
            pairs = zip(owners, words, strict=True)
            scores = torch.stack([log_probs[i, w].sum() for i, w in pairs])
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
        labels = torch.tensor([classes.index(label) for label in labels])
        scores[name] = right(features @ classifier.T, labels)
    unseen = torch.tensor([pair in shapes.HELD_OUT for pair in own])
    scores["both, unseen"] = right((features @ classifier.T)[unseen], labels[unseen])
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
    pairs = data.Pairs(data.expand(shards), tokenizer, image_size, "json.captions")
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
        write_table(path, f"shapes/{name}-*.tar", tokenizer, 72, args.jobs)
    singles = []
    for pair in shapes.COMBINATIONS:
        for i in range(PER_CLASS):
            scene = shapes.make_scene(random.Random(f"single {pair} {i}"), count=1, first=pair)
            singles.append(data.load_image(shapes.jpeg(scene, 72), 72))
    torch.save(torch.stack(singles), cache / "singles.pt")
    if args.flickr and "flickr" in args.only:
        tokenizer = data.find_tokenizer("clip")
        for name, shards in (("train", args.flickr), ("val", args.flickr_val)):
            write_table(cache / f"flickr-{name}.pt", shards, tokenizer, 72, args.jobs)


def trim(tokens):
    """(B, T) -> the columns up to the longest caption's end token, which is the largest id."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1].long()


def read_batch(table, spec, step):
    """-> images (B, 3, S, S), tokens (B, T), label_tokens (B, T'), as train.py would draw them."""
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
    return table.images[samples], tokens, labels


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

        def loss_of_groups(*features):
            groups = zip(*(f.split(spec["group"]) for f in features), strict=True)
            return torch.stack([pair_loss(*group) for group in groups]).mean()

        model.pair_loss = loss_of_groups
    return model.train()


def set_up():
    """-> device, dtype, autocast, scaler: bf16 if the CPU has units for it, as a bare train.py."""
    machine = SimpleNamespace(device="cpu", dtype=None, train_data=train.BUILT_IN["train_data"])
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
    settings = SimpleNamespace(**spec, weight_decay=train.BUILT_IN["weight_decay"])
    optimizer = train.make_optimizer(model, settings, device)
    steps, patches = spec["samples"] // spec["batch_size"], model.visual.grid**2
    for step in range(steps):
        batch = read_batch(table, spec, step)
        keep = train.patches_to_keep(settings, step, patches, 0, 1, device)
        optimizer.zero_grad(set_to_none=True)
        losses = train.forward_backward(model, *batch, keep, None, autocast, scaler)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate_at(step, spec["learning_rate"], steps // 10, steps)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
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
    git = ["git", "describe", "--always", "--dirty"]
    here = Path(__file__).parent
    commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")  # on Linux; platform is vague there
    names = re.findall("model name\\s*: (.*)", info.read_text()) if info.exists() else []
    machine = f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores"
    date = time.strftime("%Y-%m-%d %H:%M")
    return {"commit": commit, "torch": torch.__version__, "machine": machine, "date": date}


def write_json(path, content):
    """Whole or not at all, with five digits."""
    content = json.loads(json.dumps(content), parse_float=lambda x: float(f"{float(x):.5g}"))
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


# -----------------------------------------------------------------------------
# The plan: which runs


def path_of(spec, args):
    """Two parts that ask for the same run share it: its file is named by what it is."""
    always = ("data", "batch_size", "cls_weight", "learning_rate", "samples", "seed")
    parts = [str(spec["data"]), *(f"{k}={spec[k]:g}" for k in always[1:])]
    parts += [f"{k}={v}" for k, v in spec.items() if k not in always and v != RUN[k]]
    return args.out_dir / "runs" / ("_".join(parts) + ".json")


def variants(args, part):
    """{row of a part's table: what its runs have in common}, but for the learning rate."""

    def pair(label, **changes):  # both methods
        return {f"{name}, {label}": dict(cls_weight=w, **changes) for name, w in METHODS.items()}

    if part == "negatives":
        rows = [pair(f"groups of {g}", batch_size=64, group=g) for g in args.groups if g < 64]
        rows.append(pair("all 64", batch_size=64))
    elif part == "main":
        rows = [pair(f"batch {B}", batch_size=B) for B in args.batch_sizes]
    elif part == "captions":
        rows = [pair(mix, captions=mix) for mix in ("short", "long", "mixed")]
        rows.append({"SuperCLIP, dual": dict(captions="short", label_captions="long")})
    elif part == "ablations":
        rows = [{"SuperCLIP": {}, "SuperCLIP without IDF": dict(idf=False)}]
        rows += [{f"lambda {w:g}": dict(cls_weight=w)} for w in (0.0, 0.25, 0.5, 2.0)]
        rows += [pair("sigmoid", loss="sigmoid"), pair("patch dropout .5", patch_dropout=0.5)]
    elif part == "flickr":
        rows = [pair(f"batch {B}", data="flickr", batch_size=B, samples=args.flickr_samples)
                for B in (32, 128)]  # fmt: skip
    else:
        rows = []
    start = {**RUN, "samples": args.samples}
    return {name: {**start, **changes} for row in rows for name, changes in row.items()}


def search_specs(args, spec):
    """The learning rates to try for a row. The range is the same for all rows of a batch size, and
    goes on for as long as its best is at an end. IDF and lambda are not searched apart."""
    base = 1e-3 * math.sqrt(spec["batch_size"] / 32)
    tuned = {**spec, **SEARCH, "samples": spec["samples"] // 2, "idf": True,
             "cls_weight": 1.0 if spec["cls_weight"] else 0.0}  # fmt: skip
    factors = [0.25, 0.5, 1]
    while True:
        specs = [{**tuned, "learning_rate": round(f * base, 6)} for f in sorted(factors)]
        found = [value_of(s, args, "R@1") for s in specs]
        best = None if None in found else found.index(max(found))
        if best == 0 and min(factors) > 0.1:
            factors.append(min(factors) / 2)
        elif best == len(found) - 1 and max(factors) < 4:
            factors.append(max(factors) * 2)
        else:
            return specs


def rate(args, spec):
    """The learning rate that the search has found for a row; without one a rule of thumb."""
    found = [(v, s["learning_rate"]) for s in search_specs(args, spec)
             if (v := value_of(s, args, "R@1")) is not None]  # fmt: skip
    return max(found)[1] if found else round(3e-4 * math.sqrt(spec["batch_size"] / 32), 6)


def searches(args, parts):
    """[(row, its search runs)] of parts. Rows with the same search appear once."""
    rows = {}
    for part in parts:
        for name, spec in variants(args, part).items():
            specs = search_specs(args, spec)
            rows.setdefault(path_of(specs[0], args), (f"{part}: {name}", specs))
    return list(rows.values())


def plan(args, part):
    """[(row of the table, its runs)] of a part."""
    rows = []
    for name, spec in variants(args, part).items():
        spec["learning_rate"] = rate(args, spec)
        seeds = min(2, args.seeds) if part in ("captions", "ablations") else args.seeds
        rows.append((name, [{**spec, "seed": seed} for seed in range(seeds)]))
    return rows


def load(spec, args):
    path = path_of(spec, args)
    return json.loads(path.read_text()) if path.exists() else None


def value_of(spec, args, metric):
    result = load(spec, args)
    return result and result["scores"][metric]["value"]


def missing(args, rows):
    """{file: run} of those runs of rows that are still to do."""
    specs = {path_of(spec, args): spec for _, specs in rows for spec in specs}
    return {path: spec for path, spec in specs.items() if not path.exists()}


def study(args):
    """All runs that are missing. The search comes first: it fixes the others' learning rates."""
    (args.out_dir / "runs").mkdir(parents=True, exist_ok=True)

    def rounds():  # what a search finds decides where it goes on
        while "search" in args.only and (todo := missing(args, searches(args, args.only))):
            yield "search", todo
        for part in args.only:
            if todo := missing(args, plan(args, part)):
                yield part, todo

    if next(rounds(), None) is None:
        return
    with tempfile.TemporaryDirectory() as cache:
        prepare(args, Path(cache))
        # spawn: to fork a process that has threads may hang
        context = torch.multiprocessing.get_context("spawn")
        with context.Pool(args.jobs, torch.set_num_threads, (1,)) as pool:
            for part, todo in rounds():
                total = sum(spec["samples"] for spec in todo.values())
                tasks = [(spec, Path(cache), path) for path, spec in todo.items()]
                bar = tqdm(total=total, desc=part, unit="sample", unit_scale=True)
                for spec, result in pool.imap_unordered(run, tasks):
                    bar.update(spec["samples"])
                    scores = result["scores"]
                    told = {k: scores[k]["value"] for k in ("R@1", "both") if k in scores}
                    told = ", ".join(f"{k} {100 * v:.1f} %" for k, v in told.items())
                    tqdm.write(f"{path_of(spec, args).stem}: {told}, {result['seconds']:.0f} s")
                bar.close()
            pool.close()
            pool.join()


# -----------------------------------------------------------------------------
# Cost


def flops_of(call):
    """-> (all, those of matrices with weights: attention's products left out)."""
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    return counter.get_total_flops(), sum(n for op, n in counts.items() if "bmm" not in str(op))


def step_seconds(config, batch_size, pairs):
    """Least seconds of forward and backward, without the head and with it, taken in turn: the
    least, since whatever else runs on the machine only adds."""
    _, _, autocast, scaler = set_up()
    torch.backends.cuda.enable_flash_sdp(config.image_size // config.patch_size >= 10)
    models = [superclip.SuperCLIP(replace(config, cls_weight=w)).train() for w in METHODS.values()]
    images = torch.randint(256, (batch_size, 3, config.image_size, config.image_size)).byte()
    tokens = torch.randint(1, config.vocab_size - 1, (batch_size, 32))
    tokens[:, -1] = config.vocab_size - 1
    times = [[], []]
    for _ in tqdm(range(pairs), desc=f"timing {config.vision_width} wide", leave=False):
        for model, own in zip(models, times, strict=True):
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            train.forward_backward(model, images, tokens, tokens, None, None, autocast, scaler)
            own.append(time.perf_counter() - start)
    return [min(own) for own in times]


def cost(args):
    """Parameters, forward FLOPs of a pair, and time of a step, with the head and without it."""
    result = {**provenance(), "models": {}}
    tiny_vocab = shapes_tokenizer().vocab_size
    for name, batch_size, pairs in (("tiny", 32, 50), ("ViT-B-16", 4, 8), ("ViT-L-16", 0, 0)):
        vocab = tiny_vocab if name == "tiny" else 49408
        config = superclip.SuperCLIPConfig.preset(name, vocab_size=vocab)
        with torch.device("meta"):  # shapes alone: nothing is computed
            model = superclip.SuperCLIP(config)
            image = torch.zeros(1, 3, config.image_size, config.image_size)
            text = torch.zeros(1, config.context_length, dtype=torch.long)
            towers, linear = flops_of(lambda m=model, i=image, t=text: m.encode_pairs(i, t))
            head, _ = flops_of(lambda m=model, c=config: m.head(torch.zeros(1, 2, c.vision_width)))
        result["models"][name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "head_parameters": sum(p.numel() for p in model.head.parameters()),
            "width": config.vision_width, "vocabulary": vocab, "head_flops": head,
            "tower_flops": towers, "tower_flops_without_attention_products": linear,
            "batch_size": batch_size,
            "step_seconds": step_seconds(config, batch_size, pairs) if pairs else None,
        }  # fmt: skip
    write_json(args.out_dir / "cost.json", result)


# -----------------------------------------------------------------------------
# Report

COLUMNS = {  # part -> metrics of its table
    "negatives": ("R@1", "R@5", "R@10", "both", "both, unseen", "colour", "shape"),
    "main": ("R@1", "R@5", "R@10", "both", "both, unseen", "colour", "shape"),
    "captions": ("R@1", "R@5", "both", "colour", "shape"),
    "ablations": ("R@1", "R@5", "both", "colour", "shape"),
    "flickr": ("R@1", "R@5", "R@10", "image_to_text R@1", "text_to_image R@1"),
}
ABOUT = {
    "negatives": "How many captions an image is told from, at batch 64: the contrastive loss "
    "within groups of so many pairs, everything else alike, so that all rows have the same "
    "updates. R@k: mean of both ways among the validation scenes with their long captions. Both: "
    "zero-shot over the 64 pairs of colour and shape; unseen: the 8 of them that no training "
    "scene shows.",
    "main": "Batch sizes, at the same samples seen: the smaller the batch, the more updates.",
    "captions": "Captions at batch 32. Dual: contrastive loss on the short, labels from the long.",
    "ablations": "Ablations at batch 32. IDF and lambda are at SuperCLIP's learning rate.",
    "flickr": "Photographs of Flickr8k, 72 pixels, CLIP's vocabulary, all captions of the dev set.",
}


def percent(values, signed=False):
    """[shares] -> mean +- standard deviation in percent."""
    text = f"{100 * statistics.mean(values):{'+' if signed else ''}.1f}"
    return text + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table_of(args, part):
    """A part's table in Markdown, a list of lines; [] if nothing of it was run."""
    metrics, lines, before, all_results = COLUMNS[part], [], None, []
    for name, specs in plan(args, part):
        results = [r for spec in specs if (r := load(spec, args))]
        if not results:
            continue
        all_results += results
        scores = [[r["scores"][m]["value"] for r in results] for m in metrics]
        lines.append([name, len(results), f"{specs[0]['learning_rate']:g}",
                      results[0]["steps"], *map(percent, scores)])  # fmt: skip
        if before and name == f"Super{before[0]}" and len(before[1][0]) == len(results):
            gains = [[b - a for a, b in zip(*pair, strict=True)]
                     for pair in zip(before[1], scores, strict=True)]  # fmt: skip
            lines.append(["*gain*", len(results), "", "", *(percent(g, True) for g in gains)])
        before = (name, scores)
    if not lines:
        return []
    s = all_results[0]["scores"]
    heads = [f"{m} (chance {100 * s[m]['chance']:.1f}, n {s[m]['n']:g})" for m in metrics]
    heads = ["", "seeds", "learning rate", "updates", *heads]
    samples = f"{all_results[0]['samples_seen']:,} samples seen a run"
    about = f"{ABOUT[part]} {samples}; {effort(all_results)}."
    return [f"## {part}", "", about, "", *markdown(heads, lines)]


def search_table(args):
    lines, all_results = [], []
    for name, specs in searches(args, PARTS):
        results = [r for spec in specs if (r := load(spec, args))]
        if results:
            tried = {r["arguments"]["learning_rate"]: r["scores"]["R@1"]["value"] for r in results}
            best = max(tried, key=tried.get)
            tried = ", ".join(f"{rate:g}: {percent([v])}" for rate, v in sorted(tried.items()))
            lines.append([name, f"{best:g}", tried])
            all_results += results
    if not lines:
        return []
    about = (
        "Learning rates: R@1 in percent (chance 0.1) of one seed after half the samples, among a "
        "thousand training scenes held out for this. A row of the other tables uses the best of "
        f"its search. {effort(all_results)}."
    )
    return ["## search", "", about, "", *markdown(["", "best", "learning rate: R@1"], lines)]


def effort(results):
    minutes, r = sum(r["seconds"] for r in results) / 60, results[0]
    return f"{minutes:.0f} core-minutes on {r['machine']}, {r['dtype']}, torch {r['torch']}"


def markdown(heads, rows):
    return ["| " + " | ".join(map(str, row)) + " |"
            for row in (heads, ["---"] * len(heads), *rows)] + [""]  # fmt: skip


def attribute_table(args):
    """Which captions are told apart, at a small and a large batch."""
    shown = [B for B in (32, 128) if B in args.batch_sizes] or args.batch_sizes[:1]
    rows, columns = {}, ["", "n", "chance"]
    for name, specs in plan(args, "main"):
        results = [r for spec in specs if (r := load(spec, args))]
        if not results or specs[0]["batch_size"] not in shown:
            continue
        for way in ("choose", "head") if "head colour" in results[0]["scores"] else ("choose",):
            columns.append(name + (" (its head)" if way == "head" else ""))
            for kind in (*KINDS, "swap"):
                own = [r["scores"][f"{way} {kind}"] for r in results]
                row = rows.setdefault(kind, [kind, own[0]["n"], f"{100 * own[0]['chance']:.0f}"])
                row.append(percent([s["value"] for s in own]))
    if not rows:
        return []
    about = (
        "The true caption of a held-out scene against captions in which one thing was "
        'changed; swap: "a red circle left of a blue square" against "a blue square left '
        "of a red circle\", the same words. By the towers, and by the head's words alone."
    )
    return ["## attributes", "", about, "", *markdown(columns, rows.values())]


def cost_table(args):
    path = args.out_dir / "cost.json"
    if not path.exists():
        return []
    result, rows = json.loads(path.read_text()), []
    for name, m in result["models"].items():
        share = [100 * m["head_flops"] / m[k] for k in
                 ("tower_flops", "tower_flops_without_attention_products")]  # fmt: skip
        times = "not run"
        if m["step_seconds"]:
            a, b = m["step_seconds"]
            times = f"{1e3 * a:.1f} -> {1e3 * b:.1f} ms ({100 * (b / a - 1):+.1f} %), batch "
            times += str(m["batch_size"])
        towers = m["parameters"] - m["head_parameters"]
        rows.append([name, f"{towers:,} + {m['head_parameters']:,}"
                     f" ({100 * m['head_parameters'] / towers:+.1f} %)",
                     f"{m['tower_flops'] / 1e9:.3f}",
                     f"2 x {m['width']} x {m['vocabulary']} = {m['head_flops'] / 1e9:.4f}",
                     f"{share[0]:.3f} %", f"{share[1]:.3f} %", times])  # fmt: skip
    about = (
        f"The head is one product per image, 2 D V operations. The paper's 0.077 % is L/16 "
        "without attention's products. Time: forward and backward without the head -> with "
        f"it, the fastest of runs in turn, on {result['machine']}, torch {result['torch']}."
    )
    heads = ["", "parameters: towers + head", "GFLOP a pair, forward", "head's GFLOP", "share",
             "share without attention's products", "step"]  # fmt: skip
    return ["## cost", "", about, "", *markdown(heads, rows)]


def figure(args):
    """Accuracy against the pairs contrasted and against the batch size: mean, seeds, spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = {"both": "zero-shot, 64 pairs of colour and shape (%)",
               "R@1": "retrieval, mean R@1 of both ways (%)"}  # fmt: skip
    parts = {"negatives": ("pairs contrasted, same batch and updates", "group"),
             "main": ("batch size, same samples seen", "batch_size")}  # fmt: skip
    parts = {p: about for p, about in parts.items() if table_of(args, p)}
    if not parts:
        return None
    size = dict(figsize=(9, 3.5 * len(parts)), constrained_layout=True, squeeze=False)
    _, grid = plt.subplots(len(parts), 2, **size)
    for row, (part, (label, key)) in zip(grid, parts.items(), strict=True):
        for axis, (metric, title) in zip(row, metrics.items(), strict=True):
            for method, colour in (("CLIP", "#7a7a7a"), ("SuperCLIP", "#d1495b")):
                points = {}  # place on the axis -> value of each seed
                for name, specs in plan(args, part):
                    results = [r for spec in specs if (r := load(spec, args))]
                    if name.startswith(method) and results:
                        place = specs[0][key] or specs[0]["batch_size"]
                        points[place] = [100 * r["scores"][metric]["value"] for r in results]
                        chance = 100 * results[0]["scores"][metric]["chance"]
                if not points:
                    continue
                mean = [statistics.mean(v) for v in points.values()]
                spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in points.values()]
                axis.errorbar(list(points), mean, spread, color=colour, label=method, capsize=4)
                dots = [(x, v) for x, values in points.items() for v in values]
                axis.scatter(*zip(*dots, strict=True), color=colour, s=14, alpha=0.6)
                axis.set_xticks(list(points), labels=map(str, points))
            axis.axhline(chance, color="black", ls=":", lw=1, label=f"chance, {chance:.1f} %")
            axis.set(xscale="log", xlabel=label, title=title, ylim=(0, 100))
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, loc="lower right")
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(args.figure, dpi=130)
    return args.figure


def report(args):
    lines = ["# CLIP and SuperCLIP on small batches", "",
             "Mean ± standard deviation over seeds, in percent; *gain*: SuperCLIP minus CLIP of "
             "the same seed. Made by `python scripts/small_batch.py`; each run's "
             "arguments, versions, commit, machine and seconds are in runs/.", ""]  # fmt: skip
    for part in COLUMNS:
        lines += table_of(args, part)
        if part == "main":
            lines += attribute_table(args)
    lines += cost_table(args) + search_table(args)
    (args.out_dir / "small_batch.md").write_text("\n".join(lines))
    for made in (args.out_dir / "small_batch.md", figure(args)):
        if made:
            print(f"wrote {made}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("command", nargs="?", choices=("run", "report"), default="run")
    add("--quick", action="store_true", help="negatives alone, one seed, no search")
    add("--only", metavar="PARTS", help=f"with commas between: {','.join(PARTS)} (default: all)")
    add("--samples", type=int, default=RUN["samples"], help="seen by each run (default 24576)")
    add("--seeds", type=int, default=3, help="(default 3; two at most in captions, ablations)")
    add("--batch_sizes", default="16,32,64,128", help="with commas between")
    add("--groups", default="2,4,8,16", help="of pairs contrasted, in the part negatives")
    add("--flickr", nargs="+", metavar="SHARDS", help="of Flickr8k, to train on")
    add("--flickr_val", nargs="+", metavar="SHARDS", help="to be scored on")
    add("--flickr_samples", type=int, default=36_000, help="seen by each run (default 36000)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: the cores)")
    add("--out_dir", type=Path, help="(default results; with --quick out-quick)")
    add("--figure", type=Path, help="(default assets/small_batch.png; else in out_dir)")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.groups, args.only = 1, "2,4", args.only or "negatives"
    args.figure = args.figure or Path(
        args.out_dir or ("out-quick" if args.quick else "assets"), "small_batch.png"
    )
    args.out_dir = args.out_dir or Path("out-quick" if args.quick else "results")
    args.batch_sizes = [int(B) for B in args.batch_sizes.split(",")]
    args.groups = [int(g) for g in args.groups.split(",")]
    args.only = args.only.split(",") if args.only else list(PARTS)
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"--only: there is no part {', '.join(unknown)}")
    if bool(args.flickr) != bool(args.flickr_val):
        parser.error("--flickr and --flickr_val go together")
    if args.command == "run":
        if not args.flickr:
            args.only = [part for part in args.only if part != "flickr"]
        study(args)
        if "cost" in args.only and not (args.out_dir / "cost.json").exists():
            cost(args)
    report(args)


if __name__ == "__main__":
    data.cli(main)
