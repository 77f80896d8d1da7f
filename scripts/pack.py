"""Make shards from a list of images and captions:

    python -m scripts.pack --csv pairs.csv --images photos/ --out shards/

The list is a CSV, TSV or JSONL file with column names. All rows of one image become one sample:
.txt holds its first caption, and .json holds all `captions` and the other columns of the list (so
a column `long` serves as --label_captions json.long). If the rows differ in a column, its field is
a list. Large images are made smaller; --size 0 keeps the files as they are. Rows that cannot be
used are listed in bad_rows.csv, with the reason.

Start the command again after an interruption, or when missing images have arrived: only shards that
are not finished are made.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from contextlib import suppress
from functools import partial
from multiprocessing.pool import ThreadPool  # threads: Pillow releases Python's global lock
from pathlib import Path

from PIL import Image

import data
from superclip import check, cli, number

# Likely names of the two columns, the likeliest first.
IMAGE_COLUMNS = "image filepath file_path image_path path filename file_name file img url".split()
CAPTION_COLUMNS = "caption captions text title description alt_text".split()
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
KEPT = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # formats that shards hold
MISSING = "there is no such file"  # a later run looks again
BAD_QUOTE = "a quotation mark is not closed, or not doubled inside quotes"

# -----------------------------------------------------------------------------
# The list


def read_lines(path):
    """A text file -> list of lines, with their ends."""
    check(path.is_file(), f"there is no file {path}")
    with open(path, "rb") as file:
        utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    # surrogateescape: bytes that are not UTF-8 spoil their own row, not the list.
    encoding, errors = ("utf-16", "replace") if utf16 else ("utf-8-sig", "surrogateescape")
    with open(path, encoding=encoding, errors=errors, newline="") as file:
        return list(file)


def json_rows(lines):
    """Yield (line number, dict of columns), or (line number, reason) for what is not a row."""
    for number_of_line, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number_of_line, row if isinstance(row, dict) else "not a JSON object"


def table_rows(lines):
    """The same for CSV and TSV, whose first line names the columns.

    In CSV, quoted text may hold line breaks, so a stray quotation mark can swallow the rows that
    follow. If that seems to happen, only the line with the mark is bad: the next one is read anew.
    """
    header = "".join(lines[:1])[:10_000]  # a file that is not a list may have no line breaks
    delimiter = "\t" if "\t" in header else max(",;", key=header.count)
    # In TSV a quotation mark is a character like any other, as in CC3M's own lists.
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    parse = partial(csv.reader, delimiter=delimiter, quoting=quoting)
    columns, i = next(parse([header])), 1

    def has_image(fields):
        return any(field.strip().lower().endswith(SUFFIXES) for field in fields)

    while i < len(lines):
        reader = parse(map(lines.__getitem__, range(i, len(lines))), strict=True)
        try:
            fields, reason = next(reader), None
            if len(fields) > len(columns):
                reason = "more fields than columns: put the caption in quotes"
            for inner in parse(lines[i + 1 : i + reader.line_num]):  # lines of quoted text
                if len(inner) == len(columns) and has_image(inner) >= has_image(fields):
                    reason = BAD_QUOTE  # they look like rows
        except csv.Error:  # for example, the file ends inside quotes
            fields, reason = [], BAD_QUOTE
        if reason or fields:  # an empty line has no fields
            yield i + 1, reason or dict(zip(columns, fields))
        i += 1 if reason else reader.line_num


def find_column(what, names, columns):
    """The first of these names that is among the columns, in any case."""
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    found = [by_name[name] for name in names if name in by_name]
    check(found, f"which column is the {what}? Choose with --{what}_column: {', '.join(columns)}")
    return found[0]


def read_list(path, image_columns, caption_columns):
    """A list, and names that the two columns may have -> (samples, bad).

    samples: dict of image name -> list of its rows, each (line number, captions, dict of the other
    columns). bad: list of (line number, image name, reason).
    """
    lines = read_lines(path)
    is_json = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
    rows = list(json_rows(lines) if is_json else table_rows(lines))
    columns = [*dict.fromkeys(c for _, row in rows if isinstance(row, dict) for c in row)]
    check(columns, f"{path} has no rows that can be read: {rows[0][1] if rows else 'it is empty'}")
    image_column = find_column("image", image_columns, columns)
    caption_column = find_column("caption", caption_columns, columns)
    print(f"images from column {image_column!r}, captions from column {caption_column!r}")
    samples, bad = {}, []
    for line, row in rows:
        if isinstance(row, str):
            bad.append((line, "", row))
            continue
        image, captions = row.pop(image_column, None), row.pop(caption_column, None)
        captions = captions if isinstance(captions, list) else [captions]
        captions = [text.strip() for text in captions if isinstance(text, str) and text.strip()]
        image = image.strip() if isinstance(image, str) else ""
        if reason := fault(image, captions):
            bad.append((line, image, reason))
        else:
            samples.setdefault(os.path.normpath(image), []).append((line, captions, row))
    return samples, bad


def fault(image, captions):
    """Why a row cannot be used, or None."""
    reasons = {
        "no image is named": not image,
        "the caption is missing or empty": not captions,
        "the caption is too long": max(map(len, captions), default=0) > data.MAX_CAPTION,
        # surrogateescape has put these in place of bytes that are not UTF-8
        "the caption is not UTF-8": re.search("[\ud800-\udfff]", "".join(captions)),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


# -----------------------------------------------------------------------------
# Shards


def encode(path, size, quality):
    """An image file -> (suffix, bytes, width, height), with at most `size` pixels on the short
    side; or the reason why not, as a string. size 0 keeps the file as it is. So does a JPEG that is
    small enough: encoding it again would only lose quality."""
    try:
        content = path.read_bytes()
        image = Image.open(io.BytesIO(content), formats=data.FORMATS)
        small = not size or (image.format == "JPEG" and min(image.size) <= size)
        if small and image.format in KEPT:
            image.load()  # it can be decoded
            return KEPT[image.format], content, image.width, image.height
        if size:
            image.draft("RGB", (2 * size, 2 * size))  # leaves enough for a sharp resize
        image = data.upright_rgb(image)  # the new file has no EXIF data
        if size and min(image.size) > size:
            scale = size / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=quality, comment=b"")  # nor the comment of the old one
        return ".jpg", jpeg.getvalue(), image.width, image.height
    except FileNotFoundError:
        return f"{MISSING}: {path}"
    except Exception as error:  # Pillow raises a dozen kinds, some with an address in memory
        return f"the image cannot be read: {str(error).partition(' <')[0]}"


def plan(samples, val, shard_size):
    """Which image goes where: dict of shard name -> list of (key, image). A hash of its name makes
    an image part of the validation data, so that it stays there when the list grows."""
    shards, counts = {}, Counter()
    for image in samples:
        digest = hashlib.sha1(image.encode(errors="surrogatepass")).digest()
        split = "val" if int.from_bytes(digest[:4], "big") < val * 2**32 else "train"
        shard, i = divmod(counts[split], shard_size)
        counts[split] += 1
        shards.setdefault(f"{split}-{shard:05d}.tar", []).append((f"{shard:05d}{i:05d}", image))
    return shards


def distinct(values):
    """The different ones among JSON values, in order."""
    return list({json.dumps(value): value for value in values}.values())


def merge(rows):
    """The rows of one image -> (captions, fields of the .json)."""
    fields = {}
    for column in dict.fromkeys(column for _, _, row in rows for column in row):
        values = distinct(row.get(column) for _, _, row in rows)
        filled = [value for value in values if value not in (None, "")] or values[:1]
        fields[column] = filled if len(filled) > 1 else filled[0]
    return distinct(text for _, captions, _ in rows for text in captions), fields


def add_member(tar, name, content):
    """Add bytes as a member of a tar that is open for writing."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_shard(path, shard, samples, encoded):
    """Write one shard. encoded: what `encode` gives for each of its images. Returns a dict of the
    number of samples `n` and the `bad` rows."""
    part = {"n": 0, "bad": []}

    def write(file):
        with tarfile.open(fileobj=file, mode="w") as tar:
            for (key, image), result in zip(shard, encoded):
                if isinstance(result, str):
                    part["bad"] += [(line, image, result) for line, _, _ in samples[image]]
                    continue
                suffix, content, width, height = result
                captions, fields = merge(samples[image])
                fields |= {"image": image, "captions": captions, "width": width, "height": height}
                text, more = captions[0].encode(), json.dumps(fields).encode()
                for name, member in ((suffix, content), (".txt", text), (".json", more)):
                    add_member(tar, key + name, member)
                part["n"] += 1

    data.write_file(path, write)
    if not part["n"]:
        path.unlink()
    return part


