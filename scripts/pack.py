"""Make shards from a list of images and captions:

    python -m scripts.pack --csv pairs.csv --images photos/ --out shards/

The list is a CSV, TSV or JSONL file in UTF-8 with column names. All rows of one image become one
sample: .txt holds its first caption, and .json holds all `captions` and the other columns of the
list, so that a column `long` serves as --label_captions json.long. Where the rows of an image
differ in a column, its field is a list. Large images are made smaller; --size 0 keeps the files as
they are. Rows that cannot be used are listed in bad_rows.csv, with the reason.

A hash of the image file decides whether a sample is for training or for validation. So equal files
are never on both sides, and an image keeps its side when the list grows or is packed in parts.

Start the command again after an interruption, or when missing images have arrived: it packs only
the images that are in no shard yet.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from functools import partial
from multiprocessing.pool import ThreadPool  # threads: Pillow releases Python's global lock
from pathlib import Path

import torch
from PIL import Image

import data
from cli import InputError, check, number, run_command, write_file

# Likely names of the two columns, the likeliest first.
IMAGE_COLUMNS = "image filepath file_path image_path path filename file_name file img url".split()
CAPTION_COLUMNS = "caption captions text title description alt_text".split()
WRITTEN = ("image", "captions", "width", "height", "sha256")  # the fields of .json that pack makes
# Formats that shards hold. MPO is a JPEG with a second picture behind it, as some phones make it.
KEPT = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp"}
# Bytes that are not UTF-8 are read as surrogates, and UTF-16 is full of null characters.
NOT_UTF8 = re.compile("[\0\ud800-\udfff]")
# If a quotation mark is not closed, the rows that follow become a part of the caption.
OTHER_ROWS = re.compile(r"\n[^\n]*\.(jpe?g|png|webp|gif|bmp|tiff?)\b", re.IGNORECASE)

# -----------------------------------------------------------------------------
# The list


def json_rows(file):
    """Yield (line number, dict of columns). A line that is no JSON object gives {None: ...}."""
    for line, text in enumerate(file, start=1):
        if text.strip():
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                row = None
            yield line, row if isinstance(row, dict) else {None: row}


def table_rows(file, path):
    """The same for CSV and TSV, where fields without a column have the key None. The line number of
    a row with line breaks is that of its last line."""
    header = file.readline()
    check(not NOT_UTF8.search(header), f"{path} is not text in UTF-8: save it as CSV UTF-8")
    file.seek(0)
    delimiter = "\t" if "\t" in header else max(",;", key=header.count)
    # In TSV a quotation mark is a character like any other, as in CC3M's own lists.
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        twice = [name for name, n in Counter(reader.fieldnames).items() if n > 1 and name]
        check(not twice, f"{path} has two columns {', '.join(twice)}: rename one of them")
        yield from ((reader.line_num, row) for row in reader)
    except csv.Error as error:
        # A bad row is not enough: if a quotation mark is not closed, all that follows may be lost.
        raise InputError(f"{path}, line {reader.line_num + 1}: {error}: see its quotes") from None


def find_column(what, names, columns):
    """The first of these names that is among the columns, in any case."""
    found = [c for name in names for c in columns if c.strip().lower() == name.lower()]
    check(found, f"which column is the {what}? Choose with --{what}_column: {', '.join(columns)}")
    return found[0]


def read_list(path, folder, image_columns, caption_columns):
    """A list, the folder of its images, and names that the two columns may have -> (samples, bad).

    samples: dict of image path within the folder -> list of its rows, each (line number, captions,
    dict of the other columns). bad: set of (line number, image, reason).
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = list(json_rows(file) if "json" in path.suffix.lower() else table_rows(file, path))
    columns = [*dict.fromkeys(c for _, row in rows for c in row if c is not None)]
    check(columns, f"{path} has no rows that can be read")
    image_column = find_column("image", image_columns, columns)
    caption_column = find_column("caption", caption_columns, columns)
    print(f"images from column {image_column!r}, captions from column {caption_column!r}")
    clash = [c for c in columns if c in WRITTEN and c not in (image_column, caption_column)]
    check(not clash, f"rename {', '.join(clash)} in {path}: pack writes fields of these names")
    samples, bad, folder = {}, set(), os.path.join(folder, "")
    for line, row in rows:
        image, captions = row.pop(image_column, None), row.pop(caption_column, None)
        image = image.strip() if isinstance(image, str) else ""
        file = os.path.normpath(os.path.join(folder, image))  # two spellings are one image
        captions = captions if isinstance(captions, list) else [captions]
        captions = [text.strip() for text in captions if isinstance(text, str) and text.strip()]
        reasons = {
            "more fields than columns (is the caption in quotes?), or no JSON object": None in row,
            "no image is named": not image,
            "the path leads out of the folder of images": not file.startswith(folder),
            "the caption is missing or empty": not captions,
            "the caption is too long": max(map(len, captions), default=0) > data.MAX_CAPTION,
            "the caption is not UTF-8": any(map(NOT_UTF8.search, captions)),
            "the caption holds other rows (see its quotes)": any(map(OTHER_ROWS.search, captions)),
        }
        if reason := next((reason for reason, applies in reasons.items() if applies), None):
            bad.add((line, image, reason))
        else:
            samples.setdefault(file.removeprefix(folder), []).append((line, captions, row))
    return samples, bad


