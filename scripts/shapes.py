"""
The built-in data set: scenes of coloured shapes, drawn offline in seconds and written as real tar
shards, so that the first `python train.py` walks the same path as CC3M does.

    python scripts/shapes.py --out shapes

A scene has one to three objects with colour, shape, size, texture and position, a relation between
the first two, a count and a background. It comes with two captions: a short one as alt text on the
web is ("red star on navy"), and a long one that says all there is to see; what only the long one
says is what the paper calls fine-grained. Some pairs of colour and shape never occur in training
(HELD_OUT), so that validation also asks whether "red" and "star" were learnt as two words.

The drawing is kind to a vision transformer that has two minutes to learn. Colours it sees at once,
shapes only after thousands of updates. Single trials say that three things help: objects sit in a 3
x 3 grid, so that each falls on the tiny model's patches (2 x 2 of 6 x 6) in the same way; every
background is darker than every object; and a thin white line runs round each object, so that a
star's edge looks the same in all colours.

Lengths and positions are in 0..1 of the image's side, x to the right, y down.
"""

import argparse
import functools
import io
import json
import math
import multiprocessing
import os
import random
import re
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from scripts.pack import add_member  # noqa: E402
from scripts.vocab import vocabulary_from_words  # noqa: E402
from superclip import check, cli  # noqa: E402

# What a bare `python train.py` trains with. These settings were chosen together.
BUILT_IN = {
    "train_data": ["shapes/train-*.tar"],
    "val_data": ["shapes/val-*.tar"],
    "zeroshot_data": ["shapes/zeroshot/colour", "shapes/zeroshot/shape"],
    "captions": ["json.captions"],  # short or long, drawn anew: zero-shot's prompts are short
    "val_captions": ["json.long"],  # a short one is true of many scenes
    "model": "tiny",
    "weight_decay": 0.1,
    "epochs": 2.8,
    "batch_size": 32,
}

COLOURS = {
    "red": (240, 50, 50), "orange": (255, 150, 20), "yellow": (250, 235, 60),
    "green": (60, 200, 80), "cyan": (80, 230, 240), "blue": (70, 120, 255),
    "purple": (170, 80, 240), "pink": (255, 150, 205),
}  # fmt: skip
# named unlike any object's colour, so that a colour word in a caption always belongs to an object
BACKGROUNDS = {
    "black": (8, 8, 8), "gray": (75, 75, 75), "navy": (15, 20, 85),
    "maroon": (85, 12, 30), "brown": (80, 50, 20), "olive": (60, 70, 15),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
SIZES = {"small": 0.115, "large": 0.156}  # radius; with the jitter a large one just fills its cell
TEXTURES = ("plain", "striped", "dotted")
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")  # names of the 3 x 3 cells
COUNTS = {1: "one", 2: "two", 3: "three"}
COMBINATIONS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
# One partner of each colour and each shape, 8 of 64: never in a training scene.
HELD_OUT = [(colour, SHAPES[(3 * i + 1) % 8]) for i, colour in enumerate(COLOURS)]
ALLOWED = [pair for pair in COMBINATIONS if pair not in HELD_OUT]
# words of zero-shot prompts that the captions may not use
PROMPT_WORDS = "a an the of in on with photo picture image drawing shape shapes object color colour"


# -----------------------------------------------------------------------------
# scenes


def make_scene(rng, held_out=False, count=None, first=None):
    """A scene as a plain dict, ready for JSON. `rng` is a random.Random. With `held_out` the first
    object is one of the HELD_OUT combinations, else none is. `count` asks for 1..3 objects, `first`
    for the (colour, shape) of the first one."""
    count = count or rng.choice((1, 1, 2, 3))
    first = first or rng.choice(HELD_OUT if held_out else ALLOWED)
    pairs = [first] + rng.sample([pair for pair in ALLOWED if pair != first], count - 1)
    cells = rng.sample(range(9), count)  # one object a cell: nothing overlaps
    objects = [make_object(rng, *pair, *divmod(cell, 3)) for pair, cell in zip(pairs, cells)]
    return {
        "background": rng.choice(list(BACKGROUNDS)),
        "objects": objects,
        "relation": relate(objects[0]["box"], objects[1]["box"]) if count > 1 else None,
        "held_out": first in HELD_OUT,
    }


def make_object(rng, colour, shape, row, column):
    size = rng.choice(list(SIZES))
    radius = SIZES[size] * rng.uniform(0.95, 1.0)
    x, y = ((2 * cell + 1) / 6 + rng.uniform(-0.01, 0.01) for cell in (column, row))  # the centre
    position = f"{ROWS[row]} {COLUMNS[column]}".strip() or "center"
    box = [round(v, 4) for v in (x - radius, y - radius, x + radius, y + radius)]
    return {"colour": colour, "shape": shape, "size": size, "texture": rng.choice(TEXTURES),
            "position": position, "box": box}  # fmt: skip


def relate(a, b):
    """How box a lies to box b, along the axis on which they are farther apart."""
    dx, dy = (b[0] + b[2] - a[0] - a[2]), (b[1] + b[3] - a[1] - a[3])
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


# -----------------------------------------------------------------------------
# pictures


def ngon(n, *radii):
    """n corners round the origin, the first one up; radii taken in turn (two make a star)."""
    turns = [(radii[i % len(radii)], 2 * math.pi * i / n) for i in range(n)]
    return [(r * math.sin(t), -r * math.cos(t)) for r, t in turns]


def heart(n=48):
    def corner(t, cos=math.cos):
        y = 13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)
        return math.sin(t) ** 3, -y / 17 - 0.15

    return [corner(2 * math.pi * i / n) for i in range(n)]


