"""Make shards from a list of images and captions:

    python -m scripts.pack --csv pairs.csv --images photos/ --out shards/

The list is a CSV, TSV or JSONL file in UTF-8 with column names. All rows of one image become one
sample: .txt holds its first caption, and .json holds all `captions` and the other columns of the
list, so that a column `long` serves as --label_captions json.long. Where the rows of an image
differ in a column, its field is a list. Large images are made smaller; --size 0 keeps the files as
they are. Rows that cannot be used are listed in bad_rows.csv, with the reason.

A hash of the image file decides whether a sample is for training or for validation. So equal files
are never on both sides, and an image keeps its side when the list grows or is packed in parts. With
--group, a hash of that column decides instead, so that two photographs of one product stay on one
side. An image without a group is a group of its own.

Start the command again after an interruption, or when missing images have arrived: it packs only
the images that are in no shard yet.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import statistics
import tarfile
import time
from collections import Counter
from functools import partial
from multiprocessing.pool import ThreadPool  # threads: Pillow releases Python's global lock
from pathlib import Path

import torch
from PIL import Image

import data
from cli import (
    InputError,
    check,
    lock_folder,
    make_parser,
    number,
    pick_dtype,
    run_command,
    write_file,
)
from scripts.show import kind_of, normal, read_samples, report_overlap

# Likely names of the two columns, the likeliest first.
IMAGE_COLUMNS = "image filepath file_path image_path path filename file_name file img url".split()
CAPTION_COLUMNS = "caption captions text title description alt_text".split()
SPLITS = ("train", "val")
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
    csv.field_size_limit(2**31 - 1)  # characters; by default a field of 131,073 ends the list
    reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        twice = [name for name, n in Counter(reader.fieldnames).items() if n > 1 and name]
        check(not twice, f"{path} has two columns {', '.join(twice)}: rename one of them")
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        # A bad row is not enough: if a quotation mark is not closed, all that follows may be lost.
        raise InputError(f"{path}, line {reader.line_num + 1}: {error}: see its quotes") from None


def find_column(option, names, columns):
    """The first of these names that is among the columns, in any case. option: what sets it."""
    for name in names:
        for column in columns:
            if column.strip().lower() == name.lower():
                return column
    raise InputError(f"which column is it? Choose with {option}: {', '.join(columns)}")


def problem_of(row, image, captions, is_inside):
    """Why a row cannot be used, or None. row: its other columns; is_inside: is the image in the
    folder of images?"""
    if None in row:
        return "more fields than columns (is the caption in quotes?), or no JSON object"
    if not image:
        return "no image is named"
    if not is_inside:
        return "the path leads out of the folder of images"
    if not captions:
        return "the caption is missing or empty"
    if max(map(len, captions)) > data.MAX_CAPTION:
        return "the caption is too long"
    if any(map(NOT_UTF8.search, captions)):
        return "the caption is not UTF-8"
    if any(map(OTHER_ROWS.search, captions)):
        return "the caption holds other rows (see its quotes)"
    return None


def read_list(args):
    """Read the list. Returns (samples, bad).

    samples: dict of image path within the folder -> list of its rows, each (line number, captions,
    dict of the other columns). bad: set of (line number, image, reason).
    """
    path = args.csv
    check(not path.is_dir(), f"{path} is a folder: --csv is a list of images and captions")
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        is_json = "json" in path.suffix.lower()
        rows = list(json_rows(file) if is_json else table_rows(file, path))
    columns = {}
    for _, row in rows:
        columns |= dict.fromkeys(row)
    columns = [column for column in columns if column is not None]
    check(columns, f"{path} has no rows that can be read (JSONL has an object on each line)")
    image_column = find_column("--image_column", args.image_column, columns)
    caption_column = find_column("--caption_column", args.caption_column, columns)
    others = set(columns) - {image_column, caption_column}
    check(
        args.group is None or args.group in others, f"there is no column {args.group} for --group"
    )
    print(f"images from column {image_column!r}, captions from column {caption_column!r}")
    clash = others.intersection(WRITTEN)
    check(not clash, f"rename {', '.join(clash)} in {path}: pack writes fields of these names")

    samples = {}
    bad = set()
    folder = os.path.join(args.images, "")
    for line, row in rows:
        image = row.pop(image_column, None)
        image = image.strip() if isinstance(image, str) else ""
        captions = row.pop(caption_column, None)
        if not isinstance(captions, list):
            captions = [captions]
        texts = [text.strip() for text in captions if isinstance(text, str)]
        texts = [text for text in texts if text]
        file = os.path.normpath(os.path.join(folder, image))  # two spellings are one image
        reason = problem_of(row, image, texts, file.startswith(folder))
        if reason is not None:
            bad.add((line, image, reason))
        else:
            samples.setdefault(file.removeprefix(folder), []).append((line, texts, row))
    return samples, bad


# -----------------------------------------------------------------------------
# Samples


def merge(rows):
    """The rows of one image -> fields of .json: the captions and the other columns. Where the rows
    differ in a column, its field is a list."""
    captions = {}
    columns = {}  # name -> dict of a value as JSON -> the value
    for _, texts, row in rows:
        captions |= dict.fromkeys(texts)
        for name, value in row.items():
            values = columns.setdefault(name, {})
            if value not in (None, ""):
                values[json.dumps(value)] = value
    fields = {"captions": list(captions)}
    for name, values in columns.items():
        fields[name] = list(values.values())
        if len(values) == 1:
            fields[name] = fields[name][0]
        if len(values) == 0:
            fields[name] = None
    return fields


def split_of(sha256, group, val):
    """The side of an image, train or val: by a hash of its group, or of its file if it has none."""
    if group not in (None, ""):
        text = str(group).strip()
        sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return "val" if int(sha256[:8], 16) < val * 2**32 else "train"


def smaller(image, size, quality):
    """A PIL image -> the bytes of a JPEG with a short side of at most `size` pixels, and its width
    and height."""
    image.draft("RGB", (2 * size, 2 * size))  # leaves enough for a sharp resize
    image = data.upright_rgb(image)  # the new file has no EXIF data
    scale = min(1, size / min(image.size))
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=quality, comment=b"")  # nor the old comment
    return jpeg.getvalue(), image.size


def encode(item, split, args):
    """(image, its rows) -> (suffix, bytes, fields of .json), or the reason why not, as a string.
    None if the image belongs to the other split.

    An image with a short side of more than --size pixels becomes a smaller JPEG. A file that is
    small enough stays as it is, because encoding it again would lose quality, unless shards do not
    hold its format.
    """
    name, rows = item
    file = args.images / name
    size = args.size or 10**9
    try:
        if file.exists() and not file.is_file():  # reading a pipe or a device may never end
            return f"not a file: {file}"
        content = file.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        fields = merge(rows)
        group = fields.get(args.group)
        if isinstance(group, list):
            return f"it is in several groups: {group}"
        if split_of(sha256, group, args.val) != split:
            return None
        image = Image.open(io.BytesIO(content), formats=data.FORMATS)
        suffix = KEPT.get(image.format)
        if suffix is not None and min(image.size) <= size:
            image.load()  # it can be decoded
            width, height = image.size
        else:
            suffix = ".jpg"
            content, (width, height) = smaller(image, size, args.quality)
    except FileNotFoundError:
        return f"there is no such file: {file}"
    except Exception as error:  # Pillow raises a dozen kinds, some with an address in memory
        return f"the image cannot be read: {str(error).partition(' <')[0]}"
    fields |= {"image": name, "width": width, "height": height, "sha256": sha256}
    return suffix, content, fields


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


def shards_of(out, split="*"):
    return sorted(map(str, out.glob(f"{split}-*.tar")))


def packed_images(shards):
    """The names of all images that these shards hold."""
    if not shards:
        return set()
    samples = data.Shards(shards)
    return {json.loads(samples.read(row, data.JSON))["image"] for row in samples.index.tolist()}


def encode_all(args, samples, bad, pool, split):
    """Yield the samples of a split as write_shard takes them. What cannot be used goes to `bad`."""
    encode_one = partial(encode, split=split, args=args)
    items = list(samples.items())
    n = 256
    # n at a time: imap runs ahead, and would hold in memory what a slow disk has not taken yet.
    for i in data.progress(range(0, len(items), n), split, unit="image", unit_scale=n):
        part = items[i : i + n]
        for (image, rows), result in zip(part, pool.imap(encode_one, part)):
            if isinstance(result, str):
                bad.update((line, image, result) for line, _, _ in rows)
            elif result is not None:
                yield result


def new_shard(out, split):
    """The first path of a shard that is not there yet."""
    i = 0
    while (out / f"{split}-{i:05d}.tar").exists():
        i += 1
    return out / f"{split}-{i:05d}.tar"


def make_shards(args, samples, bad):
    """Write samples into new shards. What cannot be used goes to `bad`."""
    splits = SPLITS if args.val > 0 else SPLITS[:1]
    with ThreadPool() as pool:
        # Each split reads all files. To read them once, two shards would have to grow in memory.
        for split in splits:
            encoded = encode_all(args, samples, bad, pool, split)
            for first in encoded:  # each turn writes a shard
                path = new_shard(args.out, split)
                shard = itertools.chain([first], itertools.islice(encoded, args.shard_size - 1))
                write_file(path, partial(write_shard, path.stem[-5:], shard))


def write_bad_rows(path, bad):
    text = io.StringIO()
    csv.writer(text).writerows([("line", "image", "reason"), *sorted(bad)])
    content = text.getvalue().encode("utf-8", "backslashreplace")
    write_file(path, lambda file: file.write(content))


# -----------------------------------------------------------------------------
# What the folder holds


def print_summary(out, bad):
    """Print what the folder holds and what was not used. Returns the numbers of validation and of
    training pairs."""
    numbers = []
    for split in ("val", "train"):
        shards = shards_of(out, split)
        n = len(data.build_index(shards)[0]) if shards else 0
        size = sum(map(os.path.getsize, shards)) / 1e6
        print(f"{split:6}{len(shards):6,} shards{n:10,} samples{size:11,.1f} MB")
        numbers.append(n)
    print(f"rows that cannot be used: {len(bad):,}, listed in {out / 'bad_rows.csv'}")
    kinds = Counter(kind_of(reason) for _, _, reason in bad)
    for reason, count in kinds.most_common(3):
        print(f"{count:9,}  {reason}")
    return numbers


def print_overlap(out):
    """Print how many captions are on both sides, and which images are, because equal files may be
    in two groups."""
    train, val = (data.Pairs(shards_of(out, x), None, 0, ["json.captions"]) for x in SPLITS)
    captions = set()
    rows = data.progress(train.index.tolist(), "comparing captions", unit="sample")
    for _, texts, _ in read_samples(train, rows, []):
        captions.update(map(normal, texts))
    report_overlap(train, val, captions)


# -----------------------------------------------------------------------------
# What to do with the pairs

# Thousand millions of operations: to encode an image, and to train on a pair with a caption of 16
# tokens, as torch counts them
OPERATIONS = {
    "tiny": (0.065, 0.24),
    "ViT-S-16": (9.2, 30),
    "ViT-B-32": (8.8, 30),
    "ViT-B-16": (35, 109),
}
# Weights that open_clip downloads, 0.6 GB each
PUBLISHED = {"ViT-B-32": "laion2b_s34b_b79k", "ViT-B-16": "laion2b_s34b_b88k"}
FEWEST = 64  # training pairs: two batches of 32


def measure_speed(device, dtype):
    """Operations a second of a product of two large matrices, the most that a device can do."""
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)  # on a shared machine the fastest is luck


def share_in_training(model, device):
    """How much of the speed of a large product a training step reaches. For a GPU it is the
    assumption of docs/speed.md. On a CPU, where the product is in float32, it was tried on two
    cores: units for bfloat16 make a large product six times as fast, and a step not even twice."""
    if device == "cuda":
        return 0.15
    if model == "tiny":
        return 1 / 3
    return 1.2 if pick_dtype(torch.device(device)) == "bfloat16" else 0.7


def duration(operations, speed):
    """How long so many thousand millions of operations take, as a text. speed: per second."""
    minutes = operations * 1e9 / speed / 60
    if minutes < 120:
        return f"about {max(2, round(minutes))} minutes here"
    return f"about {round(minutes / 60):,} hours here"


def model_to_train(n, device):
    """The preset that n pairs and a device allow to train from nothing, the number of epochs and
    the other options."""
    if device == "cuda" and n >= 30_000:
        return "ViT-B-16" if n >= 1_000_000 else "ViT-S-16", 30, "--vocab clip"
    # About 20,000 steps of a tiny model: docs/products.md tries half and twice as many.
    epochs = max(1, min(30, round(20_000 * 32 / n)))
    return "tiny", epochs, "--batch_size 32 --learning_rate 4e-4"


def print_way(purpose, price, *commands):
    print(f"\n{purpose} ({price}):")
    for command in commands:
        print(f"  {command}")


def print_ways(out, n_val, n, several):
    """Print what can be done with n training pairs in the folder `out`, and what that costs.
    several: do images have several captions?"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speed = measure_speed(device, torch.float32)
    encoding = 0.9 * speed  # as in a trial with ViT-B/32
    if device == "cuda":
        speed = measure_speed(device, getattr(torch, pick_dtype(torch.device(device))))
    shards = shlex.quote(f"{out}/train-*.tar")
    more = " --captions json.captions" if several else ""
    vocab = f"python -m scripts.vocab {shards}{more} --out {shlex.quote(f'{out}/vocab.tiktoken')}"
    if n_val > 0:
        more = f" --val_data {shlex.quote(f'{out}/val-*.tar')}{more}"
    show = f"python -m scripts.show {shards}{more} --picture grid.png"
    print_way(
        "a vocabulary of the captions' words, and a look at the pairs", "seconds", vocab, show
    )

    name = "ViT-B-32" if device == "cpu" else "ViT-B-16"
    to_encode, to_train = OPERATIONS[name]
    weights = f"open_clip.create_model('{name}', '{PUBLISHED[name]}').state_dict()"
    get = [
        "pip install open_clip_torch",
        f"python -c \"import open_clip, torch; torch.save({weights}, 'laion.pt')\"",
        "python -m scripts.convert laion.pt clip.pt",
    ]
    search = f"python -m scripts.search --checkpoint clip.pt --data {shlex.quote(str(out))}"
    search += f" --features {shlex.quote(f'{out}/features.npz')} 'what you look for'"
    price = f"downloads 0.6 GB, then {duration((n + n_val) * to_encode, encoding)}"
    print_way("search without training: the best with fewer than 10,000 pairs", price, *get, search)
    if n < FEWEST:
        return

    train = f"python train.py --train_data {shards}{more}"
    tune = f"{train} --init_from clip.pt --epochs 5"
    if n < 10_000:
        tune += " --batch_size 32"
    training = speed * share_in_training(name, device)
    price = f"the same download, then {duration(5 * n * to_train, training)}"
    print_way("fine-tune, for words of your own: with some thousand pairs", price, *get, tune)

    model, epochs, options = model_to_train(n, device)
    train += f" --model {model} --epochs {epochs} {options}"
    training = speed * share_in_training(model, device)
    price = f"no download, {duration(epochs * n * OPERATIONS[model][1], training)}"
    print_way("train from nothing: weak with fewer than 10,000 pairs", price, train)