# -----------------------------------------------------------------------------
# Samples


def merge(rows):
    """The rows of one image -> fields of .json: the captions and the other columns."""
    fields = {"captions": list(dict.fromkeys(text for _, texts, _ in rows for text in texts))}
    for c in dict.fromkeys(c for _, _, row in rows for c in row):
        filled = [row[c] for _, _, row in rows if row.get(c) not in (None, "")]
        values = list({json.dumps(value): value for value in filled}.values()) or [None]
        fields[c] = values if len(values) > 1 else values[0]
    return fields


def encode(item, split, args):
    """(image, its rows) -> (suffix, bytes, fields of .json), or the reason why not, as a string.
    None if the image belongs to the other split.

    An image with a short side of more than --size pixels becomes a smaller JPEG. A file that is
    small enough stays as it is, because encoding it again would lose quality, unless shards do not
    hold its format.
    """
    (name, rows), size = item, args.size or 10**9
    try:
        content = (args.images / name).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if split != ("val" if int(sha256[:8], 16) < args.val * 2**32 else "train"):
            return None
        image = Image.open(io.BytesIO(content), formats=data.FORMATS)
        if min(image.size) <= size and image.format in KEPT:
            suffix = KEPT[image.format]
            image.load()  # it can be decoded
        else:
            suffix, jpeg = ".jpg", io.BytesIO()
            image.draft("RGB", (2 * size, 2 * size))  # leaves enough for a sharp resize
            image = data.upright_rgb(image)  # the new file has no EXIF data
            scale = min(1, size / min(image.size))
            image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
            image.save(jpeg, "JPEG", quality=args.quality, comment=b"")  # nor the old comment
            content = jpeg.getvalue()
        fields = {"width": image.width, "height": image.height, "sha256": sha256}
        return suffix, content, merge(rows) | {"image": name} | fields
    except FileNotFoundError:
        return f"there is no such file: {args.images / name}"
    except Exception as error:  # Pillow raises a dozen kinds, some with an address in memory
        return f"the image cannot be read: {str(error).partition(' <')[0]}"


# -----------------------------------------------------------------------------
# Shards


def write_shard(number, samples, file):
    """samples: (suffix of the image, its bytes, fields of .json) of each."""
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i, (suffix, content, fields) in enumerate(samples):
            key = f"{number}{i:05d}"
            data.add_member(tar, key + suffix, content)
            data.add_member(tar, key + ".txt", fields["captions"][0].encode())
            data.add_member(tar, key + ".json", json.dumps(fields).encode())


def packed_images(shards):
    """The names of all images that these shards hold."""
    pairs = data.Pairs(shards, None, 0)
    return {json.loads(pairs.read(row, data.JSON))["image"] for row in pairs.index.tolist()}


def encode_all(args, samples, bad, pool, split):
    """Yield the samples of a split as write_shard takes them. What cannot be used goes to `bad`."""
    items, encode_one, n = [*samples.items()], partial(encode, split=split, args=args), 256
    # n at a time: imap runs ahead, and would hold in memory what a slow disk has not taken yet.
    for i in data.progress(range(0, len(items), n), split, unit="image", unit_scale=n):
        for (image, rows), result in zip(items[i : i + n], pool.imap(encode_one, items[i : i + n])):
            if isinstance(result, str):
                bad.update((line, image, result) for line, _, _ in rows)
            elif result:
                yield result


def make_shards(args, samples, bad):
    """Write samples into new shards. What cannot be used goes to `bad`."""
    with ThreadPool() as pool:
        # Each split reads all files. To read them once, two shards would have to grow in memory.
        for split in ("train", "val") if args.val else ("train",):
            encoded = encode_all(args, samples, bad, pool, split)
            for first in encoded:  # each turn writes a shard
                paths = (args.out / f"{split}-{i:05d}.tar" for i in itertools.count())
                path = next(path for path in paths if not path.exists())
                shard = itertools.chain([first], itertools.islice(encoded, args.shard_size - 1))
                write_file(path, partial(write_shard, path.stem[-5:], shard))