ARM = 0.32  # half the width of the cross's bars
HOLE = 0.45  # radius of the ring's hole
OUTLINES = {  # corners in -1..1
    "circle": ngon(48, 1),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "star": ngon(10, 1.05, 0.45),
    "ring": ngon(48, 1),
    "cross": [(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
              (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)],
    "diamond": ngon(4, 1, 0.72),
    "heart": heart(),
}  # fmt: skip


def draw(scene, size):
    """The scene as an RGB picture of size x size pixels: drawn 4 x as large, then averaged."""
    side = 4 * size
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene["background"]])
    for o in scene["objects"]:
        x0, y0, x1, y1 = (round(v * side) for v in o["box"])
        w, h = x1 - x0, y1 - y0
        sheet = paint(o["colour"], o["texture"], w, h, step=side / 12)
        mask = Image.new("1", (w, h))
        pen, cut = ImageDraw.Draw(sheet), ImageDraw.Draw(mask)
        line = side // 80  # width of the white line: about one pixel of the result
        for scale in (1, HOLE) if o["shape"] == "ring" else (1,):
            outline = [(scale * x, scale * y) for x, y in OUTLINES[o["shape"]]]
            points = [((1 + x) / 2 * w, (1 + y) / 2 * h) for x, y in outline]
            pen.line(points + points[:2], fill="white", width=2 * line, joint="curve")
            cut.polygon(points, fill=int(scale == 1))
        image.paste(sheet, (x0, y0), mask)
    return image.reduce(4)


def paint(colour, texture, w, h, step):
    """A sheet of w x h pixels; stripes or dots are a dark shade of its colour, `step` apart."""
    sheet = Image.new("RGB", (w, h), COLOURS[colour])
    pen, dark = ImageDraw.Draw(sheet), tuple(int(0.45 * v) for v in COLOURS[colour])
    for i in range(math.ceil(h / step)):
        y = (i + 0.25) * step
        if texture == "striped":
            pen.rectangle((0, y, w, y + 0.5 * step), fill=dark)
        elif texture == "dotted":
            for j in range(math.ceil(w / step)):
                x = (j + 0.25) * step
                pen.ellipse((x, y, x + 0.55 * step, y + 0.55 * step), fill=dark)
    return sheet


# -----------------------------------------------------------------------------
# captions


def describe(scene, rng):
    """(short, long): alt text that names a thing or two; a caption that leaves nothing out."""
    objects, ground = scene["objects"], scene["background"]
    names = [f"{o['colour']} {o['shape']}" for o in objects[: rng.choice((1, 2))]]
    short = rng.choice(
        ("{}", "{} on {}", "a {}", "a {} on {}", "photo of a {}", "{}, {} background")
    ).format(" and ".join(names), ground)

    things = full(objects[0], rng)
    if scene["relation"]:
        things += f", {scene['relation']} {full(objects[1], rng)}"
    if len(objects) == 3:
        things += f", and {full(objects[2], rng)}"
    count = f"{COUNTS[len(objects)]} shape{'s' if len(objects) > 1 else ''}"
    long = rng.choice(
        (
            f"{count} on a {ground} background: {things}",
            f"{things}. {count} on {ground}",
            f"{ground} background with {count}: {things}",
            f"picture of {count}: {things}, on {ground}",
        )
    )
    return tuple(re.sub(r"\ba (?=[aeiou])", "an ", caption) for caption in (short, long))


