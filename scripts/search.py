"""Search images by text:

    python -m scripts.search --checkpoint out/best.pt --images photos/ "a red mug" "two dogs"
    python -m scripts.search --checkpoint out/best.pt --data 'shards/*.tar' "a mug"
    python -m scripts.search --checkpoint out/best.pt "a mug"
    python -m scripts.search ... --features photos.npz --serve

The first command prints the best images for each text with their scores. --serve opens a page to
search with, by text or by one of the images: see scripts/serve.py. Without --images and --data, the
validation pictures of the run are searched. A score is the cosine similarity of two features.
Compare only scores of the same text, because some texts score higher than others everywhere.

--features keeps the features of the images searched, so that the next search of the same folders
encodes only those that are new or have changed. Other programs can read the file by numpy.load: its
names (N,) are absolute paths, or SHARD:KEY, and its features (N, E) are float32, of length 1. Its
stamps (N,) say when a file or shard was changed, and at which byte of the shard the image lies.
checkpoint is the SHA-256 of the checkpoint.

Axes: N images, E embedding, S pixels a side.
"""

import hashlib
import math
import os
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

import data
import eval as evaluation
from checkpoint import load, validation_of
from cli import (
    InputError,
    check,
    make_parser,
    number,
    output_file,
    pick_device,
    run_command,
    write_file,
)
from scripts import serve
from scripts.pictures import image_files
from tokenizer import unknown_words

# -----------------------------------------------------------------------------
# Images

# An image to search. stamp: a string that tells versions of an image apart; sample: its number in
# the shards, or None if it is a file.
Entry = namedtuple("Entry", "name stamp sample")


def find_entries(files, shards):
    """Image files, and data.Shards or None -> list of entries, with or without captions."""
    entries = [Entry(os.path.abspath(x), str(os.stat(x).st_mtime_ns), None) for x in files]
    if shards is not None:
        for i in range(len(shards)):
            path, offset = shards.place(i)
            # A tar header cuts long names, so two images of a shard may have the same name.
            entries.append(Entry(shards.name(i), f"{os.stat(path).st_mtime_ns} {offset}", i))
    return entries


class Images(Dataset):
    """The images of entries, for evaluation.batches: (uint8 tensor (3, S, S) or None, number)."""

    def __init__(self, entries, shards, size):
        self.entries = entries
        self.shards = shards
        self.size = size

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        name, _, sample = self.entries[i]
        if sample is None:
            return evaluation.read_image(name, self.size), i
        try:
            return self.shards.image(sample, self.size), i
        except evaluation.UNREADABLE as error:
            return evaluation.skip(name, error), i


# -----------------------------------------------------------------------------
# Features, and the file that keeps them


def read_features(path, sha256):
    """The file of --features -> dict {(name, stamp): feature (E,)}. Raises InputError unless the
    checkpoint with this SHA-256 has made it, because features of two models do not compare."""
    try:
        with np.load(path) as content:
            made_by = content["checkpoint"].item()
            versions = zip(content["names"].tolist(), content["stamps"].tolist())
            features = dict(zip(versions, torch.from_numpy(content["features"])))
    except Exception as error:  # NumPy and zipfile raise a dozen kinds
        raise InputError(f"{path} is damaged, or no file of --features: name another") from error
    check(made_by == sha256, f"{path} is of another checkpoint: name another file or delete it")
    return features


def find_features(model, images, workers, path, sha256):
    """Images -> dict {number: feature (E,)} of all that can be read; the others are named. What the
    file `path` has comes from there, and all are kept there, unless it is None; sha256: that of the
    checkpoint. Raises InputError."""
    known = {}
    if path and path.exists():
        known = read_features(path, sha256)
    versions = [(entry.name, entry.stamp) for entry in images.entries]
    missing = [i for i, version in enumerate(versions) if version not in known]
    for batch, numbers in evaluation.batches(Subset(images, missing), 128, workers, "encoding"):
        features = model.encode_image(batch.to(evaluation.device_of(model))).cpu()
        known.update(zip([versions[i] for i in numbers], features))
    found = {i: known[version] for i, version in enumerate(versions) if version in known}
    check(found, "none of the images can be read")
    if path:
        content = {
            "names": [versions[i][0] for i in found],
            "stamps": [versions[i][1] for i in found],
            "features": torch.stack([*found.values()]).numpy(),
            "checkpoint": sha256,
        }
        write_file(path, lambda file: np.savez(file, **content))
    return found


