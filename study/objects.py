"""A world of photographs: CIFAR-10's, each on a setting drawn as those of the scenes, as shards and
folders of classes, for train.py as any other data.

    python -m study.compare --world objects --photographs DIR ...

DIR has photographs in train/CLASS/ and test/CLASS/. Any do, if there are enough. These lines make
it of CIFAR-10:

    for split in ("train", "test"):
        photographs = torchvision.datasets.CIFAR10(".", split == "train", download=True)
        for i, (picture, label) in enumerate(photographs):
            folder = Path(DIR, split, photographs.classes[label])
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{i:05d}.png")
"""

import json
import random
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

from cli import check
from data import add_member, progress, words_to_tiktoken
from scripts import scenes

SIDE = 32  # pixels: of a photograph
CORNERS = (3, 37)  # pixels: where it may begin, inside the border
TRAIN = 20_000  # photographs that training shows, drawn for each world
VAL = 1_000  # pairs to search among
CLASSIFIED = 2_000  # photographs to name the class of, and as many that a probe learns from


def read_photographs(folder, rng, n):
    """n photographs of a folder with a folder for each class, as a list of (class, picture), in the
    order of a draw."""
    paths = sorted(Path(folder).glob("*/*.[jp][pn]g"))
    check(len(paths) >= n, f"{folder} has {len(paths):,} photographs, and {n:,} are needed")
    photographs = []
    for path in rng.sample(paths, n):
        picture = Image.open(path).convert("RGB").resize((SIDE, SIDE))
        photographs.append((path.parent.name, picture))
    return photographs


def place(photograph, rng, settings):
    """A photograph in a corner of a setting: the bytes of a JPEG file, and the setting's name."""
    setting = rng.choice(settings)
    picture = scenes.draw_setting(*setting, 4 * scenes.SIZE).reduce(4)
    picture.paste(photograph, (rng.choice(CORNERS), rng.choice(CORNERS)))
    return scenes.jpeg(picture), scenes.describe_setting(*setting)


def describe(name, ground):
    """The captions of a photograph. The short one is its setting alone."""
    thing = scenes.with_article(name)
    long = [f"{thing} on {ground}", f"{ground} and {thing}", f"photo of {thing} on {ground}"]
    return {"short": ground, "long": long}


def write_pairs(path, photographs, rng, settings):
    """Write a shard. Returns the words of its captions."""
    words = set()
    with tarfile.open(path, "w") as tar:
        for i, (name, photograph) in enumerate(progress(photographs, path.name)):
            content, ground = place(photograph, rng, settings)
            captions = describe(name, ground)
            add_member(tar, f"{i:08d}.jpg", content)
            add_member(tar, f"{i:08d}.json", json.dumps(captions).encode())
            words.update(" ".join(captions["long"]).split())
    return words


def write_classes(folder, photographs, rng, settings):
    """Write a folder for each class."""
    for i, (name, photograph) in enumerate(photographs):
        content, _ = place(photograph, rng, settings)
        path = Path(folder, name, f"{i:05d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def make_objects(out_dir, source, settings, seed):
    """Write a world into `out_dir`, which appears complete or not at all. Each seed draws its own
    photographs, settings and corners: to train on, and for a probe to learn from, those of
    source/train, to search among and to name those of source/test."""
    rng = random.Random(f"objects {seed}")
    settings = scenes.some_settings(settings, seed)
    shown = read_photographs(f"{source}/train", rng, TRAIN)
    others = read_photographs(f"{source}/test", rng, VAL + CLASSIFIED)
    with tempfile.TemporaryDirectory(prefix=".objects-", dir=out_dir.parent) as temporary:
        folder = Path(temporary, "objects")
        folder.mkdir()
        words = write_pairs(folder / "train-00000.tar", shown, rng, settings)
        words |= write_pairs(folder / "val-00000.tar", others[:VAL], rng, settings)
        write_classes(folder / "zeroshot" / "object", others[VAL:], rng, settings)
        write_classes(folder / "learn", shown[:CLASSIFIED], rng, settings)
        (folder / "vocab.tiktoken").write_text(words_to_tiktoken(sorted(words)))
        folder.rename(out_dir)