def full(o, rng):
    """One object in all its words."""
    side = o["position"] in ("top", "bottom", "left", "right")
    at = rng.choice(("at the", "on the")) if side else "in the"
    return f"a {o['size']} {o['texture']} {o['colour']} {o['shape']} {at} {o['position']}"


# -----------------------------------------------------------------------------
# files


def jpeg(scene, size):
    buffer = io.BytesIO()
    # full chroma (subsampling 0): lines and textures are one or two pixels wide
    draw(scene, size).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def write_shard(task, out_dir, size, seed):
    """Write one tar of the samples start..stop-1; return the words of its captions."""
    split, shard, start, stop = task
    words, seen = set(), set()
    with tarfile.open(os.path.join(out_dir, f"{split}-{shard:05d}.tar"), "w") as tar:
        for i in range(start, stop):
            rng = random.Random(f"{seed} {split} {i}")  # a sample depends on its own number only
            while True:
                scene = make_scene(rng, held_out=split == "val" and i % 2 == 1)
                # validation: each long caption is true of one picture alone
                facts = sorted(str({**o, "box": None}) for o in scene["objects"])
                facts = (scene["background"], *facts)
                if split == "train" or facts not in seen:
                    break
            seen.add(facts)
            short, long = describe(scene, rng)
            meta = {"short": short, "long": long, "captions": [short, long], "scene": scene}
            texts = short.encode(), json.dumps(meta).encode()
            for ending, content in zip(("jpg", "txt", "json"), (jpeg(scene, size), *texts)):
                add_member(tar, f"{i:08d}.{ending}", content)
            words.update(re.findall(r"[a-z]+|[^a-z ]", f"{short} {long}"))
    return words


def write_classes(out_dir, size, seed, per_class):
    """Folders zeroshot/colour/NAME and zeroshot/shape/NAME of single objects, all pairs alike."""
    for kind in ("colour", "shape"):
        for name in COLOURS if kind == "colour" else SHAPES:
            folder = os.path.join(out_dir, "zeroshot", kind, name)
            os.makedirs(folder)
            pairs = [pair for pair in COMBINATIONS if name in pair]
            for i in range(per_class):
                rng = random.Random(f"{seed} {kind} {name} {i}")
                scene = make_scene(rng, count=1, first=pairs[i % len(pairs)])
                with open(os.path.join(folder, f"{i:03d}.jpg"), "wb") as f:
                    f.write(jpeg(scene, size))


def make_shapes(out_dir, train=20_000, val=1_000, size=72, per_class=40, seed=0, per_shard=1_000):
    """Draw the data set into `out_dir`, which appears complete or not at all. `size` in pixels."""
    out_dir = os.path.abspath(out_dir)
    check(not os.path.exists(out_dir), f"{out_dir} is there already: remove it to draw it again")
    os.makedirs(os.path.dirname(out_dir), exist_ok=True)
    starts = range(0, train, per_shard)
    tasks = [("val", 0, 0, val)]
    tasks += [("train", k, start, min(start + per_shard, train)) for k, start in enumerate(starts)]
    words = {*PROMPT_WORDS.split(), *COLOURS, *BACKGROUNDS, *SHAPES, *SIZES, *TEXTURES}
    with tempfile.TemporaryDirectory(prefix=".shapes-", dir=os.path.dirname(out_dir)) as temp:
        folder = os.path.join(temp, "shapes")
        os.mkdir(folder)
        write = functools.partial(write_shard, out_dir=folder, size=size, seed=seed)
        # spawn: to fork a process that has threads, as any that imported torch, may hang
        with multiprocessing.get_context("spawn").Pool(min(os.cpu_count(), len(tasks))) as pool:
            classes = pool.apply_async(write_classes, (folder, size, seed, per_class))
            shards = pool.imap(write, tasks)
            for found in tqdm(shards, "drawing shapes", len(tasks), unit="shard", disable=None):
                words |= found
            classes.get()  # raises what went wrong in there
        vocabulary = vocabulary_from_words(sorted(words))
        data.write_file(f"{folder}/vocab.tiktoken", lambda file: file.write(vocabulary.encode()))
        os.rename(folder, out_dir)


def main(argv):
    parser = argparse.ArgumentParser(description="Draw the shapes as shards.", allow_abbrev=False)
    parser.add_argument("--out", default="shapes", help="folder to make (default shapes)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes")
    args = parser.parse_args(argv)
    make_shapes(args.out, seed=args.seed)


if __name__ == "__main__":
    cli(main)
