"""Make shards from a list of images and captions:

    python -m scripts.pack --csv pairs.csv --images photos/ --out shards/

The list is a CSV, TSV or JSONL file in UTF-8. Its columns are called image and caption, or
--image_column and --caption_column name them. The command makes large images smaller, unless you
give --size 0. It writes the rows that cannot be used to bad_rows.csv, with the reason.

All rows of one image become one sample. The .txt of a sample holds the first caption. The .json
holds all captions in the field `captions`. It also holds the name and hash of the image, and the
other columns of the list. For example, train.py finds a column `long` by --label_captions
json.long. If the rows of an image differ in a column, the field is a list.

A hash of the image file decides whether a sample is for training or for validation. So equal files
are never on both sides. An image keeps its side when the list grows, or is packed in parts.
"""

import csv
import hashlib
import io
import json
import os
import tarfile
from functools import partial
from multiprocessing.pool import ThreadPool  # threads: Pillow releases Python's global lock
from pathlib import Path

from PIL import Image

from common.cli import InputError, check, make_parser, number, progress, run_command
from common.images import FORMATS, upright_rgb
from common.machine import cores, new_folder
from common.shards import add_sample

# The formats that shards hold. MPO is a JPEG with a second picture behind it. Some phones make it.
KEPT = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"}
SHARD_SIZE = 1000  # samples

# -----------------------------------------------------------------------------
# The list


def read_rows(path):
    """Yield the rows of a list, each as (line number, dict of columns). Raise InputError if a line
    cannot be read. Leaving that line out would not do, because a quotation mark that is not closed
    may swallow all rows that follow."""
    line = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if "json" in path.suffix.lower():
                for line, text in enumerate(file, start=1):
                    if text.strip():
                        row = json.loads(text)
                        if not isinstance(row, dict):
                            raise ValueError("this is no object")
                        yield line, row
                return
            header = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=header.count)
            reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            for row in reader:
                line = reader.line_num
                yield line, row
    except (ValueError, csv.Error) as error:  # Wrong UTF-8 and wrong JSON raise a ValueError.
        advice = "Is it UTF-8? Is a quotation mark open? JSON needs a line for each image (JSONL)."
        raise InputError(f"{path}, near line {line}: {error}. {advice}") from None


def read_list(args):
    """Read the list. Return two values. The first is a dict of image -> list of its rows, each
    (line number, captions, dict of the other columns). The second is a list of rows that cannot be
    used, each (line number, image, reason)."""
    samples = {}
    bad = []
    for line, row in read_rows(args.csv):
        image = str(row.pop(args.image_column, None) or "").strip()
        texts = row.pop(args.caption_column, None)  # one text, or in JSON a list of texts
        texts = texts if isinstance(texts, list) else [texts]
        captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
        if None in row:
            bad.append((line, image, "more fields than columns: put the caption into quotes"))
        elif not image or not captions:
            reason = "no image or no caption: see --image_column and --caption_column"
            bad.append((line, image, reason))
        else:
            name = os.path.normpath(image)  # a.jpg and ./a.jpg are one image.
            samples.setdefault(name, []).append((line, captions, row))
    return samples, bad


# -----------------------------------------------------------------------------
# Samples


def merge(rows):
    """Return the fields of a sample's .json, which are the captions and the other columns. rows:
    all rows of one image. If they differ in a column, the field is a list."""
    captions = {}
    columns = {}  # name -> list of the different values
    for _, texts, row in rows:
        captions |= dict.fromkeys(texts)
        for name, value in row.items():
            values = columns.setdefault(name, [])
            if value not in (None, "", *values):
                values.append(value)
    fields = {name: x if len(x) > 1 else (x or [None])[0] for name, x in columns.items()}
    return {**fields, "captions": list(captions)}


def smaller(image, size):
    """Return the bytes of a JPEG whose short side has at most `size` pixels. image: of Pillow."""
    image.draft("RGB", (2 * size, 2 * size))  # Twice the size is enough for a sharp resize.
    image = upright_rgb(image)  # Turn it now, because the new file has no EXIF data.
    scale = min(1, size / min(image.size))
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90, comment=b"")  # without the comment of the old file
    return jpeg.getvalue()


