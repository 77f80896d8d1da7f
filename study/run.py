"""One run of the study in compare.py: train a model on the CPU, score it, and return the numbers.

A run is a process with one thread, and there are as many at a time as there are cores, because for
models of this size that trains more than one process with all cores does. Its steps are those of
`train.py --crop_area 1`, equal to the bit, from images that are decoded once.

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
from cli import InputError, cache_folder, check, pick_dtype
from scripts import pack, scenes
from scripts.vocab import make_vocabulary
from scripts.words import localisation
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
    search=False,  # "mean": trained and judged on training pairs, to choose a learning rate
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
FACTS = {"objects": ["object"], "products": ["type", "colour"]}  # that photographs are told by
# What a learning rate is chosen by beside R@1: a zero-shot score of each set of pairs.
SECOND_SCORE = {
    "scenes": "colour_shape",
    "objects": "zero-shot object",
    "products": "zero-shot type",
}


# -----------------------------------------------------------------------------
# The data, decoded once


class Table:
    """Decoded pairs: images (N, 3, S, S) uint8, tokens (N, C, T) of the C captions of each, and
    facts, a list of what else is known of each. All processes map the same file into memory."""

    def __init__(self, path, part=slice(None)):
        content = torch.load(path, mmap=True, weights_only=True)
        self.images = content["images"][part]
        self.tokens = content["tokens"][part]
        self.facts = json.loads(content["facts"])[part]
        self.vocab = content["vocab"]


def write_table(path, tokenizer, images, captions, facts):
    """images (N, 3, S, S); captions: a list of C texts of each; facts: a dict of each."""
    tokens = [tokenizer(texts).int() for texts in captions]
    content = {
        "images": images,
        "tokens": torch.stack(tokens),
        "facts": json.dumps(facts),
        "vocab": tokenizer.vocab,
    }
    torch.save(content, path)


def read_shards(shards, captions):
    """Returns images (N, 3, S, S), the list of captions of each, and its fields of .json."""
    pairs = data.Pairs(shards, None, scenes.SIZE, captions)
    dataset = evaluation.ShardImages(pairs)
    images = []
    texts = []
    for pixels, texts_of_batch in evaluation.batches(dataset, 256, None, "decoding"):
        images.append(pixels)
        texts += texts_of_batch
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
        facts = [f["scene"] for f in fields]
        write_table(folder / f"scenes-{settings}-{part}.pt", tokenizer, images, captions, facts)


def place_objects(dataset, settings, most, seed):
    """Put photographs, each in a corner of a drawn setting. dataset: photographs with the numbers
    of their classes; most: as many of them at most. Returns images, captions (the setting, and
    three that name the object, too) and facts, as write_table takes them. The box of a photograph
    is (x0, y0, x1, y1), in 0..1 of the image's side."""
    rng = random.Random(seed)
    numbers = rng.sample(range(len(dataset)), min(most, len(dataset)))
    images = []
    captions = []
    facts = []
    for number in data.progress(numbers, "placing objects"):
        photograph, label = dataset[number]
        check(not isinstance(photograph, str), photograph)
        setting = rng.choice(settings)
        x0, y0 = rng.choice(CORNERS), rng.choice(CORNERS)
        x1 = x0 + PHOTOGRAPH
        y1 = y0 + PHOTOGRAPH
        picture = scenes.draw_setting(*setting, 4 * scenes.SIZE).reduce(4)
        image = data.load_image(picture, scenes.SIZE).clone()
        image[:, y0:y1, x0:x1] = photograph
        ground = scenes.describe_setting(*setting)
        thing = scenes.with_article(dataset.classes[label])
        images.append(image)
        long = [f"{thing} on {ground}", f"{ground} and {thing}", f"photo of {thing} on {ground}"]
        captions.append([ground, *long])
        box = [pixels / scenes.SIZE for pixels in (x0, y0, x1, y1)]
        facts.append({"object": thing, "setting": ground, "box": box})
    return torch.stack(images), captions, facts


