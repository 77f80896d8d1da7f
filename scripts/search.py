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
encodes only those that are new or have changed. Other programs, such as a notebook or FAISS, can
read the file:

    photos = numpy.load("photos.npz")
    photos["names"]     # (N,) absolute paths; SHARD:KEY for images in shards
    photos["features"]  # (N, E) float32, of length 1

The other arrays tell versions apart: stamps (N,) are texts that change when an image does, and
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
from torch.utils.data import Dataset

import data
import eval as evaluation
from cli import (
    InputError,
    check,
    make_parser,
    number,
    output_file,
    pick_device,
    run_command,
    write_file,
    write_json,
)
from scripts import serve
from scripts.pictures import image_files
from tokenizer import unknown_words

# -----------------------------------------------------------------------------
# Where images are

# An image to search. stamp: a text that changes when the image does; sample: its number in the
# shards, or None if it is a file.
Entry = namedtuple("Entry", "name stamp sample")


def stamp_of(path):
    """When a file was changed, in ns, and its size, as a text."""
    status = os.stat(path)
    return f"{status.st_mtime_ns} {status.st_size}"


def file_entries(paths):
    """Image files and folders -> list of their entries."""
    return [Entry(os.path.abspath(x), stamp_of(x), None) for x in image_files(paths)]


def shard_entries(shards):
    """data.Shards -> list of the entries of all their images, with or without captions."""
    stamps = {path: stamp_of(path) for path in shards.paths}
    entries = []
    for i in range(len(shards)):
        # With the place of the image, because a tar header may shorten two names to one.
        path, offset = shards.place(i)
        entries.append(Entry(shards.name(i), f"{stamps[path]} {offset}", i))
    return entries


class Images(Dataset):
    """The images of entries, for evaluation.batches: (uint8 tensor (3, S, S) or None, entry)."""

    def __init__(self, entries, shards, size):
        self.entries = entries
        self.shards = shards
        self.size = size

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        entry = self.entries[i]
        if entry.sample is None:
            return evaluation.read_image(entry.name, self.size), entry
        try:
            return self.shards.image(entry.sample, self.size), entry
        except evaluation.UNREADABLE as error:
            return evaluation.skip(entry.name, error), entry


def first_text(shards, i, sources):
    """The first text that a sample has in the first of the sources that it has, or ""."""
    for source in sources:
        with suppress(data.BadSample):
            return shards.texts(i, source)[0]
    return ""


def short_name(path):
    """A path without the current folder."""
    return path.removeprefix(os.getcwd() + os.sep)


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


def find_features(model, entries, shards, workers, path, sha256):
    """list of entries -> dict {entry: feature (E,)} of all images that can be read; the others are
    named. Features that are in the file `path` come from there, and all are kept there, unless it
    is None; sha256: that of the checkpoint. Raises InputError."""
    known = {}
    if path and path.exists():
        known = read_features(path, sha256)
    found = {e: known[e.name, e.stamp] for e in entries if (e.name, e.stamp) in known}
    missing = [entry for entry in entries if entry not in found]
    images = Images(missing, shards, model.config.image_size)
    for batch, encoded in evaluation.batches(images, 128, workers, "encoding"):
        features = model.encode_image(batch.to(evaluation.device_of(model))).cpu()
        found.update(zip(encoded, features))
    found = {entry: found[entry] for entry in entries if entry in found}  # in their order
    if path and found:
        content = {
            "names": [entry.name for entry in found],
            "stamps": [entry.stamp for entry in found],
            "features": torch.stack([*found.values()]).numpy(),
            "checkpoint": sha256,
        }
        write_file(path, lambda file: np.savez(file, **content))
    return found


# -----------------------------------------------------------------------------
# Searching


