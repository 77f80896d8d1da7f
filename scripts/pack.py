"""Make shards from a list of images and captions:

    python -m scripts.pack --csv pairs.csv --images photos/ --out shards/

The list is a CSV, TSV or JSONL file in UTF-8 with the columns image and caption, or others that
--image_column and --caption_column name. All rows of one image become one sample: .txt holds its
first caption, and .json holds all `captions`, the image's name, size and hash, and the other
columns of the list, so that a column `long` serves as --label_captions json.long. Where the rows of
an image differ in a column, its field is a list. Large images are made smaller; --size 0 keeps
their size. Rows that cannot be used are listed in bad_rows.csv, with the reason.

A hash of the image file decides whether a sample is for training or for validation. So equal files
are never on both sides, and an image keeps its side when the list grows or is packed in parts.
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
from shlex import quote

from PIL import Image

import data
from cli import InputError, check, cores, make_parser, new_folder, number, run_command

# Formats that shards hold. MPO is a JPEG with a second picture behind it, as some phones make it.
KEPT = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"}
SHARD_SIZE = 1000  # samples
QUALITY = 90  # of new JPEGs, in 1..100

# -----------------------------------------------------------------------------
# The list


def json_rows(file):
    """Yield (line number, dict of columns). A line that is no JSON object gives {None: ...}."""
    for line, text in enumerate(file, start=1):
        if text.strip():
            try:
                row = json.loads(text)
            except ValueError:
                row = None
            yield line, row if isinstance(row, dict) else {None: row}


def table_rows(file, path):
    """The same for CSV and TSV, where fields without a column have the key None. The line number of
    a row with line breaks is that of its last line."""
    header = file.readline()
    file.seek(0)
    reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        # A bad row is not enough: if a quotation mark is not closed, all that follows may be lost.
        raise InputError(f"{path}, line {reader.line_num + 1}: {error}: see its quotes") from None


def problem_of(row, image, captions):
    """Why a row cannot be used, or None. row: its other columns."""
    if None in row:
        return "more fields than columns (is the caption in quotes?), or no JSON object"
    if not image:
        return "no image is named"
    if not captions:
        return "the caption is missing or empty"


def texts_in(value):
    """The texts in a column of captions, as a list: it has one text, or a list of them in JSON."""
    values = value if isinstance(value, list) else [value]
    texts = [text.strip() for text in values if isinstance(text, str)]
    return [text for text in texts if text]


def read_rows(path):
    """The list as a list of (line number, dict of columns), and its columns. Raises InputError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            is_json = "json" in path.suffix.lower()
            rows = list(json_rows(file) if is_json else table_rows(file, path))
    except UnicodeDecodeError as error:
        near = error.object[max(0, error.start - 25) : error.end + 15]
        raise InputError(f"{path} is not text in UTF-8, near {near}: save it as UTF-8") from error
    columns = {}
    for _, row in rows:
        columns |= dict.fromkeys(row)
    columns.pop(None, None)  # what belongs to no column
    check(columns, f"{path} has no rows that can be read (JSONL has an object on each line)")
    return rows, columns


def read_list(args):
    """Read the list. Returns (samples, bad).

    samples: dict of image -> list of its rows, each (line number, captions, dict of the other
    columns). bad: list of (line number, image, reason).
    """
    rows, columns = read_rows(args.csv)
    for column in (args.image_column, args.caption_column):
        found = f"{args.csv} has the columns {', '.join(columns)}"
        check(column in columns, f"{found}: see --image_column and --caption_column")
    samples = {}
    bad = []
    folder = os.path.join(args.images, "")
    for line, row in rows:
        image = str(row.pop(args.image_column, None) or "").strip()
        captions = texts_in(row.pop(args.caption_column, None))
        reason = problem_of(row, image, captions)
        if reason is not None:
            bad.append((line, image, reason))
            continue
        file = os.path.normpath(os.path.join(folder, image))  # two spellings are one image
        name = file.removeprefix(folder)
        samples.setdefault(name, []).append((line, captions, row))
    return samples, bad


# -----------------------------------------------------------------------------
# Samples


def merge(rows):
    """The rows of one image -> fields of .json: the captions and the other columns. Where the rows
    differ in a column, its field is a list."""
    captions = {}
    columns = {}  # name -> list of the different values
    for _, texts, row in rows:
        captions |= dict.fromkeys(texts)
        for name, value in row.items():
            values = columns.setdefault(name, [])
            if value not in (None, "", *values):
                values.append(value)
    fields = {}
    for name, values in columns.items():
        if len(values) > 1:
            fields[name] = values
        else:
            fields[name] = values[0] if values else None
    return {**fields, "captions": list(captions)}


def smaller(image, size):
    """A PIL image -> the bytes of a JPEG with a short side of at most `size` pixels, and its width
    and height."""
    image.draft("RGB", (2 * size, 2 * size))  # leaves enough for a sharp resize
    image = data.upright_rgb(image)  # the new file has no EXIF data
    scale = min(1, size / min(image.size))
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=QUALITY, comment=b"")  # nor the old comment
    return jpeg.getvalue(), image.size


