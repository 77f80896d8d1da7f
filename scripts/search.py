"""Search images by text, or by another image:

    python -m scripts.search --checkpoint out/best.pt --images photos/ "a red mug" "two dogs"
    python -m scripts.search --checkpoint out/best.pt --images photos/ --like photos/1.jpg --k 30
    python -m scripts.search --checkpoint out/best.pt --data 'shards/*.tar' "a mug" --out found.png
    python -m scripts.search ... --features photos.npz

The first command prints the best images for each text, with their scores. --out draws them as well.
A score is the cosine similarity of two features. Compare scores of one text only.

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
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import eval as evaluation
from scripts.pictures import contact_sheet, picture_format, wrap
from scripts.words import image_files
from superclip import InputError, check, cli, number

# -----------------------------------------------------------------------------
# Where images are

# An entry says where an image is, and tells its versions apart: (file, name, offset, size, mtime).
# Offset and size are in bytes, mtime in ns. Images with equal entries are the same, encoded once.
ENTRY = ("files", "names", "offsets", "sizes", "mtimes")


def file_entry(path):
    """An image file -> its entry. A link to nowhere gets one, too: it is named when it is read."""
    name = os.path.abspath(path)
    stat = os.stat(name) if os.path.exists(name) else os.lstat(name)
    return name, name, 0, stat.st_size, stat.st_mtime_ns


def shard_entries(shards):
    """list of shards -> entries of all their images, with or without captions. Raises
    InputError."""
    pairs = data.Pairs(shards, tokenizer=None, image_size=None)  # for its index and keys alone
    print(f"parts of shards not used: {len(pairs.unused):,} (python -m scripts.show says why)")
    files = [(os.path.abspath(shard), os.stat(shard).st_mtime_ns) for shard in pairs.shards]
    for row in pairs.index.tolist():
        file, mtime = files[row[0]]
        offset, size = row[data.IMAGE] * data.BLOCK, row[data.IMAGE + 1]
        yield file, f"{file}:{pairs.key(row)}", offset, size, mtime


def read(entry, side):
    """An entry -> uint8 tensor (3, S, S), or the reason why not, as a string."""
    file, name, offset, size, _ = entry
    try:
        return data.load_image(np.fromfile(file, np.uint8, size, "", offset).tobytes(), side)
    except (data.BadSample, OSError) as error:
        return f"{name}: {error}"


def load_batch(entries, side):
    """entries -> (images (B, 3, S, S), or None; list of their B entries; reasons of the others)."""
    return evaluation.collate([(read(entry, side), entry) for entry in entries])


# -----------------------------------------------------------------------------
# Features, and the file that keeps them


def read_features(path, checkpoint):
    """The file of --features -> dict {entry: feature (E,)}. Raises InputError if another checkpoint
    than the one with this SHA-256 made it."""
    try:
        with np.load(path, allow_pickle=False) as content:
            entries = list(zip(*(content[name].tolist() for name in ENTRY), strict=True))
            features = dict(zip(entries, torch.from_numpy(content["features"]), strict=True))
            made_by = content["checkpoint"].item()
    except Exception:  # NumPy and zipfile raise a dozen kinds
        raise InputError(f"{path} is damaged, or no file of this command: name another") from None
    check(made_by == checkpoint, f"{path} is of another checkpoint: name another file or delete it")
    return features


def find_features(model, entries, workers, path=None, checkpoint="", batch_size=128):
    """list of entries -> dict {entry: feature (E,)} of all images that can be read. The others are
    named. With a path, known features come from that file, and all are kept there; checkpoint is
    its SHA-256. Raises InputError."""
    before = read_features(path, checkpoint) if path and os.path.lexists(path) else {}
    features, reasons = dict(before), []
    todo = [entry for entry in dict.fromkeys(entries) if entry not in before]
    collate = partial(load_batch, side=model.config.image_size)
    loader = data.make_loader(todo, workers, batch_size=batch_size, collate_fn=collate)
    total = math.ceil(len(todo) / batch_size)
    try:
        for images, done, reasons in data.progress(loader, "encoding", total, unit="batch"):
            for reason in reasons:
                tqdm.write(f"skipped {reason}")
            if done:
                images = images.to(evaluation.device_of(model))
                features.update(zip(done, model.encode_image(images).cpu()))
    finally:  # after Ctrl-C, too: the next search goes on from there
        features = {entry: features[entry] for entry in entries if entry in features}
        if path and features and list(features) != list(before):
            content = dict(zip(ENTRY, map(np.array, zip(*features))), checkpoint=checkpoint)
            content["features"] = torch.stack([*features.values()]).numpy()
            data.write_file(path, lambda file: np.savez(file, **content))
    check(features, "none of the images can be read: " + "".join(reasons[-1:]))
    return features


# -----------------------------------------------------------------------------
# The picture

# Pixels of an image; images in a row; images in all: more would not fit into a .webp.
SIDE, COLUMNS, MAX_IMAGES = 180, 7, 420


def card(text):
    """A text in the place of an image: uint8 tensor (3, SIDE, SIDE)."""
    picture, font = Image.new("RGB", (SIDE, SIDE), "white"), ImageFont.load_default(22)
    ImageDraw.Draw(picture).text((0, 0), "\n".join(wrap(text, font, SIDE, 6)), "black", font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def draw(blocks, path):
    """Draw a block for each search, on rows of its own, and write the picture to `path`. blocks:
    lists of equal length of (entry or text, caption)."""
    columns = min(COLUMNS, len(blocks[0]))
    padding = [("", "")] * (-len(blocks[0]) % columns)
    sources, captions = zip(*sum((block + padding for block in blocks), [])[:MAX_IMAGES])
    images = [source if isinstance(source, str) else read(source, SIDE) for source in sources]
    images = [card(image) if isinstance(image, str) else image for image in images]
    contact_sheet(images, captions, path, columns)


# -----------------------------------------------------------------------------
# The command


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0], allow_abbrev=False)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="what to look for")
    add("--checkpoint", required=True, help="best.pt or last.pt of a run")
    add("--images", action="append", default=[], help="folder or image; may be repeated")
    add("--data", action="append", default=[], help="tar shards, or a folder; may be repeated")
    add("--like", help="image to look for")
    add("--k", type=number(int, 1), default=12, help="images to find for each (default 12)")
    add("--out", help="picture to draw: .png, .jpg or .webp")
    add("--features", help="file ending in .npz that keeps them, of this checkpoint")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--workers", type=number(int, 0), help="loading processes (default: one a core)")
    args = parser.parse_intermixed_args(argv)
    fine = (args.texts or args.like) and (args.images or args.data)
    check(fine, "name images (--images) or shards (--data), and a text to look for (or --like)")
    # The shell makes several names of --images *.jpg, and all but the first would become texts.
    wrong = [text for text in args.texts if not text.strip() or os.path.exists(text)]
    check(not wrong, f"texts must not be empty or files (repeat --images for each file): {wrong}")
    npz = Path(args.features or "none.npz")
    fine = npz.suffix == ".npz" and npz.parent.is_dir()
    check(fine, "--features needs a name that ends in .npz, in a folder that exists")
    like = [file_entry(args.like)] if args.like else []
    entries = [file_entry(path) for path in image_files(args.images)]
    entries += shard_entries(data.expand(args.data)) if args.data else []
    if args.out:
        picture_format(args.out)
        files = {os.path.realpath(file) for file, *_ in like + entries}
        check(os.path.realpath(args.out) not in files, f"--out is one of the images: {args.out}")
    checkpoint = hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest()
    model, tokenizer, _ = evaluation.load(args.checkpoint, evaluation.pick_device(args.device))
    searches = [*find_features(model, like, workers=0).values()] if like else []
    searches += evaluation.encode_texts(model, tokenizer, args.texts).cpu() if args.texts else []
    features = find_features(model, entries, args.workers, args.features, checkpoint)
    entries, vectors = zip(*features.items())
    scores = torch.stack(searches) @ torch.stack(vectors).T  # (Q, N)
    print(f"{len(entries):,} images; scores are cosine similarities")
    blocks = []
    for search, row in zip(like + args.texts, scores):
        blocks.append([(search, "" if isinstance(search, str) else "like this")])
        print(f"\n{search if isinstance(search, str) else 'like ' + args.like}")
        for i in row.argsort(descending=True, stable=True)[: args.k].tolist():
            print(f"{row[i]:8.3f}  {entries[i][1].removeprefix(os.getcwd() + os.sep)}")
            blocks[-1].append((entries[i], f"{row[i]:.3f} {os.path.basename(entries[i][1])}"))
    if args.out:
        draw(blocks, args.out)
        print(f"\nwrote {args.out}")


if __name__ == "__main__":
    cli(main)