def read_objects(source, split):
    """A dataset of photographs and their classes. source: a folder of train/CLASS/ and test/CLASS/,
    or None for CIFAR-10, which is downloaded."""
    if source:
        return evaluation.ClassFolders(source / split, PHOTOGRAPH)
    load = partial(data.load_image, size=PHOTOGRAPH)
    folder = cache_folder()
    try:
        return torchvision.datasets.CIFAR10(folder, split == "train", load, download=True)
    except OSError as error:
        raise InputError(f"cannot download CIFAR-10 ({error}): see --objects") from None


def prepare_objects(folder, settings, source=None):
    """Decode objects into `folder`. source: see read_objects."""
    parts = {}
    words = set()
    for name, split in (("train", "train"), ("val", "test")):
        dataset = read_objects(source, split)
        parts[name] = place_objects(dataset, some_settings(settings), MOST[split], split)
        for texts in parts[name][1]:
            words.update(" ".join(texts).split())
    tokenizer = data.Tokenizer(data.words_to_tiktoken(sorted(words)))
    for name, part in parts.items():
        write_table(folder / f"objects-{settings}-{name}.pt", tokenizer, *part)


def prepare_products(folder, settings, source):
    """Pack and decode products into `folder`. source: a folder with pairs.csv and images/. A hash
    of the image file decides on which side a product is."""
    shards = folder / "products"
    # fmt: off
    pack.main(["--csv", f"{source}/pairs.csv", "--images", f"{source}/images",
               "--out", str(shards), "--val", str(VAL)])
    # fmt: on
    captions = ["json.group", "txt"]
    train_shards = data.expand([shards / "train-*.tar"])
    tokenizer = data.Tokenizer(make_vocabulary(train_shards, 10_000, captions))
    seen = set()
    for part in ("train", "val"):
        images, texts, facts = read_shards(data.expand([shards / f"{part}-*.tar"]), captions)
        # Shuffled, because a list is often sorted, and the last pairs of training judge a search.
        numbers = random.Random(0).sample(range(len(images)), len(images))
        if part == "val":
            numbers = new_products(facts, numbers, seen)
        for f in facts:
            seen |= identity(f)
        texts = [texts[i] for i in numbers]
        facts = [facts[i] for i in numbers]
        path = folder / f"products-{settings}-{part}.pt"
        write_table(path, tokenizer, images[numbers], texts, facts)


def identity(facts):
    """What makes two products the same: the file, or the title."""
    return {facts["sha256"], data.clean(facts["captions"][0])}


def new_products(facts, numbers, seen):
    """Those of these numbers whose file and title are neither in `seen` nor among the products
    before them."""
    seen = {*seen}
    kept = []
    for i in numbers:
        known = identity(facts[i])
        if not known & seen:
            kept.append(i)
        seen |= known
    return kept


class DecodedPairs(data.Pairs):
    """The pairs of a table, for train.py's loader. "mixed" draws the short caption half
    of the time, as train.py does with --captions json.short json.long."""

    def __init__(self, table, tokenizer, spec):
        self.images = table.images
        self.tokens = table.tokens
        self.tokenizer = tokenizer
        self.image_size = scenes.SIZE
        self.seed = spec["seed"]
        numbers = range(table.tokens.shape[1])
        sources = {
            "short": [numbers[:1]],
            "long": [numbers[1:]],
            "mixed": [numbers[:1], numbers[1:]],
        }
        self.captions = sources[spec["captions"]]
        self.label_captions = sources[spec["label_captions"] or spec["captions"]]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        visit, sample = item
        rng = data.rng_of_visit(self.seed, visit)  # draws what data.Pairs draws
        caption = label = self.ids(sample, rng.choice(rng.choice(self.captions)))
        if self.label_captions != self.captions:
            label = self.ids(sample, rng.choice(rng.choice(self.label_captions)))
        return self.images[sample], caption, label, []

    def ids(self, sample, number):
        """A caption of a sample, without start, end and padding."""
        ids = self.tokens[sample, number].tolist()
        return ids[1 : ids.index(self.tokenizer.end)]


# -----------------------------------------------------------------------------
# Scores


