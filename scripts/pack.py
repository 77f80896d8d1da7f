"""Make shards from a table of images and captions:

    python -m scripts.pack --csv pairs.csv --images photos/ --out shards/

The table is a CSV or TSV file in UTF-8 with the columns image and caption. The command makes large
images smaller. It writes the rows that cannot be used to bad_rows.csv, with the reason.

All rows of one image become one sample. Its .txt holds the first caption. Its .json holds all
captions in the field `captions`, the name of the file in `image`, and the values of each other
column as a list. For example, train.py finds a column `long` by --label_captions json.long.

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
from pathlib import Path

from PIL import Image

from common.cli import InputError, check, make_parser, new_folder, number, progress, run_command
from common.images import FORMATS, upright_rgb
from common.processes import map_in_processes
from common.shards import add_sample

# The formats that shards hold. MPO is a JPEG with a second picture behind it. Some phones make it.
KEPT = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"}
SHARD_SIZE = 1000  # samples

# -----------------------------------------------------------------------------
# The table


def read_table(path):
    """Read the table. Return two values: a dict of image -> list of its rows, and a list of rows
    that cannot be used, each (image, reason). A row is a dict of column -> text.

    Raise InputError if a line cannot be read. Leaving that line out would not do, because a
    quotation mark that is not closed may swallow all rows that follow."""
    samples = {}
    bad = []
    try:
        text = path.read_text("utf-8-sig")
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        look = dict(delimiter=delimiter, skipinitialspace=True, strict=True)
        rows = csv.DictReader(io.StringIO(text), **look)
        names = [name for name in rows.fieldnames or [] if name]  # A spreadsheet has some without.
        check({"image", "caption"} <= {*names}, f"{path} must have the columns image and caption")
        is_clear = len({*names}) == len(names) and "captions" not in names
        check(is_clear, f"{path}: each column needs its own name, and not captions")
        for row in rows:
            image = (row.get("image") or "").strip()
            if None in row:
                reason = "has more fields than columns: put the caption into quotes"
                bad.append((image, f"line {rows.line_num} {reason}"))
            elif not image or not (row.get("caption") or "").strip():
                bad.append((image, f"line {rows.line_num} has no image or no caption"))
            else:
                name = os.path.normpath(image)  # a.jpg and ./a.jpg are one image
                samples.setdefault(name, []).append(row)
    except (UnicodeError, csv.Error) as error:
        raise InputError(f"{path}: {error}. Is it UTF-8? Is a quotation mark open?") from None
    return samples, bad


# -----------------------------------------------------------------------------
# Samples


def fields_of(name, rows):
    """Return what the .json of an image holds, from all of its rows."""
    fields = {}
    for column in rows[0]:
        texts = [(row[column] or "").strip() for row in rows]
        fields[column] = [*dict.fromkeys(filter(None, texts))]
    captions = fields.pop("caption")
    return {**fields, "image": name, "captions": captions}


def smaller(image, size):
    """Return an image of Pillow as a JPEG, in bytes, whose short side is `size` at most."""
    image.draft("RGB", (2 * size, 2 * size))  # Twice the size is enough for a sharp resize.
    image.load()
    image = upright_rgb(image)  # Turn it now, because the new file has no EXIF data.
    scale = min(1, size / min(image.size))
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90, comment=b"")  # without the comment of the old file
    return jpeg.getvalue()


def encode(item, folder, size, val):
    """Return a sample as (split, suffix, bytes of the image, fields of .json), or as a string the
    reason why the image cannot be used. An item is the name of the image, and its rows.

    A small file in a format of shards keeps its bytes. Encoding it again would lose quality."""
    name, rows = item
    try:
        content = Path(folder, name).read_bytes()
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
    split = "val" if int(sha256[:8], 16) < val * 2**32 else "train"
    return split, suffix, content, fields_of(name, rows)


def encode_all(samples, bad, **options):
    """Yield what `encode` returns for each sample that can be used. Add (image, reason) for each
    row of the others to the list `bad`."""
    items = [*samples.items()]
    results = map_in_processes(partial(encode, **options), items)
    for (name, rows), result in zip(items, results):
        if isinstance(result, str):
            bad += [(name, result)] * len(rows)
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
    add("--csv", type=Path, required=True, help="the table: .csv or .tsv")
    add("--images", type=Path, required=True, help="folder with the images")
    add("--out", type=Path, required=True, help="new folder for the shards")
    add("--size", type=number(int, 1), default=256, help="largest short side (default: 256)")
    add("--val", type=number(float, 0, 0.99), default=0.05, help="validation share (default: 0.05)")
    args = parser.parse_args(argv)
    samples, bad = read_table(args.csv)
    with new_folder(args.out) as folder:
        encoded = encode_all(samples, bad, folder=args.images, size=args.size, val=args.val)
        counts = write_shards(folder, progress(encoded, "packing", len(samples), unit="image"))
        reason = bad[0][1] if bad else "it has none"
        check(counts, f"none of the rows of {args.csv} can be used: {reason}")
        if bad:
            with open(folder / "bad_rows.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("image", "reason"), *bad])
            print(f"{len(bad):,} rows cannot be used: see {args.out / 'bad_rows.csv'}")
    print(f"{counts['train']:,} pairs to train on, {counts['val']:,} pairs to validate on")


if __name__ == "__main__":
    run_command(main)
