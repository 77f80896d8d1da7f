"""A world of photographs: CIFAR-10's, each on a setting drawn as those of the scenes, as shards and
folders of classes, for train.py as any other data.

    python -m study.compare --photographs DIR ...

DIR has photographs, .jpg or .png, in train/CLASS/ and test/CLASS/. Any do, if there are enough.
These lines make it of CIFAR-10:

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
CLASSIFIED = 2_000  # photographs in zeroshot/object, and as many for a probe to learn from


def place_photographs(folder, n, rng, settings):
    """n photographs, drawn from a folder with a folder for each class, each in a corner of a
    setting: a list of (class, name of the setting, bytes of a JPEG file)."""
    paths = sorted(Path(folder).glob("*/*.[jp][pn]g"))
    check(len(paths) >= n, f"{folder} has fewer than {n:,} photographs")
    placed = []
    for path in progress(rng.sample(paths, n), "placing photographs"):
        setting = rng.choice(settings)
        picture = scenes.draw_setting(*setting, 4 * scenes.SIZE).reduce(4)
        photograph = Image.open(path).convert("RGB").resize((SIDE, SIDE))
        picture.paste(photograph, (rng.choice(CORNERS), rng.choice(CORNERS)))
        ground = scenes.describe_setting(*setting)
        placed.append((path.parent.name, ground, scenes.jpeg(picture)))
    return placed


def write_shard(path, placed):
    """Write photographs with their captions. The short one is the setting alone."""
    with tarfile.open(path, "w") as tar:
        for i, (name, ground, content) in enumerate(placed):
            thing = scenes.with_article(name)
            fields = {
                "short": ground,
                "long": [
                    f"{thing} on {ground}",
                    f"{ground} and {thing}",
                    f"photo of {thing} on {ground}",
                ],
            }
            add_member(tar, f"{i:08d}.jpg", content)
            add_member(tar, f"{i:08d}.json", json.dumps(fields).encode())


def write_classes(folder, placed):
    """Write a folder for each class."""
    for i, (name, _, content) in enumerate(placed):
        path = folder / name / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def make_objects(out_dir, source, settings, seed):
    """Write a world into `out_dir`, which appears complete or not at all. Each seed draws its own
    photographs, settings and corners: to train on, and for a probe to learn from, those of
    source/train, to search among and to name those of source/test."""
    rng = random.Random(f"objects {seed}")
    settings = scenes.some_settings(settings, seed)
    shown = place_photographs(f"{source}/train", TRAIN, rng, settings)
    others = place_photographs(f"{source}/test", VAL + CLASSIFIED, rng, settings)
    names = " ".join(f"{name} {ground}" for name, ground, _ in shown + others)
    words = {*scenes.WORDS, *names.split()}
    with tempfile.TemporaryDirectory(prefix=".objects-", dir=out_dir.parent) as temporary:
        folder = Path(temporary, "objects")
        folder.mkdir()
        (folder / "vocab.tiktoken").write_text(words_to_tiktoken(sorted(words)))
        write_shard(folder / "train-00000.tar", shown)
        write_shard(folder / "val-00000.tar", others[:VAL])
        write_classes(folder / "zeroshot" / "object", others[VAL:])
        write_classes(folder / "learn", shown[:CLASSIFIED])
        folder.rename(out_dir)