# -----------------------------------------------------------------------------
# The command


def check_record(args, recipe):
    """Only shards of the same list and the same options can be added to."""
    record = args.out / "pack.json"
    same = record.is_file() and record.read_bytes() == recipe
    empty = not any(args.out.glob("*.tar"))
    check(same or empty, f"{args.out} has shards of another list or options: name another --out")


def read_options(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--csv", type=Path, required=True, help="the list: .csv, .tsv or .jsonl")
    add("--out", type=Path, required=True, help="folder for the shards")
    add("--images", type=Path, help="folder of the images (default: the list's)")
    add("--image_column", nargs=1, default=IMAGE_COLUMNS,
        help="column of images (default: a likely name)")
    add("--caption_column", nargs=1, default=CAPTION_COLUMNS,
        help="column of captions (default: a likely name)")
    add("--group", metavar="COLUMN", help="column: rows with the same value stay on one side")
    add("--size", type=number(int, 0), default=256,
        help="pixels of a short side, at most; 0 keeps files (default 256)")
    add("--quality", type=number(int, 1, 100), default=90,
        help="quality of new JPEGs, 1 to 100 (default 90)")
    add("--val", type=number(float, 0, 0.99), default=0.05, help="share to validate (default 0.05)")
    # A key has five digits for the sample's place in its shard.
    add("--shard_size", type=number(int, 1, 100_000), default=1000,
        help="samples in a shard (default 1000)")
    # fmt: on
    args = parser.parse_args(argv)
    args.images = Path(os.path.abspath(args.images or args.csv.parent))
    check(args.csv.name != "bad_rows.csv", f"rename {args.csv}: pack writes a file of this name")
    return args


def claim_folder(args):
    """Makes and locks --out, and keeps a record in it of what is packed there. Raises InputError if
    something else is."""
    content = hashlib.sha256(args.csv.read_bytes()).hexdigest()
    recipe = json.dumps({**vars(args), "csv": content, "out": None}, default=str).encode()
    check_record(args, recipe)
    args.out.mkdir(parents=True, exist_ok=True)
    lock_folder(args.out)
    check_record(args, recipe)  # another pack may have been here in the meantime
    for remains in args.out.glob(".*.tar.*.tmp"):  # of a pack that was killed
        remains.unlink()
    write_file(args.out / "pack.json", lambda file: file.write(recipe))


def main(argv):
    args = read_options(argv)
    samples, bad = read_list(args)
    claim_folder(args)
    packed = packed_images(shards_of(args.out))
    todo = {image: rows for image, rows in samples.items() if image not in packed}
    print(f"{len(todo):,} images to pack, {len(samples) - len(todo):,} are in shards already")
    make_shards(args, todo, bad)

    write_bad_rows(args.out / "bad_rows.csv", bad)
    n_val, n = print_summary(args.out, bad)
    check(n_val + n > 0, f"none of the rows of {args.csv} can be used")
    if n_val > 0 and n > 0:
        print_overlap(args.out)
    elif args.val > 0:
        print("one side is empty: there are few images or groups, or --val is too small")
    several = any(len(rows) > 1 or len(rows[0][1]) > 1 for rows in samples.values())
    print_ways(args.out, n_val, n, several)


if __name__ == "__main__":
    run_command(main)
