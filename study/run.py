"""One run of the study in compare.py: train a model on the CPU, score it, and return the numbers.

A run is a process with one thread, and there are as many at a time as there are cores, because for
models of this size that trains more than one process with all cores does. Its steps are made of
train.py's functions. They differ from train.py's in one thing: images are decoded once, so there is
no crop augmentation.

There are three sets of pairs: the built-in *scenes*; *objects*, which are photographs of CIFAR-10
in settings drawn as for the scenes; and *products*, photographs of a shop with their titles.

Axes: B pairs of a batch, N images, C captions of an image or classes, T tokens, S pixels a side, D
width, V vocabulary.
"""

import json
import random
import time
from collections import Counter
from functools import partial

import torch
import torchvision

import data
import eval as evaluation
import train
from cli import InputError, cache_folder, check
from scripts import pack, scenes
from scripts.vocab import make_vocabulary
from superclip import PAD, PRESETS, SuperCLIP, SuperCLIPConfig

# The options of a run, and their defaults.
RUN = dict(
    data="scenes",  # or objects, products
    settings=256,  # that scenes and objects may have (see scripts/scenes.py)
    batch_size=32,
    group=None,  # pairs that are compared with each other, a part of the batch; None: all
    cls_weight=1.0,  # 0: CLIP
    learning_rate=None,
    samples=48_000,  # seen
    seed=0,
    search=False,  # "mean": trained and judged on training pairs (True: an older rule)
    captions="mixed",  # short, long, or a mix of both
    label_captions=None,  # for the words, if others
)
# The first caption of a table is short, the others are long. The short one of an object is its
# setting, and that of a product its group, such as "Shoes".
PER_LOOK = 20  # pictures of one object for each of the 64 combinations of colour and shape
SHOTS = 2  # of these, the ones that a linear probe learns from: few, so that features matter
RANKED = 1000  # pairs that R@k is measured among
PHOTOGRAPH = 32  # pixels: side of a photograph in a setting
CORNERS = 3, 37  # pixels: where it may begin, inside the border
MOST = {"train": 25_000, "test": 4_000}  # photographs of objects that become pairs
VAL = 0.15  # share of the products
KINDS = "type", "colour", "neither"  # of words in a title: what they name


# -----------------------------------------------------------------------------
# The data, decoded once


class Table:
    """Decoded pairs: images (N, 3, S, S) uint8, tokens (N, C, T) of the C captions of each, and
    facts, a list of what else is known of each. All processes map the same file into memory."""

    def __init__(self, path, part=slice(None)):
        content = torch.load(path, mmap=True, weights_only=True)
        self.images, self.tokens = content["images"][part], content["tokens"][part]
        self.facts, self.vocab = json.loads(content["facts"])[part], content["vocab"]


def write_table(path, tokenizer, images, captions, facts):
    """images (N, 3, S, S); captions: a list of C texts of each; facts: a dict of each."""
    ids = [[tokenizer.encode(text) for text in of_image] for of_image in captions]
    length = min(77, 2 + max(len(caption) for of_image in ids for caption in of_image))
    tokens = torch.stack([tokenizer.pad(of_image, length) for of_image in ids]).int()
    content = {"images": images, "tokens": tokens, "facts": json.dumps(facts)}
    torch.save({**content, "vocab": tokenizer.vocab}, path)


def read_shards(shards, captions):
    """-> images (N, 3, S, S), the captions of each, and its fields of .json."""
    pairs, images, texts = data.Pairs(shards, None, scenes.SIZE, captions), [], []
    for pixels, of_batch in evaluation.batches(
        evaluation.ShardImages(pairs), 256, None, "decoding"
    ):
        images.append(pixels)
        texts += of_batch
    fields = [json.loads(pairs.read(row, data.JSON)) for row in pairs.index.tolist()]
    return torch.cat(images), texts, fields


def some_settings(n):
    return random.Random(0).sample(scenes.SETTINGS, n)