def encode(item, args):
    """(image, its rows) -> (split, suffix, bytes, fields of .json), or the reason why not, as a
    string.

    An image with a short side of more than --size pixels becomes a smaller JPEG. A file that is
    small enough stays as it is, because encoding it again would lose quality, unless shards do not
    hold its format.
    """
    name, rows = item
    fields = merge(rows)
    file = args.images / name
    size = args.size or 10**9
    try:
        if not file.is_file():  # reading a pipe may never end
            return f"there is no such file: {file}"
        content = file.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        image = Image.open(io.BytesIO(content), formats=data.FORMATS)
        suffix = KEPT.get(image.format)
        if suffix is not None and min(image.size) <= size:
            image.load()  # it can be decoded
            width, height = image.size
        else:
            suffix = ".jpg"
            content, (width, height) = smaller(image, size)
    except Exception as error:  # Pillow raises a dozen kinds, some with an address in memory
        kinds = ", ".join(data.FORMATS)
        return f"the image cannot be read as {kinds}: {str(error).partition(' <')[0]}"
    fields |= {"image": name, "width": width, "height": height, "sha256": sha256}
    split = "val" if int(sha256[:8], 16) < args.val * 2**32 else "train"
    return split, suffix, content, fields


# -----------------------------------------------------------------------------
# Shards


class ShardWriter:
    """Writes the samples of a split into shards of SHARD_SIZE samples."""

    def __init__(self, folder, split):
        self.folder = folder
        self.split = split
        self.n = 0  # samples so far
        self.tar = None

    def add(self, suffix, content, fields):
        """suffix: of the image; content: its bytes; fields: of .json."""
        shard, place = divmod(self.n, SHARD_SIZE)
        if place == 0:
            self.close()
            self.tar = tarfile.open(self.folder / f"{self.split}-{shard:05d}.tar", "w")
        key = f"{shard:05d}{place:05d}"
        data.add_sample(self.tar, key, suffix, content, fields["captions"][0], fields)
        self.n += 1

    def close(self):
        if self.tar is not None:
            self.tar.close()


def make_shards(args, samples, bad, folder):
    """Write the samples into the folder. What cannot be used goes to `bad`. Returns the numbers of
    training and of validation pairs."""
    writers = {split: ShardWriter(folder, split) for split in ("train", "val")}
    items = list(samples.items())
    n = 256
    with ThreadPool(cores()) as pool:
        # n at a time: imap runs ahead, and would hold in memory what a slow disk has not taken yet.
        for i in data.progress(range(0, len(items), n), "packing", unit="image", unit_scale=n):
            part = items[i : i + n]
            for (image, rows), result in zip(part, pool.imap(partial(encode, args=args), part)):
                if isinstance(result, str):
                    bad += [(line, image, result) for line, _, _ in rows]
                else:
                    split, *sample = result
                    writers[split].add(*sample)
    for writer in writers.values():
        writer.close()
    return writers["train"].n, writers["val"].n


# -----------------------------------------------------------------------------
# What to do with the pairs

TUNE = """
Published weights suit so few pairs (0.6 GB, which we have not tried). Fine-tune them, and search.
(Or search with clip.pt at once.)
  pip install open_clip_torch
  python -m scripts.convert ViT-B-32/laion2b_s34b_b79k clip.pt
  python train.py --train_data {out} --init_from clip.pt --epochs 5 --batch_size 32 \\
      --captions json.captions --out_dir out_photos"""
FROM_NOTHING = """
Train from nothing, with a vocabulary of the captions' words, and search:
  python -m scripts.vocab {out} --captions json.captions
  python train.py --train_data {out} --model tiny --batch_size 32 \\
      --captions json.captions --out_dir out_photos"""
SEARCH = """
  python -m scripts.search --checkpoint out_photos/best.pt --images {images} \\
      --features photos.npz --serve"""


# -----------------------------------------------------------------------------
# The command


def read_options(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--csv", type=Path, required=True, help="the list: .csv, .tsv or .jsonl")
    add("--out", type=Path, required=True, help="folder to make for the shards")
    add("--images", type=Path, help="folder of the images (default: that of the list)")
    add("--image_column", default="image", metavar="COLUMN",
        help="column of file names (default image)")
    add("--caption_column", default="caption", metavar="COLUMN",
        help="column of captions (default caption)")
    add("--size", type=number(int, 0), default=256,
        help="pixels of a short side, at most; 0: as it is (default 256)")
    add("--val", type=number(float, 0, 0.99), default=0.05, help="share to validate (default 0.05)")
    # fmt: on
    args = parser.parse_args(argv)
    args.images = Path(os.path.abspath(args.images or args.csv.parent))
    return args


def main(argv):
    args = read_options(argv)
    samples, bad = read_list(args)
    with new_folder(args.out) as folder:
        n, n_val = make_shards(args, samples, bad, folder)
        if n + n_val == 0:
            raise InputError(f"none of the rows of {args.csv} can be used: {min(bad)[2]}")
        path = folder / "bad_rows.csv"
        with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            csv.writer(file).writerows([("line", "image", "reason"), *sorted(bad)])

    print(f"{n:,} pairs to train on, {n_val:,} pairs to validate")
    print(f"rows that cannot be used: {len(bad):,}, listed in {args.out / 'bad_rows.csv'}")
    way = TUNE if n < 10_000 else FROM_NOTHING
    # with slashes, as in train.print_next
    folders = {"out": quote(args.out.as_posix()), "images": quote(args.images.as_posix())}
    print((way + SEARCH).format(**folders))


if __name__ == "__main__":
    run_command(main)