def make_shards(args, samples):
    """Write all shards that are not finished. Returns a dict of shard name -> what write_shard
    returns. pack.json keeps that for the next run, with the options and the list's checksum."""
    shards = plan(samples, args.val, args.shard_size)
    recipe = {k: str(v) for k, v in vars(args).items() if k not in ("csv", "out")}
    recipe["list"] = hashlib.sha1(args.csv.read_bytes()).hexdigest()
    record = args.out / "pack.json"
    before = {"recipe": None}
    with suppress(OSError, ValueError):  # there is none, or it is damaged
        before = json.loads(record.read_text())
    done = before["shards"] if before["recipe"] == recipe else {}
    strange = any(args.out.glob("*.tar")) and not done
    check(not strange, f"{args.out} is of another list or other options: choose a new --out")

    def is_finished(name):
        bad = done.get(name, {"bad": []})["bad"]
        missing = [image for _, image, reason in bad if reason.startswith(MISSING)]
        arrived = any((args.images / image).is_file() for image in missing)
        return name in done and not arrived and ((args.out / name).is_file() or not done[name]["n"])

    todo = {name: shard for name, shard in shards.items() if not is_finished(name)}
    print(f"{len(shards):,} shards to make, {len(shards) - len(todo):,} of them are there already")
    encode_one = partial(encode, size=args.size, quality=args.quality)
    with ThreadPool() as pool:
        for name, shard in todo.items():
            encoded = pool.imap(encode_one, [args.images / image for _, image in shard])
            bar = data.progress(encoded, name, len(shard), unit="image")
            done[name] = write_shard(args.out / name, shard, samples, bar)
            write_text(record, json.dumps({"recipe": recipe, "shards": done}))
    return done


