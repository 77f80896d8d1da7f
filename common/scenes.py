"""Draw the built-in data: scenes with captions, written as real tar shards. So the first
`python train.py` takes the same path as a run on CC3M, without a download.

A scene has a *setting*, a cloth of some colour and pattern with a border around it. There are 256
settings. On the cloth lie one or two *objects*, each with a colour and a shape. A scene has two
captions. The short one is like alt text on the web, which mentions a thing or two. The long one
names everything.

This world is made to show what SuperCLIP is for. In a small batch few scenes share their setting.
So CLIP can find most captions that name the setting without looking at the objects. The word head
asks for the objects in every picture.

Some combinations of colour and shape never occur in training (HELD_OUT). A model that recognises
them has learned "red" and "star" as two words.

Lengths and positions are shares of the picture's side. x runs to the right and y down.
"""

import io
import itertools
import math
import random
import tarfile
from functools import cache, partial
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

from common.cli import check, new_folder, progress
from common.processes import map_in_processes
from common.shards import add_sample
from common.tokenizer import words_to_tiktoken

VERSION = 1  # Increase this number when what is drawn changes, so that no run takes older scenes.
SIZE = 72  # the side of a picture in pixels
SIDE = 4 * SIZE  # Draw pictures four times as large. Averaged to SIZE they have smooth edges.

# No colour of a cloth, a border or an object shares its name with another, so each word is clear.
CLOTHS = {
    "black": (10, 10, 12), "gray": (72, 74, 80), "navy": (16, 24, 88), "maroon": (88, 14, 34),
    "brown": (84, 52, 24), "olive": (62, 70, 18), "teal": (0, 72, 74), "indigo": (52, 6, 92),
}  # fmt: skip
PATTERNS = ("plain", "striped", "checked", "dotted")
BORDERS = {
    "ivory": (240, 238, 212), "gold": (204, 166, 20), "rose": (204, 64, 124),
    "mint": (70, 220, 164), "sky": (84, 172, 240), "coral": (250, 122, 92),
    "lilac": (182, 142, 242), "slate": (110, 122, 142),
}  # fmt: skip
SETTINGS = list(itertools.product(CLOTHS, PATTERNS, BORDERS))

