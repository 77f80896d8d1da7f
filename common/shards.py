"""The tar files that hold pairs: which ones a pattern names, where samples lie in them, writing."""

import glob
import hashlib
import io
import json
import os
import tarfile
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

import regex
import torch

from common.cli import InputError, check, progress, write_file
from common.processes import map_in_processes

# -----------------------------------------------------------------------------
# Which shards


def expand_braces(pattern):
    """Yield a00.tar, a01.tar and a02.tar for "a{00..02}.tar". Without braces, yield the pattern."""
    match = regex.search(r"{(\d+)\.\.(\d+)}", pattern)
    if not match:
        yield pattern
        return
    low, high = match.groups()
    for i in range(int(low), int(high) + 1):
        yield from expand_braces(pattern.replace(match[0], f"{i:0{len(low)}d}", 1))


def find_shards(patterns):
    """Return a sorted list of shards. patterns: paths, folders, globs and braces. Each pattern must
    match, and each number in braces, so that a missing download is noticed."""
    shards = set()
    for pattern in chain.from_iterable(expand_braces(str(p)) for p in patterns):
        if os.path.isdir(pattern):
            pattern = os.path.join(glob.escape(pattern), "*.tar")
        found = glob.glob(glob.escape(pattern)) or glob.glob(pattern)  # a name may hold brackets
        check(found, f"no shards match {pattern}")
        shards.update(map(os.path.abspath, found))
    check(shards, f"no shards match {' '.join(map(str, patterns))}")
    return sorted(shards)


# The first name of a split decides, as in cc3m-validation-0000.tar. No other letters may touch it.
SPLIT = regex.compile(r"(?<![a-z])(train|val|valid|validation|test)(?![a-z])")


def is_validation(shard):
    """Return whether a shard is for validation, or for a test. Its name says so, as val-0000.tar
    does, or else that of its folder, as val/0000.tar does."""
    path = Path(shard.lower())
    split = SPLIT.search(path.name) or SPLIT.search(path.parent.name)
    return split is not None and split[0] != "train"


def by_split(shards):
    """Return two lists of shards, for training and for validation, by their names. If all names are
    those of validation shards, return all shards as the first list."""
    training = [shard for shard in shards if not is_validation(shard)]
    validation = [shard for shard in shards if is_validation(shard)]
    return (training, validation) if training else (validation, [])


def shards_of_run(train_data, val_data):
    """Return two lists of shards, to train on and to validate on, by these options of train.py."""
    shards, val_shards = by_split(find_shards(train_data))
    if val_data == ["none"]:
        val_shards = []
    elif val_data is not None:
        val_shards = find_shards(val_data)
        real = {os.path.realpath(shard) for shard in val_shards}  # a folder may be a link
        shards = [shard for shard in shards if os.path.realpath(shard) not in real]
        check(shards, "--val_data names all shards, so none is left to train on")
    print(f"shards: {len(shards)} to train on, {len(val_shards)} to validate on (see --val_data)")
    return shards, val_shards


# -----------------------------------------------------------------------------
# Where each sample lies

# The index has a row of seven columns for each sample:
#
#     0      1            2           3           4          5           6
#     shard  image block  image size  text block  text size  json block  json size
#
# The shard is a place in the list of shards. A tar consists of blocks of 512 bytes, so a member
# begins at a whole block. Its size counts bytes, and is 0 if the sample has no such member.
IMAGE, TEXT, JSON = 1, 3, 5  # the columns of the blocks
COLUMN = {".jpg": IMAGE, ".jpeg": IMAGE, ".png": IMAGE, ".webp": IMAGE, ".txt": TEXT, ".json": JSON}
BLOCK = 512  # bytes in a block of a tar; 32 bits can count the blocks of a terabyte


def split_name(name):
    """Return a member's key, with its folders, and its extension, which begins at the first dot."""
    folder, slash, name = name.rpartition("/")
    stem, dot, extension = name.partition(".")
    return folder + slash + stem if stem else "", dot + extension.lower()


def read_headers(path):
    """Return the index rows of a shard, a list of lists of seven integers, the first of which is 0,
    and a list of texts that say what is not used. A damaged shard is used up to the damage."""
    rows = {}  # key -> index row
    unused = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = split_name(member.name)
                if not key or not extension.endswith(tuple(COLUMN)) or not member.isfile():
                    continue
                row = rows.setdefault(key, [0, 0, 0, 0, 0, 0, 0])
                if extension in COLUMN and member.size < 2**31:  # the index has 32-bit numbers
                    column = COLUMN[extension]
                    row[column : column + 2] = member.offset_data // BLOCK, member.size
            # tarfile stops in silence at a header that it cannot read. A whole tar ends in zeros.
            tar.fileobj.seek(tar.offset)
            rest = iter(partial(tar.fileobj.read, 2**20), b"")
            if any(part.strip(b"\0") for part in rest):
                unused.append(f"{path}: damaged, and not used beyond that")
    except OSError as error:  # Do not return: what is returned is cached, and this may pass.
        raise InputError(f"{path} cannot be read: {error}") from error
    except tarfile.TarError as error:
        reason = "damaged, and not used beyond that" if rows else "damaged, compressed, or no tar"
        unused.append(f"{path}: {reason}: {error}")
    used = []
    for key, row in rows.items():
        if row[IMAGE + 1] > 0:
            used.append(row)
        else:
            unused.append(f"{path}:{key}: no image, an empty one, one of 2 GiB, or two dots")
    return used, unused


def cache_folder():
    """Return the folder for files that can be made again."""
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent, "superclip")


def cache_file(shard):
    """Return the file for the index of a shard, another one whenever the shard has changed, or this
    module, which makes the index."""
    stamp = shard, os.path.getsize(shard), os.stat(shard).st_mtime_ns
    digest = hashlib.sha1(repr(stamp).encode() + Path(__file__).read_bytes()).hexdigest()
    return cache_folder() / f"index-{digest}"


def build_index(shards):
    """Return the index, an int32 tensor (N, 7), and a list of texts that say which samples are not
    used. The index is one tensor, because Python objects would be copied to each loading process.
    The part of each shard is cached, until its path, size or modification time changes."""
    parts = {}
    for shard in shards:
        with suppress(Exception):  # nothing is cached, or damaged, for which torch has many kinds
            parts[shard] = torch.load(cache_file(shard), weights_only=True)
    missing = [shard for shard in shards if shard not in parts]
    results = progress(map_in_processes(read_headers, missing), "indexing shards", unit="shard")
    for shard, (rows, texts) in zip(missing, results):
        parts[shard] = torch.tensor(rows, dtype=torch.int32).view(-1, 7), texts
        with suppress(OSError, RuntimeError):  # no space on the disk, or a user without a home
            cache_folder().mkdir(parents=True, exist_ok=True)
            write_file(cache_file(shard), partial(torch.save, parts[shard]))
    for number, shard in enumerate(shards):
        rows, _ = parts[shard]
        rows[:, 0] = number
    index = torch.cat([parts[shard][0] for shard in shards])
    unused = [text for shard in shards for text in parts[shard][1]]
    return index, unused


def add_sample(tar, key, suffix, image, caption, fields):
    """Add a sample to a shard that is being written. The image is the bytes of a file."""
    text = caption.encode("utf-8", "replace")
    metadata = json.dumps(fields).encode()
    for extension, content in ((suffix, image), (".txt", text), (".json", metadata)):
        info = tarfile.TarInfo(key + extension)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
