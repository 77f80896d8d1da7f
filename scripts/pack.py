"""Make shards from a list of images and captions:

    python data.py pack --csv pairs.csv --out shards/

The list is CSV, TSV or JSONL. An image that stands in several rows becomes one sample with several
captions: .txt holds the first, json.captions all of them, and the other columns of the list are
fields of the .json as well (so a column `long` can be used as --label_captions json.long). Run
again after an interruption, it goes on with the next shard.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import tarfile
import warnings
from collections import Counter
from multiprocessing.pool import ThreadPool  # threads: Pillow works outside Python's global lock
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import MAX_CAPTION, BadSample, _open, _orientation, _rgb, _upright
from superclip import InputError

IMAGE_COLUMNS = (
    "image",
    "filepath",
    "file_path",
    "image_path",
    "path",
    "filename",
    "file_name",
    "file",
    "img",
    "url",
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description", "alt_text")
KEPT = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # file formats that shards hold

# -----------------------------------------------------------------------------
# The list


def read_list(path, image_column=None, caption_column=None):
    """CSV, TSV or JSONL -> (samples, bad). A sample is a dict of image (as the list has it), lines,
    captions and fields, the other columns; bad is a list of (line, image, reason)."""
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    # surrogateescape: bytes that are not UTF-8 spoil their own row, not the list
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            samples, bad = {}, []
            for line, row in _rows(path, file):
                if isinstance(row, str):
                    bad.append((line, "", row))
                    continue
                image_column = image_column or _find("image", IMAGE_COLUMNS, row, path)
                caption_column = caption_column or _find("caption", CAPTION_COLUMNS, row, path)
                image, captions = row.pop(image_column, None), row.pop(caption_column, None)
                try:
                    captions = _captions(captions)
                    if not isinstance(image, str) or not image.strip():
                        raise BadSample("no image is named")
                except BadSample as error:
                    bad.append((line, image if isinstance(image, str) else "", str(error)))
                    continue
                image = image.strip()
                sample = samples.setdefault(
                    image, dict(image=image, lines=[], captions=[], fields=row)
                )
                sample["lines"].append(line)
                sample["captions"] += [text for text in captions if text not in sample["captions"]]
        except csv.Error as error:
            raise InputError(f"{path} is no table: {error}") from None
    for column, columns in ((image_column, "image"), (caption_column, "caption")):
        if column is None:
            raise InputError(f"{path} has no rows with a column for the {columns}")
    return list(samples.values()), bad


def _rows(path, file):
    """Pairs (line number, dict of columns); for a line that cannot be used a reason instead of the
    dict."""
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        for line, text in enumerate(file, start=1):
            if text.strip():
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError):
                    row = None
                yield line, row if isinstance(row, dict) else "not a JSON object"
        return
    csv.field_size_limit(2**31 - 1)  # Python's own is 128 kB, and stops at a missing quote
    first = file.readline()
    file.seek(0)
    reader = csv.DictReader(
        file, delimiter="\t" if "\t" in first or path.suffix.lower() == ".tsv" else ","
    )
    for row in reader:
        # More fields than columns: a caption with a comma that is not in quotes. It would be cut.
        yield (
            reader.line_num,
            "more fields than columns: put the caption in quotes" if None in row else row,
        )


def _find(what, names, row, path):
    columns = {column.strip().lower(): column for column in row}
    for name in names:
        if name in columns:
            return columns[name]
    raise InputError(
        f"{path} has the columns {', '.join(row)}: say with --{what}_column which one is the {what}"
    )


def _captions(captions):
    """What stands in the caption's column -> list of strings. Raises BadSample."""
    captions = [captions] if isinstance(captions, str) else captions
    if (
        captions is None
        or not isinstance(captions, list)
        or not all(isinstance(text, str) for text in captions)
    ):
        raise BadSample("no caption")
    captions = [text.strip() for text in captions if text.strip()]
    if not captions:
        raise BadSample("the caption is empty")
    if max(map(len, captions)) > MAX_CAPTION:
        raise BadSample("the caption is absurdly long")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError:
        raise BadSample("the caption is not UTF-8") from None
    return captions


# -----------------------------------------------------------------------------
# Images