def retrieval_scores(model, table):
    """R@k among the first thousand pairs, as the mean of both ways, whose numbers of questions are
    added. The captions are long ones."""
    images = [model.encode_image(part) for part in table.images[:RANKED].split(256)]
    tokens = table.tokens[:RANKED, 1].long()
    texts = [model.encode_text(data.trim(part)) for part in tokens.split(256)]
    images = torch.cat(images)
    ways = evaluation.retrieval(images, torch.cat(texts), torch.arange(len(images)))
    scores = {}
    for name in ("R@1", "R@5", "R@10"):
        a = ways["image_to_text"][name]
        b = ways["text_to_image"][name]
        scores[name] = {
            "value": (a["value"] + b["value"]) / 2,
            "chance": a["chance"],  # the same both ways: each image has one caption
            "n": a["n"] + b["n"],
        }
    return scores


def floor(facts):
    """R@1 of a model that sees nothing but the setting. Among the k pairs that share one it finds
    the right one in 1 of k, so the k of them add up to 1."""
    return len({f["setting"] for f in facts}) / len(facts)


def classes_of(images, labels):
    """images (N, 3, S, S) and N names -> a dataset of (image, class number), the classes."""
    classes = sorted({*labels})
    numbers = [classes.index(label) for label in labels]
    return list(zip(images, numbers)), classes


def probe(features, labels, learn):
    """The score of a linear probe on frozen features (N, D) with labels (N,). It learns from the
    images for which learn (N,) is true, and is scored on the others."""
    taught = features[learn], labels[learn]
    asked = features[~learn], labels[~learn]
    classes = int(labels.max()) + 1
    with torch.enable_grad():
        return evaluation.probe(taught, asked, classes)[0]


def draw_looks(combinations, kind):
    """PER_LOOK pictures of one object for each combination. Returns images and looks, which are
    names such as "red star". kind: seeds the drawing."""
    images = []
    looks = []
    for look in combinations:
        for _ in range(PER_LOOK):
            scene = scenes.make_scene(random.Random(f"{kind} {len(images)}"), [look], 1)
            images.append(data.load_image(scenes.jpeg(scene), scenes.SIZE))
            looks.append(" ".join(look))
    return images, looks


def searched_look_scores(model, tokenizer):
    """colour_shape for a search: zero-shot accuracy among the 64 looks, of pictures that are not
    those of the study, and of looks that training shows."""
    images, looks = draw_looks(scenes.SEEN, "search")
    names = [" ".join(look) for look in scenes.COMBINATIONS]
    dataset = [(image, names.index(look)) for image, look in zip(images, looks)]
    result = evaluation.zeroshot(model, tokenizer, dataset, names)
    return {"colour_shape": result["top1"]}


def look_scores(model, tokenizer):
    """Scores of drawn pictures of one object: zero-shot, and linear probes of the class token."""
    images, looks = draw_looks(scenes.COMBINATIONS, "object")
    learn = torch.arange(len(looks)) % PER_LOOK < SHOTS
    labels = {
        "colour": [look.split()[0] for look in looks],
        "shape": [look.split()[1] for look in looks],
        "colour_shape": looks,
    }
    scores = {}
    for name in labels:
        dataset, classes = classes_of(images, labels[name])
        zeroshot = evaluation.zeroshot(model, tokenizer, dataset, classes)
        features, numbers = evaluation.frozen_features(model, dataset)
        class_token, _ = features.chunk(2, dim=1)
        scores[name] = zeroshot["top1"]
        scores[f"probe {name}"] = probe(class_token, numbers, learn)
    # of the last one, colour_shape
    held_out = [" ".join(look) for look in scenes.HELD_OUT]
    unseen = [s for s in zeroshot["per_class"] if s["name"] in held_out]
    scores["held_out"] = {
        "value": sum(s["value"] for s in unseen) / len(unseen),
        "chance": zeroshot["top1"]["chance"],
        "n": sum(s["n"] for s in unseen),
    }
    return scores