COLOURS = {
    "red": (240, 50, 50), "orange": (255, 150, 20), "yellow": (250, 235, 60),
    "green": (60, 200, 80), "cyan": (80, 230, 240), "blue": (70, 120, 255),
    "purple": (170, 80, 240), "pink": (255, 150, 205),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
COMBINATIONS = list(itertools.product(COLOURS, SHAPES))
# 8 of the 64 combinations. Each colour and each shape occurs once in them.
HELD_OUT = [(colour, SHAPES[(3 * i + 1) % 8]) for i, colour in enumerate(COLOURS)]
SEEN = [combination for combination in COMBINATIONS if combination not in HELD_OUT]


def make_scene(rng, combinations, count=None):
    """Return a random scene as a plain dict, ready for JSON. combinations: list of the (colour,
    shape) that its objects may have; count: the number of objects, by default two in a quarter of
    the scenes and one in the others."""
    first = rng.choice(combinations)
    looks = [first]  # the colour and shape of each object
    if count is None:
        count = rng.choice((1, 1, 1, 2))
    if count == 2:
        # The objects differ in colour and in shape, so that each word belongs to one of them.
        others = [look for look in combinations if look[0] != first[0] and look[1] != first[1]]
        looks.append(rng.choice(others))
    cells = rng.sample(range(9), len(looks))  # one object in a cell, so that none overlap
    objects = []
    for (colour, shape), cell in zip(looks, cells):
        row, column = divmod(cell, 3)
        radius = rng.uniform(0.145, 0.155)  # it almost fills its cell of the 3 x 3 grid
        x = (2 * column + 1) / 6  # the centre
        y = (2 * row + 1) / 6
        corners = x - radius, y - radius, x + radius, y + radius
        box = [round(v, 4) for v in corners]
        objects.append({"colour": colour, "shape": shape, "box": box})
    cloth, pattern, border = rng.choice(SETTINGS)
    return {"cloth": cloth, "pattern": pattern, "border": border, "objects": objects}


def with_article(name):
    """Return "a red star" for "red star", and "an orange star" for "orange star"."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def describe(scene, rng):
    """Return the captions of a scene, (short, long): alt text that mentions a thing or two, and a
    caption that leaves nothing out."""
    cloth, pattern, border = scene["cloth"], scene["pattern"], scene["border"]
    ground = f"{pattern} {cloth} with {border}"
    names = [with_article(f"{o['colour']} {o['shape']}") for o in scene["objects"]]
    things = " and ".join(names)
    first = scene["objects"][0]
    picture = rng.choice(("photo", "picture"))
    short = [
        ground,
        f"{cloth} {pattern}, {border}",
        f"a {first['shape']} on {cloth}",
        f"something {first['colour']} on {cloth}",
        f"a {picture} of {names[0]}",
    ]
    # With start and end these have at most 16 tokens. One more would double the work of the text
    # tower, because batches are padded to a multiple of 16.
    long = [
        f"{things} on {ground}.",
        f"{ground} and {things}",
        f"{picture} of {things} on {ground}",
    ]
    return rng.choice(short), rng.choice(long)


# -----------------------------------------------------------------------------
# Pictures


def ngon(n, *radii):
    """Return n corners (x, y) around the origin, the first one at the top. The corners take the
    radii in turn, so that two radii make a star."""
    corners = []
    for i in range(n):
        radius = radii[i % len(radii)]
        angle = 2 * math.pi * i / n
        x = radius * math.sin(angle)
        y = -radius * math.cos(angle)
        corners.append((x, y))
    return corners


def heart(t):
    """Return the point (x, y) of a heart's outline at angle t."""
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return math.sin(t) ** 3, -y / 17 - 0.15


ARM = 0.32  # half the width of the cross's bars
OUTLINES = {  # corners, from -1 to 1
    "circle": ngon(48, 1),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "star": ngon(10, 1.05, 0.45),
    "ring": ngon(48, 1),
    "cross": [(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
              (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)],
    "diamond": ngon(4, 1, 0.72),
    "heart": [heart(2 * math.pi * i / 48) for i in range(48)],
}  # fmt: skip
HOLE = ngon(48, 0.45)  # the hole of the ring


def draw(scene):
    """Return an RGB picture of the scene, SIZE x SIZE pixels."""
    cloth = CLOTHS[scene["cloth"]]
    image = Image.new("RGB", (SIDE, SIDE), cloth)
    pen = ImageDraw.Draw(image)
    # The pattern has a lighter shade, and lies on a grid of 6 x 6 cells.
    light = tuple(v + 22 for v in cloth)
    step = SIDE // 6
    third = step // 3
    for x, y in itertools.product(range(0, SIDE, step), repeat=2):
        if scene["pattern"] == "striped":
            pen.rectangle((x, y, x + third, y + step), fill=light)
        elif scene["pattern"] == "checked" and (x + y) // step % 2 == 1:
            pen.rectangle((x, y, x + step - 1, y + step - 1), fill=light)
        elif scene["pattern"] == "dotted":
            pen.ellipse((x + third, y + third, x + 2 * third, y + 2 * third), fill=light)
    pen.rectangle((0, 0, SIDE - 1, SIDE - 1), outline=BORDERS[scene["border"]], width=SIDE // 24)
    for thing in scene["objects"]:
        draw_object(image, thing)
    return image.reduce(4)


def draw_object(image, thing):
    """Draw an object with a white outline into its box."""
    x0, y0, x1, y1 = (round(v * SIDE) for v in thing["box"])
    area, line = masks(thing["shape"], x1 - x0, y1 - y0)
    image.paste(COLOURS[thing["colour"]], (x0, y0, x1, y1), area)
    image.paste("white", (x0, y0, x1, y1), line)


@cache  # there are few sizes, and lines with round corners take long
def masks(shape, width, height):
    """Return two masks, of the area of a shape and of its outline inside the area."""
    area = Image.new("1", (width, height))
    line = Image.new("1", (width, height))
    outlines = [OUTLINES[shape]]
    if shape == "ring":
        outlines.append(HOLE)
    for outline in outlines:
        points = [((1 + x) / 2 * width, (1 + y) / 2 * height) for x, y in outline]
        ImageDraw.Draw(area).polygon(points, fill=0 if outline is HOLE else 1)
        # Half of the line lies outside the area, so about one pixel of the picture is left.
        ImageDraw.Draw(line).line(points + points[:2], 1, width=SIDE // 28, joint="curve")
    return area, ImageChops.logical_and(line, area)


# -----------------------------------------------------------------------------
# Files

# Keep the colour of every pixel (subsampling 0), because lines are one or two pixels wide.
JPEG = {"format": "JPEG", "quality": 90, "subsampling": 0}

# The words of captions and prompts that are not among the names above. No text uses "in", but
# without it all later ids would change, and so would every run.
WORDS = "a an the of in on with and photo picture something , .".split()


def vocabulary():
    """Return the text of a .tiktoken file in which every word of the captions is one token."""
    names = {*CLOTHS, *PATTERNS, *BORDERS, *COLOURS, *SHAPES}
    return words_to_tiktoken(sorted(names | {*WORDS}))


def generator(what, seed):
    """Return the random.Random of one picture. what: a text that names the picture, so that it
    looks the same whichever process draws it."""
    if seed != 0:
        what = f"{what} of world {seed}"
    return random.Random(what)


def make_samples(split, numbers, seed=0):
    """Yield (number, scene, short caption, long caption) for each sample."""
    combinations = SEEN if split == "train" else COMBINATIONS
    seen = set()
    for i in numbers:
        rng = generator(f"{split} {i}", seed)
        scene = make_scene(rng, combinations)
        # Among validation pairs each long caption fits one picture only, so that R@1 can be 100 %.
        while split == "val" and facts(scene) in seen:
            scene = make_scene(rng, combinations)
        seen.add(facts(scene))
        short, long = describe(scene, rng)
        yield i, scene, short, long


def facts(scene):
    """Return what a long caption says of a scene, in a fixed order. It tells scenes apart."""
    objects = sorted(f"{o['colour']} {o['shape']}" for o in scene["objects"])
    return scene["cloth"], scene["pattern"], scene["border"], *objects


def write_shard(path, split, numbers, seed):
    """Write one shard. numbers: those of its samples."""
    with tarfile.open(path, "w") as tar:
        for i, scene, short, long in make_samples(split, numbers, seed):
            image = io.BytesIO()
            draw(scene).save(image, **JPEG)
            fields = {"short": short, "long": long, "scene": scene}
            add_sample(tar, f"{i:08d}", ".jpg", image.getvalue(), short, fields)


def write_class(folder, looks, n, seed):
    """Write a folder with n pictures of single objects, which take these looks in turn."""
    folder.mkdir(parents=True)
    kind, name = folder.parts[-2:]
    for i in range(n):
        rng = generator(f"{kind} {name} {i}", seed)
        scene = make_scene(rng, [looks[i % len(looks)]], 1)
        draw(scene).save(folder / f"{i:03d}.jpg", **JPEG)


def write_classes(folder, n, seed):
    """Write the folders for zero-shot classification: n single objects for each class, but a
    quarter of n for each of the 64 classes of colour_shape. In held_out only the combinations that
    training never shows have pictures. The 56 other folders are empty. Their names are classes that
    a picture can be mistaken for."""
    for kind, names in ("colour", COLOURS), ("shape", SHAPES):
        for name in names:
            looks = [look for look in COMBINATIONS if name in look]
            write_class(folder / kind / name, looks, n, seed)
    for look in COMBINATIONS:
        name = " ".join(look)
        write_class(folder / "colour_shape" / name, [look], n // 4, seed)
        n_held_out = n if look in HELD_OUT else 0
        write_class(folder / "held_out" / name, [look], n_held_out, seed)


def make_scenes(out_dir, train=20_000, val=1_000, pictures=40, seed=0):
    """Draw a data set into `out_dir`, which appears complete or not at all. train, val: numbers of
    pairs; pictures: number for each class; seed: a different seed draws different scenes."""
    print(f"drawing {train:,} scenes to train on into {out_dir}")
    with new_folder(out_dir) as folder:
        (folder / "version").write_text(str(VERSION))
        (folder / "vocab.tiktoken").write_bytes(vocabulary().encode())
        tasks = [
            partial(write_classes, folder / "zeroshot", pictures, seed),
            partial(write_shard, folder / "val-00000.tar", "val", range(val), seed),
        ]
        for start in range(0, train, 1000):
            path = folder / f"train-{start // 1000:05d}.tar"
            numbers = range(start, min(start + 1000, train))
            tasks.append(partial(write_shard, path, "train", numbers, seed))
        for _ in progress(map_in_processes(run_task, tasks), "drawing scenes", unit="shard"):
            pass


def run_task(task):
    task()


def find_or_make_scenes(out_dir, seed=0):
    """Draw a data set into `out_dir`, unless it is there, and return `out_dir`. If two runs draw it
    at once, the second one uses what the first one has drawn. Raise InputError if the scenes there
    have another VERSION or none."""
    try:
        if not Path(out_dir).exists():
            make_scenes(out_dir, seed=seed)
    except OSError:
        if not Path(out_dir).exists():
            raise
    file = Path(out_dir, "version")
    is_ours = file.exists() and file.read_text() == str(VERSION)
    advice = "Remove or rename it, and new scenes will be drawn."
    check(is_ours, f"{out_dir} was not drawn by this version of common/scenes.py. {advice}")
    return out_dir