def encode(item, args):
    """Return what goes into a shard, as (split, suffix, bytes of the image, fields of .json). If
    the image cannot be used, return the reason as a string. item: (image, its rows).

    A small file in a format of shards keeps its bytes. Encoding it again would lose quality."""
    name, rows = item
    size = args.size or 10**9
    try:
        content = Path(args.images, name).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        suffix = KEPT.get(image.format)
        if suffix is not None and min(image.size) <= size:
            image.load()  # Decode it, only to see that it can be decoded.
        else:
            suffix = ".jpg"
            content = smaller(image, size)
    except Exception as error:  # Pillow raises a dozen kinds, some with an address in memory.
        return f"the image cannot be read: {str(error).partition(' <')[0]}"
    split = "val" if int(sha256[:8], 16) < args.val * 2**32 else "train"
    return split, suffix, content, {**merge(rows), "image": name, "sha256": sha256}


# -----------------------------------------------------------------------------
# Shards


class ShardWriter:
    """Write the samples of a split into shards of SHARD_SIZE samples."""

    def __init__(self, folder, split):
        self.folder = folder
        self.split = split
        self.n = 0  # samples so far
        self.tar = None

    def add(self, suffix, content, fields):
        """Write one sample. suffix, content: the name ending and the bytes of the image file;
        fields: the dict for .json."""
        shard, place = divmod(self.n, SHARD_SIZE)
        if place == 0:
            self.close()
            self.tar = tarfile.open(self.folder / f"{self.split}-{shard:05d}.tar", "w")
        key = f"{shard:05d}{place:05d}"
        add_sample(self.tar, key, suffix, content, fields["captions"][0], fields)
        self.n += 1

    def close(self):
        if self.tar is not None:
            self.tar.close()


def make_shards(args, samples, bad, folder):
    """Write the samples into shards in the folder, and add the rows of images that cannot be used
    to the list `bad`. Return the number of training pairs and the number of validation pairs."""
    writers = {split: ShardWriter(folder, split) for split in ("train", "val")}
    items = list(samples.items())
    n = 256  # Encode so many images at a time, so that no more are in memory.
    with ThreadPool(cores()) as pool:
        for i in progress(range(0, len(items), n), "packing", unit="image", unit_scale=n):
            part = items[i : i + n]
            for (image, rows), result in zip(part, pool.map(partial(encode, args=args), part)):
                if isinstance(result, str):
                    bad += [(line, image, result) for line, _, _ in rows]
                else:
                    split, *sample = result
                    writers[split].add(*sample)
    for writer in writers.values():
        writer.close()
    return writers["train"].n, writers["val"].n


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--csv", type=Path, required=True, help="the list: .csv, .tsv or .jsonl")
    add("--out", type=Path, required=True, help="new folder for the shards")
    add("--images", type=Path, help="folder with the images (default: the folder of the list)")
    add("--image_column", default="image", metavar="COLUMN",
        help="column with file names (default image)")
    add("--caption_column", default="caption", metavar="COLUMN",
        help="column with captions (default caption)")
    add("--size", type=number(int, 0), default=256,
        help="largest short side in pixels; 0 keeps every size (default 256)")
    add("--val", type=number(float, 0, 0.99), default=0.05,
        help="share of images for validation (default 0.05)")
    # fmt: on
    args = parser.parse_args(argv)
    args.images = args.images or args.csv.parent
    samples, bad = read_list(args)
    with new_folder(args.out) as folder:
        n, n_val = make_shards(args, samples, bad, folder)
        reason = min(bad)[2] if bad else "it has none"
        check(n + n_val > 0, f"none of the rows of {args.csv} can be used: {reason}")
        if bad:
            path = folder / "bad_rows.csv"
            with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                csv.writer(file).writerows([("line", "image", "reason"), *sorted(bad)])
            print(f"{len(bad):,} rows cannot be used: see {args.out / path.name}")
    print(f"{n:,} pairs to train on, {n_val:,} pairs to validate on")


if __name__ == "__main__":
    run_command(main)