def photographs(table, fact):
    """The photographs that have one of the ten commonest values of a fact -> a dataset of (image,
    class number), the classes."""
    common = Counter(f[fact] for f in table.facts).most_common(10)
    names = [name for name, _ in common]
    numbers = [i for i, f in enumerate(table.facts) if f[fact] in names]
    labels = [table.facts[i][fact] for i in numbers]
    return classes_of(table.images[numbers], labels)


def zeroshot_photographs(model, tokenizer, table, fact):
    """Zero-shot classification of photographs by one of their facts, as a dict of one score."""
    dataset, classes = photographs(table, fact)
    templates = ["{}"]
    if fact == "object":  # captions name the setting, too
        settings = dict.fromkeys(f["setting"] for f in table.facts)
        templates = ["{} on " + setting for setting in settings]
    result = evaluation.zeroshot(model, tokenizer, dataset, classes, templates)
    return {f"zero-shot {fact}": result["top1"]}


def probe_photographs(model, table, fact):
    """Linear probes of the class token and of the mean of the patch tokens, by one of the facts.
    They learn from the second half of the photographs."""
    dataset, _ = photographs(table, fact)
    features, labels = evaluation.frozen_features(model, dataset)
    class_token, patch_mean = features.chunk(2, dim=1)
    learn = torch.arange(len(labels)) >= len(labels) // 2
    return {
        f"probe {fact}": probe(class_token, labels, learn),
        f"patch probe {fact}": probe(patch_mean, labels, learn),
    }


def place_scores(model, tokenizer, table):
    """Is the place where an object's word is seen its photograph? As scripts/words.py asks it of
    scenes, with windows of 2 x 2 and of 3 x 3 patches left out."""
    pictures = []
    for image, fact in zip(table.images[:RANKED], table.facts):
        word = tokenizer.encode(fact["object"])[-1]  # without its article
        pictures.append((image, [(word, fact["box"])]))
    return {f"place, window {w} x {w}": localisation(model, pictures, w) for w in (2, 3)}


def stem(word):
    """A word without plural and hyphens: titles write t-shirt, types Tshirts."""
    return word.replace("-", "").rstrip("s")


def word_scores(model, tokenizer, table):
    """How well the head's logit of a word ranks the images that have it in their title: mean
    average precision over the words of at least ten images, for each of KINDS. Chance is the share
    of images that have the word."""
    logits = torch.cat([model.class_logits(part) for part in table.images.split(256)])
    has = torch.zeros_like(logits, dtype=torch.bool)  # (N, V)
    has.scatter_(1, table.tokens[:, 1].long(), True)
    has[:, [PAD, tokenizer.start, tokenizer.end]] = False
    rest = (has.sum(dim=0) >= 10).nonzero().flatten().tolist()
    scores = {}
    for kind in KINDS:
        named = set()
        for f in table.facts:
            named.update(stem(word) for word in data.clean(f.get(kind, "")).split())
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
    numbers = []
    texts = []
    for i, scene in enumerate(table.facts[:500]):
        if len(scene["objects"]) < 2:
            continue
        first, second = scene["objects"]
        swapped = [
            {**first, "colour": second["colour"]},
            {**second, "colour": first["colour"]},
        ]
        for objects in (scene["objects"], swapped):
            rng = random.Random(i)  # so that both are worded alike
            _, long = scenes.describe({**scene, "objects": objects}, rng)
            texts.append(long)
        numbers.append(i)
    answers = evaluation.encode_texts(model, tokenizer, texts).unflatten(0, (len(numbers), 2))
    images = model.encode_image(table.images[numbers])
    cosines = torch.einsum("ne,nce->nc", images, answers)
    right = torch.tensor([True, False]).expand(len(numbers), 2)
    hits = evaluation.recall(evaluation.rank_counts(cosines, right), 1)
    return {"choose swap": evaluation.score(hits, 1 / 2)}


# -----------------------------------------------------------------------------
# One run


