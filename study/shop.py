"""Make shards of photographs for the study, a shop's products with their titles:

    python -m study.shop DIR

DIR holds the hub data set ashraq/fashion-product-images-small: its pictures as images/ID.jpg, and a
table pairs.csv. The columns of the table are image (ID.jpg), caption (productDisplayName) and type
(articleType).

The splits of seed 15 go to out_study/shop/15. There are 24,000 pairs to train on with a vocabulary
of their words, and 2,000 pairs to validate on. Two folders have 200 pictures for each type of
product. Those in `fit` are training pictures, on which a linear probe is fitted. Those in `type`
are for zero-shot classification and for the test of the probe.

Hashes of the seed decide where a product is, so everyone gets the same splits. Products with equal
titles are on one side, and no picture is on two. The titles of the validation pairs are unique, so
R@1 can be 100 %. Pictures in `type` are neither trained nor validated on.
"""

import csv
import hashlib
from collections import Counter
from pathlib import Path

from common.cli import make_parser, run_command
from common.machine import new_folder
from scripts import vocab
from scripts.pack import write_shards

OUT = Path("out_study/shop")
SEEDS = (*range(3), *range(15, 25))  # of the published rows
# Types are named as titles say them.
TYPES = {
    "Tshirts": "t-shirt", "Shirts": "shirt", "Casual Shoes": "casual shoes", "Watches": "watch",
    "Sports Shoes": "sports shoes", "Kurtas": "kurta", "Tops": "top", "Handbags": "handbag",
    "Heels": "heels", "Sunglasses": "sunglasses",
}  # fmt: skip


def hashed(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def split(rows, seed):
    """Return three lists of products, in the order of this seed: to train on, to validate on, and
    to classify."""
    titles = Counter(row["caption"] for row in rows)
    trained = {title for title in titles if hashed(f"side {seed} {title}") % 100 < 60}
    rows = sorted(rows, key=lambda row: hashed(f"{seed} {row['image']}"))
    train = [row for row in rows if row["caption"] in trained]
    shown = {row["content"] for row in train}
    others = [row for row in rows if row["caption"] not in trained and row["content"] not in shown]
    val = [row for row in others if titles[row["caption"]] == 1][:2000]
    used = {row["content"] for row in val}
    classified = [row for row in others if row["content"] not in used]
    return train[:24_000], val, classified


def write_split(rows, seed, out):
    train, val, classified = split(rows, seed)
    out.mkdir()
    for name, part in (("train", train), ("val", val)):
        samples = ((name, ".jpg", row["content"], {"captions": [row["caption"]]}) for row in part)
        write_shards(out, samples)
    vocab.main([f"{out}/train-*.tar", "--out", f"{out}/vocab.tiktoken"])
    for kind, part in (("fit", train), ("type", classified)):
        for theirs, name in TYPES.items():
            folder = out / kind / name
            folder.mkdir(parents=True)
            for row in [row for row in part if row["type"] == theirs][:200]:
                (folder / row["image"]).write_bytes(row["content"])


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="with images/ and pairs.csv")
    args = parser.parse_args(argv)
    with open(args.folder / "pairs.csv", encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    for row in rows:
        row["content"] = (args.folder / "images" / row["image"]).read_bytes()
    with new_folder(OUT) as folder:
        for seed in SEEDS:
            write_split(rows, seed, folder / str(seed))


if __name__ == "__main__":
    run_command(main)