def write_text(path, text):
    data.write_file(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def summary(out, shards, bad):
    """shards: dict of name -> number of samples."""
    for split in ("train", "val"):
        names = [name for name in shards if name.startswith(split)]
        n, size = sum(shards[name] for name in names), sum((out / n).stat().st_size for n in names)
        print(f"{split:6}{len(names):6,} shards{n:10,} samples{size / 1e6:11,.1f} MB")
    if bad:
        print(f"{len(bad):,} rows cannot be used: see {out / 'bad_rows.csv'}. The main reasons:")
    for reason, n in Counter(reason.partition(":")[0] for _, _, reason in bad).most_common(3):
        print(f"{n:9,}  {reason}")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--csv", type=Path, required=True, help="the list: .csv, .tsv or .jsonl")
    add("--out", type=Path, required=True, help="folder for the shards")
    add("--images", type=Path, help="folder of the images (default: the list's)")
    column = {"nargs": 1, "type": str.lower, "metavar": "NAME"}
    add("--image_column", default=IMAGE_COLUMNS, help="(default: the likeliest)", **column)
    add("--caption_column", default=CAPTION_COLUMNS, help="(default: the likeliest)", **column)
    add("--size", type=number(int, 0), default=256, help="short side; 0 keeps files (default 256)")
    add("--quality", type=number(int, 1, 100), default=90, help="of new JPEGs (default 90)")
    add("--val", type=number(float, 0, 0.99), default=0.05, help="share to validate (default 0.05)")
    # A key has five digits for the sample's place in its shard.
    add("--shard_size", type=number(int, 1, 100_000), default=1000, help="samples (default 1000)")
    args = parser.parse_args(argv)
    args.images = (args.images or args.csv.parent).resolve()
    check(args.images.is_dir(), f"there is no folder {args.images}")
    samples, bad = read_list(args.csv, args.image_column, args.caption_column)
    replaced = args.csv.resolve() == (args.out / "bad_rows.csv").resolve()
    check(not replaced, f"the list {args.csv} would be replaced: choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    done = make_shards(args, samples)
    bad = sorted(bad + [tuple(row) for part in done.values() for row in part["bad"]])
    table = io.StringIO()
    csv.writer(table).writerows([("line", "image", "reason"), *bad])
    write_text(args.out / "bad_rows.csv", table.getvalue())
    shards = {name: part["n"] for name, part in done.items() if part["n"]}
    first = f": line {bad[0][0]}, {bad[0][2]}" if bad else ""
    check(shards, f"none of the rows of {args.csv} can be used{first}")
    summary(args.out, shards, bad)
    val = f" --val_data '{args.out}/val-*.tar'" if "val-00000.tar" in shards else ""
    several = any(len(rows) > 1 or len(rows[0][1]) > 1 for rows in samples.values())
    print(f"\nnext: python -m scripts.show '{args.out}/train-*.tar' --picture grid.png")
    print(f"      python train.py --train_data '{args.out}/train-*.tar'{val}", end="")
    print(" --captions json.captions" if several else "")
    if len(samples) < 1_000_000:
        print("      so few pairs are best used to fine-tune: see --init_from in the README")


if __name__ == "__main__":
    cli(main)