def encode(path, size, quality):
    """An image file -> (extension, bytes, width, height), at most `size` pixels on the short side;
    size 0 keeps the file's bytes. A JPEG that is small enough keeps its bytes too: nothing is lost
    twice. Raises BadSample."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadSample(f"there is no file {path}") from None
    except OSError as error:
        raise BadSample(f"{path} cannot be read: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _open(content)
            small = not size or (min(image.size) <= size and image.format == "JPEG")
            if small and image.format in KEPT:
                image.load()  # all of it can be decoded
                return KEPT[image.format], content, image.width, image.height
            orientation = _orientation(image)  # the new file has no EXIF data
            if size:
                # twice the size leaves the resize below enough to work with
                image.draft("RGB", (2 * size, 2 * size))
            image = Image.fromarray(_upright(_rgb(image), orientation).numpy())
            if size and min(image.size) > size:
                scale = size / min(image.size)
                image = image.resize(
                    [max(1, round(side * scale)) for side in image.size], Image.BICUBIC
                )
            out = io.BytesIO()
            image.save(out, "JPEG", quality=quality)
            return ".jpg", out.getvalue(), image.width, image.height
    except BadSample:
        raise
    except Exception as error:  # Pillow raises a dozen kinds
        raise BadSample(f"the image cannot be decoded: {error}") from None


# -----------------------------------------------------------------------------
# Shards


def plan(samples, val, shard_size):
    """Which sample goes where: dict of shard name -> list of (key, sample). A sample is for
    validation by a hash of its image's name, so that it stays so when the list grows."""
    shards, counts = {}, Counter()
    for sample in samples:
        digest = hashlib.sha1(sample["image"].encode(errors="surrogateescape")).digest()
        split = "val" if int.from_bytes(digest[:4], "big") < val * 2**32 else "train"
        number, i = divmod(counts[split], shard_size)
        counts[split] += 1
        shards.setdefault(f"{split}-{number:05d}.tar", []).append((f"{number:05d}{i:05d}", sample))
    return shards


def write_shard(path, samples, encode_sample, pool, bar):
    """Write one shard, whole or not at all. Returns the number of samples in it and the list of bad
    rows."""
    temporary, n, bad = path.with_name(f".{path.name}.tmp"), 0, []
    with tarfile.open(temporary, "w") as tar:
        results = pool.imap(encode_sample, [sample for _, sample in samples])
        for (key, sample), encoded in zip(samples, results, strict=True):
            bar.update()
            if isinstance(encoded, BadSample):
                bad += [(line, sample["image"], str(encoded)) for line in sample["lines"]]
                continue
            extension, content, width, height = encoded
            fields = {**sample["fields"], "image": sample["image"], "captions": sample["captions"]}
            fields |= {"width": width, "height": height}
            text = json.dumps(
                fields
            ).encode()  # ASCII: a lone surrogate in another column does no harm
            for name, part in (
                (extension, content),
                (".txt", sample["captions"][0].encode()),
                (".json", text),
            ):
                info = tarfile.TarInfo(key + name)
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
            n += 1
    if n:
        os.replace(temporary, path)
    else:
        temporary.unlink()
    return n, bad


