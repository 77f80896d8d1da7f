"""Search images by text, or by another image:

    python -m scripts.search --checkpoint out/best.pt --images photos/ "a red mug" "two dogs"
    python -m scripts.search --checkpoint out/best.pt --images photos/ --like photos/1.jpg --k 30
    python -m scripts.search --checkpoint out/best.pt --data 'shards/*.tar' "a mug" --out found.png
    python -m scripts.search ... --features photos.npz

The first command prints the best images for each text with their scores, and --out draws them, too.
A score is the cosine similarity of two features. Compare only scores of the same text, because some
texts score higher than others everywhere.

--features keeps the features of the images searched, so that the next search encodes only those
that are new or have changed. Other programs, such as a notebook or FAISS, can read the file:

    photos = numpy.load("photos.npz")
    photos["names"]     # (N,) absolute paths; SHARD:KEY for images in shards
    photos["features"]  # (N, E) float32, of length 1

The other arrays tell versions apart: image i is sizes[i] bytes of files[i], from offsets[i] on, as
they were at mtimes[i], in ns; checkpoint is the SHA-256 of the checkpoint.

Axes: N images, E embedding, Q searches, S pixels a side.
"""

import argparse
import hashlib
import math
import os
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

import data
import eval as evaluation
from cli import (
    InputError,
    check,
    number,
    output_file,
    pick_device,
    printable,
    run_command,
    write_file,
)
from scripts.pictures import contact_sheet, image_files, load_font, picture_file, wrap

# -----------------------------------------------------------------------------
# Where images are

# An image is `size` bytes of a file, from `offset` on, as they were at mtime, in ns. Images that
# are equal in all of that have the same content, so they are encoded once.
Entry = namedtuple("Entry", "file name offset size mtime")
COLUMNS = "files", "names", "offsets", "sizes", "mtimes"  # in the file of features


def file_entries(paths, out):
    """Image files and folders -> their entries. The picture `out` must not be one of the files."""
    for path in image_files(paths, out):
        name, stat = os.path.abspath(path), os.stat(path)
        yield Entry(name, name, 0, stat.st_size, stat.st_mtime_ns)


def shard_entries(pairs):
    """data.Pairs -> the entries of all their images, with or without captions, as a dict {entry:
    its row of the index}."""
    print(f"parts of shards not used: {len(pairs.unused):,} (if any: see python -m scripts.show)")
    files = [(os.path.abspath(shard), os.stat(shard).st_mtime_ns) for shard in pairs.shards]
    entries = {}
    for row in pairs.index.tolist():
        file, mtime = files[row[0]]
        offset, size = row[data.IMAGE] * data.BLOCK, row[data.IMAGE + 1]
        entries[Entry(file, f"{file}:{pairs.key(row)}", offset, size, mtime)] = row
    return entries


def known_of(pairs, row):
    """What is known of an image in shards, a list: the file that scripts/pack.py made it from, and
    its first caption."""
    known = []
    for source in ("json.image", "txt"):
        with suppress(data.BadSample, OSError):
            known.append(pairs.texts(row, source)[0])
    return known


class Images(Dataset):
    """The images of entries, for evaluation.batches: (uint8 tensor (3, S, S), entry), where a text
    takes the image's place if it cannot be read."""

    def __init__(self, entries, side):
        self.entries, self.side = entries, side

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        entry = self.entries[i]
        try:
            content = np.fromfile(entry.file, np.uint8, entry.size, "", entry.offset).tobytes()
            return data.load_image(content, self.side), entry
        except (data.BadSample, OSError) as error:
            return f"{entry.name}: {error}", entry


# -----------------------------------------------------------------------------
# Features, and the file that keeps them


def read_features(path, checkpoint, E):
    """The file of --features -> dict {entry: feature (E,)}. Raises InputError unless it was made by
    the checkpoint with this SHA-256, because features of different models cannot be compared."""
    try:
        with np.load(path, allow_pickle=False) as content:
            features = torch.from_numpy(content["features"]).view(len(content["names"]), E)
            entries = map(Entry, *(content[name].tolist() for name in COLUMNS))
            features = dict(zip(entries, features, strict=True))
            made_by = content["checkpoint"].item()
    except Exception:  # NumPy and zipfile raise a dozen kinds
        raise InputError(f"{path} is damaged, or no file of this command: name another") from None
    check(made_by == checkpoint, f"{path} is of another checkpoint: name another file or delete it")
    return features