def make_model(spec, vocab_size):
    torch.manual_seed(spec["seed"])
    tiny = PRESETS["tiny"]
    config = SuperCLIPConfig(**tiny, vocab_size=vocab_size, cls_weight=spec["cls_weight"])
    model = SuperCLIP(config)
    if spec["group"]:  # each image is told from the captions of its own group only
        compare = model.compare

        def compare_in_groups(images, texts):
            losses = []
            for group in zip(images.split(spec["group"]), texts.split(spec["group"])):
                losses.append(compare(*group)["contrastive_loss"])
            return {"contrastive_loss": torch.stack(losses).mean()}

        model.compare = compare_in_groups
    return model.train()


def optimise(model, tokenizer, table, spec):
    """Train as train.py does. Returns the last losses and the dtype, which is bfloat16 if the CPU
    has units for it, and else float32. (That has not mattered: in eight runs made in both, R@1
    differed by 0.2 points at most, and colour_shape by 1.6.)"""
    device = torch.device("cpu")
    dtype = pick_dtype(device)
    torch.backends.cuda.enable_flash_sdp(False)  # as train.py does for small images
    autocast, scaler = train.precision(device, dtype)
    rate = spec["learning_rate"]
    N = spec["batch_size"]
    optimizer = train.make_optimizer(model, rate, rate, train.SCENES["weight_decay"])
    steps = spec["samples"] // N
    pairs = DecodedPairs(table, tokenizer, spec)
    batches = data.load_batches(pairs, N, slice(0, N), N, 0, steps, 0, device)
    losses = {}
    for step, (batch, _) in enumerate(batches):
        losses = train.plain_step(model, batch, autocast, scaler)
        factor = train.learning_rate_factor(step, steps // 10, steps)
        train.update(model, optimizer, scaler, factor)
    return {name: x.item() for name, x in losses.items() if name.endswith("_loss")}, dtype


def score_run(model, tokenizer, spec, held_out):
    """What a run is judged by, a dict of score dicts."""
    scores = retrieval_scores(model, held_out)
    if spec["data"] == "objects":
        scores["R@1"]["floor"] = floor(held_out.facts[:RANKED])
    if spec["search"] and spec["data"] == "scenes":
        return scores | searched_look_scores(model, tokenizer)
    if spec["search"]:
        fact = FACTS[spec["data"]][0]
        return scores | zeroshot_photographs(model, tokenizer, held_out, fact)
    if spec["data"] == "scenes":
        scores |= look_scores(model, tokenizer)
        return scores | swap_scores(model, tokenizer, held_out)
    for fact in FACTS[spec["data"]]:
        scores |= zeroshot_photographs(model, tokenizer, held_out, fact)
        scores |= probe_photographs(model, held_out, fact)
    if model.head is None:
        return scores
    if spec["data"] == "products":
        return scores | word_scores(model, tokenizer, held_out)
    return scores | place_scores(model, tokenizer, held_out)


def rounded(score):
    """The numbers of a score that runs.jsonl keeps."""
    names = ("value", "chance", "floor", "n")
    return {name: round(score[name], 5) for name in names if name in score}


def run(task, path=None):
    """Train and score one model, and keep it at `path`. task: a spec, and the folder of tables."""
    spec, folder = task
    start = time.perf_counter()
    name = f"{spec['data']}-{spec['settings']}"
    if spec["search"]:  # judged by training pairs, so that no rate is chosen by the validation data
        table = Table(folder / f"{name}-train.pt", slice(-RANKED))
        held_out = Table(folder / f"{name}-train.pt", slice(-RANKED, None))
    else:
        table = Table(folder / f"{name}-train.pt")
        held_out = Table(folder / f"{name}-val.pt")
    tokenizer = data.Tokenizer(table.vocab)
    model = make_model(spec, tokenizer.vocab_size)
    losses, dtype = optimise(model, tokenizer, table, spec)
    model.eval().requires_grad_(False)  # scores are of float32
    if path is not None:
        evaluation.write_checkpoint(path, model, table.vocab, arguments=spec)
    scores = score_run(model, tokenizer, spec, held_out)
    return {
        "spec": spec,
        "scores": {name: rounded(score) for name, score in scores.items()},
        "losses": losses,
        "seconds": round(time.perf_counter() - start, 1),
        "dtype": dtype,
    }
