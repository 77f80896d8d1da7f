"""Photographs for the study: a shop's products with their titles, to train and to validate on, and
folders of classes.

    python -m study.shop DIR

DIR holds the hub data set ashraq/fashion-product-images-small, its pictures as images/ID.jpg, and a
table pairs.csv with the columns image (ID.jpg), caption (productDisplayName), type (articleType)
and colour (baseColour). What is made of them goes to out_study/shop: 4,000 and 24,000 pairs to
train on, each with a vocabulary of their words, 2,000 pairs to validate on, and folders of classes:
ten types, ten colours, and both at once.

Hashes decide where a product is, so it is the same place for everyone. Products with equal titles
are on one side, and pictures that are trained on are on no other. The titles of the validation
pairs are unique, so R@1 can be 100 %, and what is classified is neither trained nor validated on.
"""

import csv
import hashlib
from collections import Counter, defaultdict
from pathlib import Path

from cli import make_parser, new_folder, run_command
from scripts import vocab
from scripts.pack import ShardWriter

OUT = Path("out_study/shop")
VAL = 2_000  # pairs
NUMBERS = {"type": 200, "colour": 100, "both": 50}  # pictures of a class
# Classes are named as titles say them.
TYPES = {
    "Tshirts": "t-shirt", "Shirts": "shirt", "Casual Shoes": "casual shoes", "Watches": "watch",
    "Sports Shoes": "sports shoes", "Kurtas": "kurta", "Tops": "top", "Handbags": "handbag",
    "Heels": "heels", "Sunglasses": "sunglasses",
}  # fmt: skip
COLOURS = {
    "Black": "black", "White": "white", "Blue": "blue", "Brown": "brown", "Grey": "grey",
    "Red": "red", "Green": "green", "Pink": "pink", "Purple": "purple", "Yellow": "yellow",
}  # fmt: skip


def hashed(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def split(rows):
    """Products with the content of their pictures -> those to train on, to validate on, and to
    classify."""
    titles = Counter(row["caption"] for row in rows)
    trained = {title for title in titles if hashed(f"side {title}") % 100 < 60}
    train = [row for row in rows if row["caption"] in trained]
    shown = {row["content"] for row in train}
    others = [row for row in rows if row["caption"] not in trained and row["content"] not in shown]
    val = [row for row in others if titles[row["caption"]] == 1][:VAL]
    used = {row["image"] for row in val}
    return train, val, [row for row in others if row["image"] not in used]


def write_shards(rows, out):
    """Pack pairs, with a vocabulary of their words."""
    out.mkdir(parents=True)
    writer = ShardWriter(out, "train")
    for row in rows:
        writer.add(".jpg", row["content"], {"captions": [row["caption"]]})
    writer.close()
    vocab.main([f"{out}", "--out", f"{out}/vocab.tiktoken"])


def write_classes(rows, out):
    """Write a folder for each class that has enough products."""
    classes = defaultdict(list)
    for row in rows:
        name = TYPES.get(row["type"])
        colour = COLOURS.get(row["colour"])
        if name:
            classes["type", name].append(row)
        if colour:
            classes["colour", colour].append(row)
        if name and colour:
            classes["both", f"{colour} {name}"].append(row)
    for (kind, label), products in classes.items():
        n = NUMBERS[kind]
        if len(products) >= n:
            folder = out / kind / label
            folder.mkdir(parents=True)
            for row in products[:n]:
                (folder / row["image"]).write_bytes(row["content"])


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="with images/ and pairs.csv")
    folder = parser.parse_args(argv).folder
    with open(folder / "pairs.csv", encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: hashed(row["image"]))
    for row in rows:
        row["content"] = (folder / "images" / row["image"]).read_bytes()
    train, val, classified = split(rows)
    with new_folder(OUT) as out:
        write_shards(train[:4000], out / "4000")
        write_shards(train[:24000], out / "24000")
        write_shards(val, out / "val")
        write_classes(classified, out)


if __name__ == "__main__":
    run_command(main)