def find_features(model, entries, workers, path=None, checkpoint="", batch_size=128):
    """list of entries -> dict {entry: feature (E,)} of all images that can be read; the others are
    named. Features that are in the file `path` come from there, and all are kept there; checkpoint
    is its SHA-256. Raises InputError."""
    E = model.config.embed_dim
    before = read_features(path, checkpoint, E) if path and path.exists() else {}
    features = {entry: before[entry] for entry in entries if entry in before}
    todo = [entry for entry in dict.fromkeys(entries) if entry not in before]
    todo, any_good = Images(todo, model.config.image_size), bool(features)
    try:
        for images, encoded in evaluation.batches(todo, batch_size, workers, "encoding", any_good):
            images = images.to(evaluation.device_of(model))
            features.update(zip(encoded, model.encode_image(images).cpu()))
    finally:  # also after Ctrl-C, so that the next search starts from there
        features = {entry: features[entry] for entry in entries if entry in features}
        if path and features and list(features) != list(before):
            columns = zip(COLUMNS, map(np.array, zip(*features)))
            content = dict(columns, features=torch.stack([*features.values()]).numpy())
            write_file(path, lambda f: np.savez(f, checkpoint=checkpoint, **content))
    return features


# -----------------------------------------------------------------------------
# The picture

# Pixels of an image; images in a row; images in all: more would not fit into a .webp.
SIDE, IN_A_ROW, MAX_IMAGES = 180, 7, 420


def card(text):
    """A text in the place of an image: uint8 tensor (3, SIDE, SIDE)."""
    picture, font = Image.new("RGB", (SIDE, SIDE), "white"), load_font(22)
    ImageDraw.Draw(picture).text((0, 0), "\n".join(wrap(text, font, SIDE, lines=6)), "black", font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def draw(blocks, path):
    """Draw a block for each search, on rows of its own, and write the picture to `path`. blocks:
    lists of equal length of (entry or text, caption)."""
    columns = min(IN_A_ROW, len(blocks[0]))
    padding = [("", "")] * (-len(blocks[0]) % columns)
    cells = [cell for block in blocks for cell in block + padding][:MAX_IMAGES]
    images = [cell if isinstance(cell, str) else Images([cell], SIDE)[0][0] for cell, _ in cells]
    images = [card(image) if isinstance(image, str) else image for image in images]
    contact_sheet(images, [caption for _, caption in cells], path, columns)


# -----------------------------------------------------------------------------
# The command


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0], allow_abbrev=False)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="what to look for")
    add("--checkpoint", required=True, help="best.pt or last.pt of a run")
    add("--images", action="append", default=[], help="folder or image; may be repeated")
    add("--data", action="append", default=[], help="tar shards, or a folder; may be repeated")
    add("--like", action="append", default=[], help="image to look for; may be repeated")
    add("--k", type=number(int, 1), default=12, help="images to find for each (default 12)")
    add("--out", type=picture_file, help="picture to draw: .png, .jpg or .webp")
    npz_file = output_file(".npz")
    add("--features", type=npz_file, help=".npz file that keeps the features for the next search")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--workers", type=number(int, 0), help="loading processes (default: one a core)")
    args = parser.parse_intermixed_args(argv)
    complete = (args.texts or args.like) and (args.images or args.data)
    check(complete, "name images (--images) or shards (--data), and a text to look for (or --like)")
    # The shell makes several names of --images *.jpg, and all but the first would become texts.
    wrong = [text for text in args.texts if not text.strip() or os.path.exists(text)]
    check(not wrong, f"texts must not be empty or files (repeat --images for each file): {wrong}")
    like, entries = ([*file_entries(paths, args.out)] for paths in (args.like, args.images))
    # No tokenizer and no size, because the index, keys and captions are all that is needed here.
    pairs = data.Pairs(data.expand(args.data), None, None) if args.data else None
    rows = shard_entries(pairs) if pairs else {}
    entries += rows
    checkpoint = hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest()
    model, tokenizer, _ = evaluation.load(args.checkpoint, pick_device(args.device))
    queries = find_features(model, like, workers=0) if like else {}  # entry or text -> feature
    if args.texts:
        queries |= zip(args.texts, evaluation.encode_texts(model, tokenizer, args.texts).cpu())
    features = find_features(model, entries, args.workers, args.features, checkpoint)
    entries, vectors = zip(*features.items())
    scores = torch.stack([*queries.values()]) @ torch.stack(vectors).T  # (Q, N)
    print(f"{len(entries):,} images; scores are cosine similarities")
    evaluation.print_unknown_words(tokenizer, args.texts, model)
    blocks, here = [], os.getcwd() + os.sep
    for query, row in zip(queries, scores):
        is_text = isinstance(query, str)
        print("\n" + printable(query if is_text else f"like {query.name.removeprefix(here)}"))
        blocks.append([(query, "" if is_text else "like this")])
        # An image would find itself and its copies, which are of no use to anybody.
        row = row if is_text else row.masked_fill(row > 1 - 1e-5, -math.inf)
        best = row.argsort(descending=True, stable=True)[: args.k].tolist()
        for i in best[: int(row.isfinite().sum())]:
            known = known_of(pairs, rows[entries[i]]) if entries[i] in rows else []
            name = "  ".join([entries[i].name.removeprefix(here), *known])
            print(f"{row[i]:8.3f}  {printable(name)}")
            title = (known or [os.path.basename(entries[i].name)])[-1]
            blocks[-1].append((entries[i], f"{row[i]:.3f} {title}"))
    if args.out:
        draw(blocks, args.out)
        print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run_command(main)