class Search:
    """A model, and the images to search with it. An image's number is its place in `entries`.

    features: dict {entry: feature (E,)}; shards: data.Shards, or None; captions: sources, of which
    the first that an image has is shown. The result of a search is a dict: the text, or the name of
    the image that others are like, and what was found, a list of dicts.
    """

    def __init__(self, model, tokenizer, features, shards, captions):
        self.model = model
        self.tokenizer = tokenizer
        self.entries = list(features)
        start = os.path.commonprefix([short_name(entry.name) for entry in self.entries])
        self.folder = start[: start.rfind(os.sep) + 1]  # that holds all of them
        self.features = torch.stack([*features.values()])  # (N, E)
        self.shards = shards
        self.captions = captions

    def by_text(self, text, k):
        """The k images that fit a text best, and the words of the text that the model lacks."""
        [feature] = evaluation.encode_texts(self.model, self.tokenizer, [text]).cpu()
        unknown = unknown_words(self.tokenizer, [text])
        return {"text": text, "unknown": unknown, "found": self.best(self.features @ feature, k)}

    def by_image(self, i, k):
        """The k images that are most like image i."""
        scores = self.features @ self.features[i]
        # An image would find itself and its copies, which are of no use to anybody.
        scores = scores.masked_fill(scores > 1 - 1e-5, -math.inf)
        return {"like": short_name(self.entries[i].name), "found": self.best(scores, k)}

    def best(self, scores, k):
        order = scores.argsort(descending=True, stable=True)[:k].tolist()
        return [self.about(i, scores[i].item()) for i in order if scores[i] > -math.inf]

    def about(self, i, score):
        """What is known of image i, or "": its file, if scripts/pack.py made the sample, and its
        caption, if it is in a shard."""
        entry = self.entries[i]
        found = {"number": i, "score": score, "name": short_name(entry.name)}
        found |= {"file": "", "caption": ""}
        if entry.sample is not None:
            found["file"] = first_text(self.shards, entry.sample, ["json.image"])
            found["caption"] = first_text(self.shards, entry.sample, self.captions)
        return found

    def image(self, i, size):
        """Image i as a uint8 tensor (3, size, size), or None."""
        return Images(self.entries, self.shards, size)[i][0]


def print_result(result):
    print("\n" + result["text"])
    if result["unknown"]:
        print("not in the vocabulary:", ", ".join(result["unknown"]))
    for found in result["found"]:
        line = "  ".join(filter(None, (found["name"], found["file"], found["caption"])))
        print(f"{found['score']:8.3f}  {line}")


# -----------------------------------------------------------------------------
# The command


def read_options(argv):
    parser = make_parser(__doc__, "checkpoint", "device")
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="what to look for")
    add("--images", action="append", default=[], help="folder or image; may be repeated")
    add("--data", action="append", default=[], help="tar shards, or a folder; may be repeated")
    add("--k", type=number(int, 1), default=12, help="images to find for each (default 12)")
    add("--json", type=output_file(".json"), help="file to write the results to")
    add("--features", type=output_file(".npz"), help="file that keeps features for later searches")
    add("--workers", type=number(int, 0), help="loading processes (default: the cores, at most 16)")
    add("--serve", action="store_true", help="serve a page to search with, to this machine alone")
    add("--port", type=number(int, 0, 65535), default=8000, help="its port (default 8000; 0: any)")
    args = parser.parse_intermixed_args(argv)
    for text in args.texts:  # of a pattern without quotes all files but one become texts
        check(not os.path.isfile(text), f"{text} is a file: put a pattern in quotes")
    check(args.texts or args.serve, "name a text to look for, or open a page (--serve)")
    return args


def main(argv):
    args = read_options(argv)
    server = None
    if args.serve:
        server = serve.open_server(args.port)  # now, so that no work is lost if another has it
    entries = file_entries(args.images)
    shards = None
    captions = []
    if args.data or not args.images:
        options = "--images or --data"
        paths, captions = evaluation.validation_of(args.checkpoint, args.data, options)
        shards = data.Shards(data.expand(paths), sources=())  # a caption may be missing
        entries += shard_entries(shards)

    model, tokenizer, _ = evaluation.load(args.checkpoint, pick_device(args.device))
    sha256 = hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest()
    features = find_features(model, entries, shards, args.workers, args.features, sha256)
    check(features, "none of the images can be read")
    search = Search(model, tokenizer, features, shards, [*captions, "txt"])

    kind = "images" if args.images or args.data else "validation images"
    print(f"{len(features):,} {kind}; scores are cosine similarities")
    results = [search.by_text(text, args.k) for text in args.texts]
    for result in results:
        print_result(result)
    write_json(args.json, results)
    if server:
        serve.run(server, search, args.k)


if __name__ == "__main__":
    run_command(main)
