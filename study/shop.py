"""Photographs for the study: a shop's products with their titles, to train and to validate on, and
folders of classes.

    python -m study.shop DIR

DIR holds the hub data set ashraq/fashion-product-images-small, its pictures as images/ID.jpg, and a
table pairs.csv with the columns image (ID.jpg), caption (productDisplayName), type (articleType)
and colour (baseColour). What is made of them goes to out_study/shop: 4,000 and 24,000 pairs to
train on, each with a vocabulary of their words, 2,000 pairs to validate on, and folders of
classes: ten types, ten colours, and both at once.

Hashes decide where a product is, so it is the same place for everyone. Products with equal titles
or equal pictures are on one side. The titles of the validation pairs are unique, so R@1 can be
100 %, and the classes have products that are neither trained nor validated on.
"""

import csv
import hashlib
import shutil
from collections import Counter
from pathlib import Path

from cli import check, make_parser, run_command
from scripts import pack, vocab

OUT = Path("out_study/shop")
TRAIN = (4_000, 24_000)  # pairs: the first of the same order
VAL = 2_000
MOST = {"type": 200, "colour": 100, "both": 50}  # pictures of a class, enough for its score
# Classes are named as titles say them.
TYPES = {
    "Tshirts": "t-shirt", "Shirts": "shirt", "Casual Shoes": "casual shoes", "Watches": "watch",
    "Sports Shoes": "sports shoes", "Kurtas": "kurta", "Tops": "top", "Handbags": "handbag",
    "Heels": "heels", "Sunglasses": "sunglasses",
}  # fmt: skip
COLOURS = "black white blue brown grey red green pink purple yellow".split()


def hashed(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def is_trained(row):
    return hashed(f"side {row['caption']}") % 100 < 60


def split(rows):
    """Products in a random order, each with the content of its file -> those to train on, to
    validate on, and to classify."""
    titles = Counter(row["caption"] for row in rows)
    train = [row for row in rows if is_trained(row)]
    seen = {row["content"] for row in train}
    others = [row for row in rows if not is_trained(row) and row["content"] not in seen]
    val = [row for row in others if titles[row["caption"]] == 1][:VAL]
    used = {row["image"] for row in val}
    return train, val, [row for row in others if row["image"] not in used]


def write_shards(rows, images, out):
    """Pack pairs, with a vocabulary of their words."""
    table = out.with_suffix(".csv")
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("image", "caption"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    pack.main(["--csv", f"{table}", "--images", f"{images}", "--out", f"{out}", "--val", "0"])
    vocab.main([f"{out}", "--out", f"{out}/vocab.tiktoken"])


def write_picture(kind, name, row):
    """Add a product to the folder of a class, unless that has enough."""
    folder = OUT / kind / name
    folder.mkdir(parents=True, exist_ok=True)
    if len([*folder.iterdir()]) < MOST[kind]:
        (folder / row["image"]).write_bytes(row["content"])


def write_classes(rows):
    for row in rows:
        name = TYPES.get(row["type"])
        colour = row["colour"].lower()
        if name:
            write_picture("type", name, row)
        if colour in COLOURS:
            write_picture("colour", colour, row)
        if name and colour in COLOURS:
            write_picture("both", f"{colour} {name}", row)
    for folder in [*OUT.glob("both/*")]:
        if len([*folder.iterdir()]) < MOST["both"]:  # too few to tell
            shutil.rmtree(folder)


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="with images/ and pairs.csv")
    args = parser.parse_args(argv)
    check(not OUT.exists(), f"{OUT} is there already")
    OUT.mkdir(parents=True)
    images = args.folder / "images"
    with open(args.folder / "pairs.csv", encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: hashed(row["image"]))
    for row in rows:
        row["content"] = (images / row["image"]).read_bytes()
    train, val, classified = split(rows)
    for n in TRAIN:
        write_shards(train[:n], images, OUT / f"{n}")
    write_shards(val, images, OUT / "val")
    write_classes(classified)


if __name__ == "__main__":
    run_command(main)