def summary(out, bad):
    """Print what the folder holds and what was not used. Returns the number of training pairs."""
    for split in ("val", "train"):
        shards = sorted(map(str, out.glob(f"{split}-*.tar")))
        n = len(data.build_index(shards)[0]) if shards else 0
        size = sum(map(os.path.getsize, shards))
        print(f"{split:6}{len(shards):6,} shards{n:10,} samples{size / 1e6:11,.1f} MB")
    print(f"rows that cannot be used: {len(bad):,}, listed in {out / 'bad_rows.csv'}")
    for reason, count in Counter(reason.partition(":")[0] for _, _, reason in bad).most_common(3):
        print(f"{count:9,}  {reason}")
    return n


def next_commands(out, n, several):
    """What to do with n training pairs in the folder `out`, as a list of commands. several: do
    images have several captions?"""
    train, val = f"'{out}/train-*.tar'", f" --val_data '{out}/val-*.tar'"
    val = val if any(out.glob("val-*.tar")) else ""
    command = f"python train.py --train_data {train}{val}"
    command += " --captions json.captions" if several else ""
    first = [f"python -m scripts.show {train}{val} --picture grid.png"]
    gpu = torch.cuda.is_available()
    if gpu and n >= 1_000_000:  # enough to learn everything from
        return [*first, f"{command} --model ViT-B-16"]
    if gpu or n < 2_000:  # not enough: start from a model that was trained
        smaller_batch = " --batch_size 32" if n < 10_000 else ""
        get = "python -m scripts.convert WEIGHTS clip.pt  # see the README for WEIGHTS"
        return [*first, get, f"{command} --init_from clip.pt --epochs 5{smaller_batch}"]
    # About 5,000 steps of a tiny model, which take a quarter of an hour of CPU time.
    epochs = max(1, min(30, round(5000 * 32 / n)))
    vocab = f"python -m scripts.vocab {train} --out '{out}/vocab.tiktoken'"
    options = f"--model tiny --batch_size 32 --learning_rate 4e-4 --epochs {epochs}"
    return [vocab, *first, f"{command} {options}"]


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--csv", type=Path, required=True, help="the list: .csv, .tsv or .jsonl")
    add("--out", type=Path, required=True, help="folder for the shards")
    add("--images", type=Path, help="folder of the images (default: the list's)")
    add("--image_column", nargs=1, default=IMAGE_COLUMNS, help="(default: a likely name)")
    add("--caption_column", nargs=1, default=CAPTION_COLUMNS, help="(default: a likely name)")
    add("--size", type=number(int, 0), default=256, help="short side; 0 keeps files (default 256)")
    add("--quality", type=number(int, 1, 100), default=90, help="of new JPEGs (default 90)")
    add("--val", type=number(float, 0, 0.99), default=0.05, help="share to validate (default 0.05)")
    # A key has five digits for the sample's place in its shard.
    add("--shard_size", type=number(int, 1, 100_000), default=1000, help="samples (default 1000)")
    args = parser.parse_args(argv)
    args.images = Path(os.path.abspath(args.images or args.csv.parent))
    samples, bad = read_list(args.csv, args.images, args.image_column, args.caption_column)
    check(args.csv.name != "bad_rows.csv", f"rename {args.csv}: pack writes a file of this name")

    # Only shards of the same list and the same options can be added to.
    args.out.mkdir(parents=True, exist_ok=True)
    content = hashlib.sha256(args.csv.read_bytes()).hexdigest()
    recipe = json.dumps({**vars(args), "csv": content, "out": None}, default=str).encode()
    record, shards = args.out / "pack.json", sorted(map(str, args.out.glob("*.tar")))
    same = record.is_file() and record.read_bytes() == recipe
    check(same or not shards, f"{args.out} has shards of another list: name another --out")
    write_file(record, lambda file: file.write(recipe))
    packed = packed_images(shards) if shards else ()
    todo = {image: rows for image, rows in samples.items() if image not in packed}
    print(f"{len(todo):,} images to pack, {len(samples) - len(todo):,} are in shards already")
    make_shards(args, todo, bad)

    with open(args.out / "bad_rows.csv", "w", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([("line", "image", "reason"), *sorted(bad)])
    n = summary(args.out, bad)
    check(any(args.out.glob("*.tar")), f"none of the rows of {args.csv} can be used")
    several = any(len(rows) > 1 or len(rows[0][1]) > 1 for rows in samples.values())
    print("", "next:", *next_commands(args.out, n, several), sep="\n")


if __name__ == "__main__":
    run_command(main)