def prepare_scenes(folder, settings, **numbers):
    """Draw scenes of so many settings, and decode them into `folder`. numbers: of scenes, train and
    val, if others than make_scenes has."""
    world = folder / f"world-{settings}"
    scenes.make_scenes(world, settings=some_settings(settings), **numbers)
    tokenizer = data.Tokenizer.from_file(world / "vocab.tiktoken")
    for part in ("train", "val"):
        shards = data.expand([f"{world}/{part}-*.tar"])
        images, captions, fields = read_shards(shards, ["json.short", "json.long"])
        drawn = [f["scene"] for f in fields]
        write_table(folder / f"scenes-{settings}-{part}.pt", tokenizer, images, captions, drawn)


def place_objects(dataset, settings, most, seed):
    """Photographs with the numbers of their classes, each in a corner of a drawn setting -> as
    write_table takes them: images, captions (the setting, and three that name the object, too),
    facts."""
    grounds = {x: scenes.draw_setting(*x, 4 * scenes.SIZE).reduce(4) for x in settings}
    images, captions, facts, rng = [], [], [], random.Random(seed)
    numbers = rng.sample(range(len(dataset)), min(most, len(dataset)))
    for photograph, label in map(dataset.__getitem__, data.progress(numbers, "placing objects")):
        check(not isinstance(photograph, str), photograph)
        cloth, pattern, border = setting = rng.choice(settings)
        x, y = rng.choice(CORNERS), rng.choice(CORNERS)
        image = data.load_image(grounds[setting], scenes.SIZE).clone()
        image[:, y : y + PHOTOGRAPH, x : x + PHOTOGRAPH] = photograph
        name, ground = dataset.classes[label], f"{pattern} {cloth} with {border}"
        thing = f"an {name}" if name[0] in "aeiou" else f"a {name}"
        long = f"{thing} on {ground}", f"{ground} and {thing}", f"photo of {thing} on {ground}"
        images.append(image)
        captions.append([ground, *long])
        facts.append({"object": thing, "setting": ground})
    return torch.stack(images), captions, facts


def read_objects(source, split):
    """A dataset of photographs and their classes. source: a folder of train/CLASS/ and test/CLASS/,
    or None for CIFAR-10, which is downloaded."""
    if source:
        return evaluation.ClassFolders(source / split, PHOTOGRAPH)
    load, folder = partial(data.load_image, size=PHOTOGRAPH), cache_folder()
    try:
        return torchvision.datasets.CIFAR10(folder, split == "train", load, download=True)
    except OSError as error:
        raise InputError(f"cannot download CIFAR-10 ({error}): see --objects") from None


def prepare_objects(folder, settings, source):
    """Decode objects into `folder`. source: see read_objects."""
    some, parts = some_settings(settings), {}
    for name, split in (("train", "train"), ("val", "test")):
        parts[name] = place_objects(read_objects(source, split), some, MOST[split], split)
    texts = (text for _, captions, _ in parts.values() for own in captions for text in own)
    words = {word for text in texts for word in text.split()}
    tokenizer = data.Tokenizer(data.words_to_tiktoken(sorted(words)))
    for name, part in parts.items():
        write_table(folder / f"objects-{settings}-{name}.pt", tokenizer, *part)


def prepare_products(folder, settings, source):
    """Pack and decode products into `folder`. source: a folder with pairs.csv and images/. A hash
    of the image file decides on which side a product is."""
    shards = folder / "products"
    images, out = ("--images", f"{source}/images"), ("--out", str(shards))
    pack.main(["--csv", f"{source}/pairs.csv", *images, *out, "--val", str(VAL)])
    captions, seen = ["json.group", "txt"], set()
    train_shards = data.expand([shards / "train-*.tar"])
    tokenizer = data.Tokenizer(make_vocabulary(train_shards, 10_000, captions))
    for part in ("train", "val"):
        images, texts, facts = read_shards(data.expand([shards / f"{part}-*.tar"]), captions)
        # Shuffled, because a list is often sorted, and the last pairs of training judge a search.
        numbers = random.Random(0).sample(range(len(images)), len(images))
        if part == "val":
            numbers = new_products(facts, numbers, seen)
        for f in facts:
            seen |= {f["sha256"], data.clean(f["captions"][0])}
        facts, texts = ([x[i] for i in numbers] for x in (facts, texts))
        path = folder / f"products-{settings}-{part}.pt"
        write_table(path, tokenizer, images[numbers], texts, facts)