# -----------------------------------------------------------------------------
# Searching


class Search:
    """A model, and the images to search with it. features: what find_features returns; captions:
    sources, of which the first that an image has is shown. The result of a search is a dict: the
    text, or the name of the image that others are like, and what was found, a list of dicts."""

    def __init__(self, model, tokenizer, images, features, captions):
        self.model = model
        self.tokenizer = tokenizer
        self.images = images
        self.numbers = [*features]  # of the images that can be read
        self.features = torch.stack([*features.values()])  # (N, E)
        self.captions = captions

    def by_text(self, text, k):
        """The k images that fit a text best, and the words of the text that the model lacks."""
        [feature] = evaluation.encode_texts(self.model, self.tokenizer, [text]).cpu()
        unknown = unknown_words(self.tokenizer, [text])
        return {"text": text, "unknown": unknown, "found": self.best(self.features @ feature, k)}

    def by_image(self, number, k):
        """The k images that are most like one of them."""
        scores = self.features @ self.features[self.numbers.index(number)]
        # An image would find itself and its copies, which are of no use to anybody.
        scores = scores.masked_fill(scores > 1 - 1e-5, -math.inf)
        return {"like": self.about(number)["name"], "found": self.best(scores, k)}

    def first(self, k):
        """The number of all images, and the first k of them, which have no score."""
        return {"count": len(self.numbers), "found": [self.about(i) for i in self.numbers[:k]]}

    def best(self, scores, k):
        order = scores.argsort(descending=True, stable=True)[:k].tolist()
        order = [i for i in order if scores[i] > -math.inf]
        return [{"score": scores[i].item(), **self.about(self.numbers[i])} for i in order]

    def about(self, number):
        """What is known of an image: its name, and its caption, or "" if it has none."""
        name, _, sample = self.images.entries[number]
        caption = ""
        if sample is not None:
            for source in reversed(self.captions):
                with suppress(data.BadSample):
                    caption = self.images.shards.texts(sample, source)[0]
        name = name.removeprefix(os.getcwd() + os.sep)
        return {"number": number, "name": name, "caption": caption}

    def image(self, number, size):
        """An image as a uint8 tensor (3, size, size), or None."""
        return Images(self.images.entries, self.images.shards, size)[number][0]


# -----------------------------------------------------------------------------
# The command


def main(argv):
    parser = make_parser(__doc__, "checkpoint", "device")
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="what to look for")
    add("--images", action="append", default=[], help="folder or image; may be repeated")
    add("--data", action="append", default=[], help="tar shards, or a folder; may be repeated")
    add("--k", type=number(int, 1), default=12, help="images to find for each (default 12)")
    add("--features", type=output_file(".npz"), help="file that keeps features for later searches")
    add("--workers", type=number(int, 0), help="loading processes (default: the cores, at most 16)")
    add("--serve", action="store_true", help="serve a page to search with, to this machine alone")
    add("--port", type=number(int, 0, 65535), default=8000, help="its port (default 8000; 0: any)")
    args = parser.parse_intermixed_args(argv)
    check(args.texts or args.serve, "name a text to look for, or open a page (--serve)")
    # first, because encoding may take an hour
    server = serve.make_server(args.port) if args.serve else None
    files = image_files(args.images)
    shards = None
    captions = []
    if args.data or not args.images:
        paths, captions = validation_of(args.checkpoint, args.data, "--images or --data")
        shards = data.Shards(data.expand(paths), sources=())  # a caption may be missing

    model, tokenizer, _ = load(args.checkpoint, pick_device(args.device))
    sha256 = hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest()
    images = Images(find_entries(files, shards), shards, model.config.image_size)
    features = find_features(model, images, args.workers, args.features, sha256)
    print(f"{len(features):,} images; scores are cosine similarities")
    search = Search(model, tokenizer, images, features, [*captions, "txt"])
    for text in args.texts:
        result = search.by_text(text, args.k)
        print("\n" + result["text"])
        if result["unknown"]:
            print("not in the vocabulary:", ", ".join(result["unknown"]))
        for found in result["found"]:
            print(f"{found['score']:8.3f}  {found['name']}  {found['caption']}".rstrip())
    if args.serve:
        serve.run(server, search, args.k)


if __name__ == "__main__":
    run_command(main)