def pack(args):
    samples, bad = read_list(args.csv, args.image_column, args.caption_column)
    shards = plan(samples, args.val, args.shard_size)
    folder = args.images or args.csv.parent
    args.out.mkdir(parents=True, exist_ok=True)

    # What is done already. It counts only if it was made from the same list in the same way.
    recipe = [
        hashlib.sha1(args.csv.read_bytes()).hexdigest(),
        str(folder.resolve()),
        args.size,
        args.quality,
        args.val,
    ]
    recipe += [args.shard_size, args.image_column, args.caption_column]
    progress, done = args.out / "pack.json", {}
    if progress.is_file():
        content = json.loads(progress.read_text())
        if content["recipe"] != recipe:
            raise InputError(
                f"{args.out} holds shards of another list or other flags: choose another --out"
            )
        done = {
            name: part
            for name, part in content["shards"].items()
            if (args.out / name).is_file() or not part["n"]
        }
    elif any(args.out.glob("*.tar")):
        raise InputError(
            f"{args.out} holds shards that were not made by this command: choose another --out"
        )

    def encode_sample(sample):
        try:
            return encode(folder / sample["image"], args.size, args.quality)
        except BadSample as error:
            return error

    kept = len(done)
    bar = tqdm(
        total=len(samples),
        desc="packing",
        unit="image",
        initial=sum(len(shards[name]) for name in done),
        disable=None,
    )
    with ThreadPool(args.workers) as pool, bar:
        for name in shards:
            if name not in done:
                n, bad_here = write_shard(args.out / name, shards[name], encode_sample, pool, bar)
                done[name] = {"n": n, "bad": bad_here}
                part = {name: done[name] for name in shards if name in done}
                write_text(progress, json.dumps({"recipe": recipe, "shards": part}))

    bad = sorted([*bad, *(tuple(row) for part in done.values() for row in part["bad"])])
    sizes = {name: done[name]["n"] for name in shards if done[name]["n"]}
    if bad:
        table = io.StringIO()
        csv.writer(table).writerows([("line", "image", "reason"), *bad])
        write_text(args.out / "bad_rows.csv", table.getvalue())
    write_text(args.out / "sizes.json", json.dumps(sizes, indent=2) + "\n")
    if not sizes:
        first = f": line {bad[0][0]}, {bad[0][2]}" if bad else ""
        raise InputError(f"none of the {len(bad):,} rows of {args.csv} can be used{first}")
    summary(args, samples, sizes, bad, kept)


def summary(args, samples, sizes, bad, kept):
    for split in ("train", "val"):
        names = [name for name in sizes if name.startswith(split)]
        size = sum((args.out / name).stat().st_size for name in names) / 1e6
        print(
            f"{split:6}{len(names):6,} shards"
            f"{sum(sizes[name] for name in names):10,} samples{size:11,.1f} MB"
        )
    if kept:
        print(f"{kept:,} of the shards were there already")
    if bad:
        print(f"{len(bad):,} rows left out, listed in {args.out / 'bad_rows.csv'}; most often:")
        for reason, n in Counter(
            reason.partition(":")[0].partition(" /")[0] for _, _, reason in bad
        ).most_common(3):
            print(f"{n:9,}  {reason}")
    captions = (
        " --captions json.captions"
        if any(len(sample["captions"]) > 1 for sample in samples)
        else ""
    )
    val = (
        f" --val_data '{args.out}/val-*.tar'"
        if any(name.startswith("val") for name in sizes)
        else ""
    )
    print(f"\nnext: python data.py show '{args.out}/train-*.tar' --picture grid.png")
    print(f"      python train.py --train_data '{args.out}/train-*.tar'{val}{captions}")


def write_text(path, text):
    """Whole or not at all. surrogateescape: names of files that are not UTF-8 go back to the bytes
    they were."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    os.replace(temporary, path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="data.py pack",
        description="Make shards from a list of images and captions.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--csv",
        type=Path,
        required=True,
        metavar="FILE",
        help="the list: .csv, .tsv or .jsonl, with column names",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    add(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder that the list's paths start from (default: the list's)",
    )
    add(
        "--image_column",
        metavar="NAME",
        help="column of the image's path (default: found by its name)",
    )
    add(
        "--caption_column",
        metavar="NAME",
        help="column of the caption (default: found by its name)",
    )
    add(
        "--size",
        type=int,
        default=256,
        metavar="PIXELS",
        help="short side at most; 0 keeps the files (default 256)",
    )
    add(
        "--quality",
        type=int,
        default=90,
        metavar="Q",
        help="of the JPEGs made smaller (default 90)",
    )
    add(
        "--val",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of the images for validation (default .05)",
    )
    add(
        "--shard_size", type=int, default=1000, metavar="N", help="samples per shard (default 1000)"
    )
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads (default: cores)")
    args = parser.parse_args(argv)
    if (
        args.size < 0
        or not 0 <= args.val < 1
        or not 0 < args.shard_size <= 100_000
        or args.workers < 1
    ):
        raise InputError(
            "--size is 0 or more, --val from 0 to below 1, --shard_size 1 to 100,000, "
            "--workers 1 or more"
        )
    if args.images and not args.images.is_dir():
        raise InputError(f"there is no folder {args.images}")
    try:
        pack(args)
    except OSError as error:  # no permission, or a full disk: what is done stays done
        raise InputError(f"cannot write to {args.out}: {error}") from None