def new_products(facts, numbers, seen):
    """Those of these numbers whose file and title are neither in `seen` nor among the products
    before them."""
    seen, kept = {*seen}, []
    for i in numbers:
        known = {facts[i]["sha256"], data.clean(facts[i]["captions"][0])}
        kept += [] if known & seen else [i]
        seen |= known
    return kept


class DecodedPairs(data.Pairs):
    """The pairs of a table, for train.py's loader. "mixed" draws the short caption half
    of the time, as train.py does with --captions json.short json.long."""

    def __init__(self, table, tokenizer, spec):
        self.images, self.tokens, self.tokenizer = table.images, table.tokens, tokenizer
        self.image_size, self.seed = scenes.SIZE, spec["seed"]
        numbers = range(table.tokens.shape[1])
        sources = {"short": [numbers[:1]], "long": [numbers[1:]]}
        sources["mixed"] = sources["short"] + sources["long"]
        self.captions = sources[spec["captions"]]
        self.label_captions = sources[spec["label_captions"] or spec["captions"]]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        visit, sample = item
        rng = random.Random(self.seed << 40 | visit)  # draws what data.Pairs draws
        caption = label = self.ids(sample, rng.choice(rng.choice(self.captions)))
        if self.label_captions != self.captions:
            label = self.ids(sample, rng.choice(rng.choice(self.label_captions)))
        return self.images[sample], caption, label, []

    def ids(self, sample, number):
        """A caption of a sample, without start, end and padding."""
        ids = self.tokens[sample, number].tolist()
        return ids[1 : ids.index(self.tokenizer.end)]


