"""Make shards from a table of images and captions:

    python -m scripts.pack --csv pairs.csv --images photos/ --out shards/

The table is a CSV or TSV file in UTF-8 with the columns image and caption. The command makes large
images smaller, unless you give --size 0. It writes the rows that cannot be used to bad_rows.csv,
with the reason.

All rows of one image become one sample. Its .txt holds the first caption. Its .json holds all
captions in the field `captions`, the name of the file in `image`, and the other columns of the
table. For example, train.py finds a column `long` by --label_captions json.long. If the rows of an
image differ in a column, the field is a list.

A hash of the image file decides whether a sample is for training or for validation. So equal files
are never on both sides. An image keeps its side when the table grows, or is packed in parts.
"""

import csv
import hashlib
import io
import os
import tarfile
from collections import Counter
from functools import partial
from multiprocessing.pool import ThreadPool  # threads: Pillow releases Python's global lock
from pathlib import Path

from PIL import Image

from common.cli import InputError, check, make_parser, number, progress, run_command
from common.images import FORMATS, upright_rgb
from common.index import add_sample
from common.machine import cores, new_folder

# The formats that shards hold. MPO is a JPEG with a second picture behind it. Some phones make it.
KEPT = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"}
SHARD_SIZE = 1000  # samples

# -----------------------------------------------------------------------------
# The table


def read_table(args):
    """Read the table. Return two values. The first is a dict of image -> list of its rows, each
    (line number, caption, dict of the other columns). The second is a list of rows that cannot be
    used, each (line number, image, reason).

    Raise InputError if a line cannot be read. Leaving that line out would not do, because a
    quotation mark that is not closed may swallow all rows that follow."""
    samples = {}
    bad = []
    line = 1
    try:
        text = args.csv.read_text("utf-8-sig")
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        look = dict(delimiter=delimiter, skipinitialspace=True, strict=True)
        reader = csv.DictReader(io.StringIO(text), **look)
        names = reader.fieldnames or []
        taken = {"image", "captions"} - {args.image_column, args.caption_column}  # by the .json
        wrong = [name for name in names if name in taken or names.count(name) > 1]
        check(not wrong, f"{args.csv}: the name of a column is taken or there twice: {wrong}")
        for row in reader:
            line = reader.line_num
            image = (row.pop(args.image_column, None) or "").strip()
            caption = (row.pop(args.caption_column, None) or "").strip()
            if None in row:
                bad.append((line, image, "more fields than columns: put the caption into quotes"))
            elif not image or not caption:
                reason = "no image or no caption: see --image_column and --caption_column"
                bad.append((line, image, reason))
            else:
                name = os.path.normpath(image)  # a.jpg and ./a.jpg are one image
                samples.setdefault(name, []).append((line, caption, row))
    except (UnicodeError, csv.Error) as error:
        advice = "Is it UTF-8? Is a quotation mark open?"
        raise InputError(f"{args.csv}, near line {line}: {error}. {advice}") from None
    return samples, bad


# -----------------------------------------------------------------------------
# Samples


def fields_of(name, rows):
    """Return the fields of a sample's .json. name: of its image; rows: all rows of the image."""
    lines, captions, others = zip(*rows)
    fields = {"image": name, "captions": [*dict.fromkeys(captions)]}
    for column in others[0]:
        values = [*dict.fromkeys(row[column] for row in others if row[column])]
        fields[column] = values if len(values) > 1 else "".join(values)
    return fields


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
    except Exception as error:  # Pillow raises a dozen kinds, some with an address in memory
        return f"the image cannot be read: {str(error).partition(' <')[0]}"
    split = "val" if int(sha256[:8], 16) < args.val * 2**32 else "train"
    return split, suffix, content, fields_of(name, rows)


# -----------------------------------------------------------------------------
# Shards


def encode_all(args, samples, bad):
    """Yield what `encode` returns for each of the samples that can be used, and add the rows of the
    others to the list `bad`."""
    items = list(samples.items())
    n = 256  # encode so many images at a time, so that no more are in memory
    with ThreadPool(cores()) as pool:
        for i in progress(range(0, len(items), n), "packing", unit="image", unit_scale=n):
            part = items[i : i + n]
            for (image, rows), result in zip(part, pool.map(partial(encode, args=args), part)):
                if isinstance(result, str):
                    bad += [(line, image, result) for line, _, _ in rows]
                else:
                    yield result


def write_shards(folder, samples):
    """Write samples into shards of SHARD_SIZE samples each. Return how many each split has, as a
    Counter. samples: (split, suffix, bytes of the image, fields of .json) for each one."""
    counts = Counter()
    tars = {}  # split -> its last shard
    for split, suffix, content, fields in samples:
        shard, place = divmod(counts[split], SHARD_SIZE)
        if place == 0:
            if split in tars:
                tars[split].close()
            tars[split] = tarfile.open(folder / f"{split}-{shard:05d}.tar", "w")
        key = f"{shard:05d}{place:05d}"
        add_sample(tars[split], key, suffix, content, fields["captions"][0], fields)
        counts[split] += 1
    for tar in tars.values():
        tar.close()
    return counts


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--csv", type=Path, required=True, help="the table: .csv or .tsv")
    add("--out", type=Path, required=True, help="new folder for the shards")
    add("--images", type=Path, help="folder with the images (default: the folder of the table)")
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
    samples, bad = read_table(args)
    with new_folder(args.out) as folder:
        counts = write_shards(folder, encode_all(args, samples, bad))
        reason = min(bad)[2] if bad else "it has none"
        check(counts, f"none of the rows of {args.csv} can be used: {reason}")
        if bad:
            path = folder / "bad_rows.csv"
            with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                csv.writer(file).writerows([("line", "image", "reason"), *sorted(bad)])
            print(f"{len(bad):,} rows cannot be used: see {args.out / path.name}")
    print(f"{counts['train']:,} pairs to train on, {counts['val']:,} pairs to validate on")


if __name__ == "__main__":
    run_command(main)