def trim(tokens):
    """(B, T) -> the columns up to the longest caption's end token, the largest id of a caption."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1].long()


# -----------------------------------------------------------------------------
# Scores


def retrieval_scores(model, table):
    """R@k among the first thousand pairs, as the mean of both ways, whose numbers of questions are
    added. The captions are long ones."""
    images = torch.cat([model.encode_image(part) for part in table.images[:RANKED].split(256)])
    texts = [model.encode_text(trim(part)) for part in table.tokens[:RANKED, 1].split(256)]
    a, b = evaluation.retrieval(images, torch.cat(texts), torch.arange(len(images))).values()
    return {
        k: {"n": a[k]["n"] + b[k]["n"]} | {x: (a[k][x] + b[k][x]) / 2 for x in ("value", "chance")}
        for k in ("R@1", "R@5", "R@10")
    }


def floor(facts):
    """R@1 of a model that sees nothing but the setting. Among the k pairs that share one it finds
    the right one in 1 of k, so the k of them add up to 1."""
    return len({f["setting"] for f in facts}) / len(facts)


def classify(model, tokenizer, images, labels, learn, templates=evaluation.TEMPLATES):
    """images (N, 3, S, S) and N names -> what eval.py's zeroshot returns, and the scores of linear
    probes on the frozen class token and on the mean of the patch tokens. The probes learn from the
    images for which learn (N,) is true, and are scored on the others."""
    names = sorted({*labels})
    dataset = [(image, names.index(label)) for image, label in zip(images, labels)]
    probes, (features, y) = [], evaluation.frozen_features(model, dataset)
    for x in features.chunk(2, dim=1):
        with torch.enable_grad():
            parts = (x[learn], y[learn]), (x[~learn], y[~learn])
            probes.append(evaluation.probe(*parts, len(names))[0])
    return evaluation.zeroshot(model, tokenizer, dataset, names, templates), *probes


def draw_looks(combinations, kind):
    """PER_LOOK pictures of one object for each combination -> the looks, the images."""
    looks = [look for look in combinations for _ in range(PER_LOOK)]
    images = []
    for i, look in enumerate(looks):
        scene = scenes.make_scene(random.Random(f"{kind} {i}"), [look], 1)
        images.append(data.load_image(scenes.jpeg(scene), scenes.SIZE))
    return looks, images


def searched_look_scores(model, tokenizer):
    """What a learning rate is chosen by, beside R@1: zero-shot accuracy among the 64 looks, of
    pictures that are not those of the study, and of looks that training shows."""
    looks, images = draw_looks(scenes.SEEN, "search")
    names = [*map(" ".join, scenes.COMBINATIONS)]
    dataset = [(image, names.index(" ".join(look))) for image, look in zip(images, looks)]
    return {"colour_shape": evaluation.zeroshot(model, tokenizer, dataset, names)["top1"]}


def look_scores(model, tokenizer):
    """Scores of drawn pictures of one object."""
    looks, images = draw_looks(scenes.COMBINATIONS, "object")
    learn, scores = torch.arange(len(looks)) % PER_LOOK < SHOTS, {}
    for name, labels in (
        ("colour", [c for c, _ in looks]),
        ("shape", [s for _, s in looks]),
        ("colour_shape", [*map(" ".join, looks)]),
    ):
        zeroshot, probe, _ = classify(model, tokenizer, images, labels, learn)
        scores |= {name: zeroshot["top1"], f"probe {name}": probe}
    unseen = [s for s in zeroshot["per_class"] if (*s["name"].split(),) in scenes.HELD_OUT]
    value, n = (sum(s[x] for s in unseen) for x in ("value", "n"))
    scores["held_out"] = {**zeroshot["top1"], "value": value / len(unseen), "n": n}
    return scores


def photograph_scores(model, tokenizer, table, fact, templates=("{}",)):
    """Classification of photographs by one of their facts, among its ten commonest values. The
    probes learn from the second half of the photographs."""
    names = [name for name, _ in Counter(f[fact] for f in table.facts).most_common(10)]
    numbers = [i for i, f in enumerate(table.facts) if f[fact] in names]
    labels = [table.facts[i][fact] for i in numbers]
    learn = torch.arange(len(labels)) >= len(labels) // 2
    zeroshot, *probes = classify(model, tokenizer, table.images[numbers], labels, learn, templates)
    kinds = f"zero-shot {fact}", f"probe {fact}", f"patch probe {fact}"
    return dict(zip(kinds, (zeroshot["top1"], *probes)))


def word_scores(model, tokenizer, table):
    """How well the head's logit of a word ranks the images that have it in their title: mean
    average precision over the words of at least ten images, for each of KINDS. Chance is the share
    of images that have the word."""

    def stem(word):  # without plurals and hyphens: titles write t-shirt, types Tshirts
        return word.replace("-", "").rstrip("s")

    logits = torch.cat([model.class_logits(part) for part in table.images.split(256)])
    has = torch.zeros_like(logits, dtype=torch.bool)  # (N, V)
    has.scatter_(1, table.tokens[:, 1].long(), True)
    has[:, [PAD, tokenizer.start, tokenizer.end]] = False
    rest, scores = (has.sum(dim=0) >= 10).nonzero().flatten().tolist(), {}
    for kind in KINDS:
        named = {stem(w) for f in table.facts for w in data.clean(f.get(kind, "")).split()}
        words = [w for w in rest if kind == "neither" or stem(tokenizer.decode([w])) in named]
        rest = [w for w in rest if w not in words]
        if words:
            precisions = torch.stack([average_precision(logits[:, w], has[:, w]) for w in words])
            scores[f"words of {kind}"] = evaluation.score(precisions, has[:, words].float().mean())
    return scores


def average_precision(scores, right):
    """scores (N,), right (N,) bool -> going down the scores, the share of right ones so far, as a
    mean over the right ones."""
    right = right[scores.argsort(descending=True)].double()
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    return (precision * right).sum() / right.sum()


def swap_scores(model, tokenizer, table):
    """Of scenes with two objects: which caption is true, its own, or one in which the objects have
    exchanged their colours? Both have the same words, so a bag of words cannot tell them apart."""
    numbers, texts = [], []
    for i, scene in enumerate(table.facts[:500]):
        if len(scene["objects"]) == 2:
            first, second = scene["objects"]
            others = {**first, "colour": second["colour"]}, {**second, "colour": first["colour"]}
            for objects in (scene["objects"], others):
                # Both are worded alike.
                texts.append(scenes.describe({**scene, "objects": objects}, random.Random(i))[1])
            numbers.append(i)
    answers = evaluation.encode_texts(model, tokenizer, texts).unflatten(0, (len(numbers), 2))
    cosines = torch.einsum("ne,nce->nc", model.encode_image(table.images[numbers]), answers)
    right = torch.tensor([True, False]).expand(len(numbers), 2)
    hits = evaluation.recall(evaluation.rank_counts(cosines, right), 1)
    return {"choose swap": evaluation.score(hits, 1 / 2)}


# -----------------------------------------------------------------------------
# One run


def make_model(spec, vocab_size):
    torch.manual_seed(spec["seed"])
    fields = {k: v for k, v in spec.items() if hasattr(SuperCLIPConfig, k)}
    model = SuperCLIP(SuperCLIPConfig(**PRESETS["tiny"], vocab_size=vocab_size, **fields))
    if spec["group"]:  # each image is told from the captions of its own group only
        compare = model.compare

        def compare_in_groups(*features):
            groups = zip(*(x.split(spec["group"]) for x in features))
            losses = [compare(*group)["contrastive_loss"] for group in groups]
            return {"contrastive_loss": torch.stack(losses).mean()}

        model.compare = compare_in_groups
    return model.train()


def optimise(model, tokenizer, table, spec):
    """Train as train.py does. Returns the last losses and the dtype, which is bfloat16 if the CPU
    has units for it, and else float32. (That has not mattered: in eight runs made in both, R@1
    differed by 0.2 points at most, and colour_shape by 1.6.)"""
    device, rate = torch.device("cpu"), spec["learning_rate"]
    dtype = train.pick_dtype(device, scenes=True)
    torch.backends.cuda.enable_flash_sdp(False)  # as train.py does for small images
    autocast = torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = train.make_optimizer(model, rate, rate, scenes.built_in()["weight_decay"])
    N, steps = spec["batch_size"], spec["samples"] // spec["batch_size"]
    pairs = DecodedPairs(table, tokenizer, spec)
    batches = data.load_batches(pairs, N, slice(0, N), N, 0, steps, 0, device)
    losses = {}
    for step, (batch, _) in enumerate(batches):
        losses = train.plain_step(model, batch, autocast, scaler)
        train.update(
            model, optimizer, scaler, train.learning_rate_at(step, 1.0, steps // 10, steps)
        )
    return {name: x.item() for name, x in losses.items() if name.endswith("_loss")}, dtype


def score_run(model, tokenizer, spec, held_out):
    """What a run is judged by, a dict of score dicts."""
    scores = retrieval_scores(model, held_out)
    if spec["data"] == "objects":
        scores["R@1"]["floor"] = floor(held_out.facts[:RANKED])
    if spec["search"] == "mean" and spec["data"] == "scenes":
        return scores | searched_look_scores(model, tokenizer)
    if spec["search"]:
        return scores
    if spec["data"] == "objects":
        grounds = ["{} on " + setting for setting in {f["setting"]: None for f in held_out.facts}]
        return scores | photograph_scores(model, tokenizer, held_out, "object", grounds)
    if spec["data"] == "products":
        for fact in ("type", "colour"):
            scores |= photograph_scores(model, tokenizer, held_out, fact)
        return scores | (word_scores(model, tokenizer, held_out) if model.head is not None else {})
    return scores | look_scores(model, tokenizer) | swap_scores(model, tokenizer, held_out)


def run(task):
    """Train and score one model. task: a spec, the folder of the tables, and perhaps a file to keep
    the model in."""
    spec, folder, *kept = task
    start, name = time.perf_counter(), f"{spec['data']}-{spec['settings']}"
    if spec["search"]:  # judged by training pairs, so that no rate is chosen by the validation data
        parts = slice(-RANKED), slice(-RANKED, None)
        table, held_out = (Table(folder / f"{name}-train.pt", part) for part in parts)
    else:
        table, held_out = (Table(folder / f"{name}-{part}.pt") for part in ("train", "val"))
    tokenizer = data.Tokenizer(table.vocab)
    model = make_model(spec, tokenizer.vocab_size)
    losses, dtype = optimise(model, tokenizer, table, spec)
    model.eval().requires_grad_(False)  # scores are of float32
    for path in kept:
        evaluation.write_checkpoint(path, model, table.vocab, arguments=spec)
    scores = score_run(model, tokenizer, spec, held_out)
    numbers = "value", "chance", "floor", "n"
    scores = {k: {x: round(s[x], 5) for x in numbers if x in s} for k, s in scores.items()}
    seconds = round(time.perf_counter() - start, 1)
    return {"spec": spec, "scores": scores, "losses": losses, "seconds": seconds, "dtype": dtype}
