"""Search images by text:

    python -m scripts.search --checkpoint out/best.pt --images photos/ "a red mug" "two dogs"
    python -m scripts.search --checkpoint out/best.pt --data 'shards/*.tar' "a mug"
    python -m scripts.search --checkpoint out/best.pt "a mug"
    python -m scripts.search ... --features photos.npz --serve

The command prints the best images for each text, with their scores. Without --images and --data it
searches the validation pictures of the run. With --serve you search on a page (see
scripts/serve.py).

A score is the cosine similarity of two features. Compare only scores of the same text, because some
texts have higher scores than others with every image.

--features keeps the features of all images in a file. The next search then encodes only images that
are new or have changed. Other programs can read the file by numpy.load. It holds four arrays:

- names (N,): absolute paths of image files, or SHARD:KEY for an image in a shard
- features (N, E): float32, each of length 1
- stamps (N,): when the file or shard was changed, and at which byte of the shard the image begins
- checkpoint: the SHA-256 of the checkpoint, a string

Axes: N images, E embedding, S pixels a side.
"""

import hashlib
import os
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

import data
import eval as evaluation
from common.checkpoint import validation_of
from common.cli import InputError, check, make_parser, number, output_file, run_command
from common.images import image_files
from common.machine import pick_device, write_file
from common.shards import find_shards
from common.tokenizer import unknown_words
from scripts import serve

# -----------------------------------------------------------------------------
# Images

# An image to search. stamp: a string that changes when the image does; sample: its number in the
# shards, or None if it is a file.
Entry = namedtuple("Entry", "name stamp sample")


def find_entries(files, shards):
    """Return the list of all images to search. files: paths; shards: data.Shards, or None."""
    entries = []
    for file in files:
        # Of a broken link take the time of the link. Reading it will say what is wrong.
        changed = os.stat(file, follow_symlinks=os.path.exists(file)).st_mtime_ns
        entries.append(Entry(os.path.abspath(file), str(changed), None))
    if shards is not None:
        for i in range(len(shards)):
            path, offset = shards.place(i)
            # Add the offset, because a tar header cuts long names, so two images may share one.
            entries.append(Entry(shards.name(i), f"{os.stat(path).st_mtime_ns} {offset}", i))
    return entries


class Images(Dataset):
    """The images of a list of entries, for evaluation.batches. An item is (uint8 tensor (3, S, S),
    its number), with None in place of the tensor if the image cannot be read."""

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
    """Return the features in a file of --features, as a dict of (name, stamp) -> feature (E,).
    Raise InputError if another checkpoint than the one with this SHA-256 has made them, because
    features of two models cannot be compared, or if the file holds something else."""
    other = f"{path} belongs to another checkpoint or program: use another file or delete it"
    try:
        with np.load(path) as content:
            checkpoint = content["checkpoint"].item()
            versions = zip(content["names"].tolist(), content["stamps"].tolist())
            features = dict(zip(versions, torch.from_numpy(content["features"])))
    except Exception as error:  # NumPy and zipfile raise many kinds
        raise InputError(other) from error
    check(checkpoint == sha256, other)
    return features


def write_features(path, sha256, features):
    """Write a file for `read_features`, which returns the dict `features`."""
    names, stamps = zip(*features)
    vectors = torch.stack([*features.values()]).numpy()
    content = {"names": names, "stamps": stamps, "features": vectors, "checkpoint": sha256}
    write_file(path, lambda file: np.savez(file, **content))


def find_features(model, images, workers, path, sha256):
    """Return the features of all images that can be read, as a dict of number -> feature (E,).
    Print the names of the others.

    images: Images; path: the file of --features, or None; sha256: the hash of the checkpoint.
    Features that the file has are not computed again. Then the file is written anew, with the
    features of these images only. If the user stops the command, the file has those that are done.
    Raise InputError if no image can be read.
    """
    known = {}
    if path and path.exists():
        known = read_features(path, sha256)
    versions = [(entry.name, entry.stamp) for entry in images.entries]
    missing = [i for i, version in enumerate(versions) if version not in known]
    try:
        for batch, numbers in evaluation.batches(Subset(images, missing), 128, workers, "encoding"):
            features = model.encode_image(batch.to(evaluation.device_of(model))).cpu()
            known.update(zip([versions[i] for i in numbers], features))
    finally:  # Keep what is encoded, even after Ctrl-C.
        found = {i: known[version] for i, version in enumerate(versions) if version in known}
        if path and found:
            write_features(path, sha256, {versions[i]: found[i] for i in found})
    check(found, "none of the images can be read")
    return found


# -----------------------------------------------------------------------------
# Searching


class Search:
    """A model, and the images to search with it. features: what find_features returns; captions:
    sources of captions. An image is shown with the caption from the first source that it has."""

    def __init__(self, model, tokenizer, images, features, captions):
        self.model = model
        self.tokenizer = tokenizer
        self.images = images
        self.numbers = [*features]  # of the images that can be read
        self.features = torch.stack([*features.values()])  # (N, E)
        self.captions = captions

    def by_text(self, text, k):
        """Return the k images that fit a text best, with the highest scores first, as `found`.
        `unknown` is the list of words of the text that the model's vocabulary lacks."""
        [feature] = evaluation.encode_texts(self.model, self.tokenizer, [text]).cpu()
        scores = self.features @ feature  # (N,)
        order = scores.argsort(descending=True, stable=True)[:k].tolist()
        found = [{"score": scores[i].item(), **self.about(self.numbers[i])} for i in order]
        unknown = unknown_words(self.tokenizer, [text])
        return {"text": text, "unknown": unknown, "found": found}

    def first(self, k):
        """Return the number of images as `count`, and the first k, without scores, as `found`."""
        return {"count": len(self.numbers), "found": [self.about(i) for i in self.numbers[:k]]}

    def about(self, number):
        """Return a dict about an image: its number, its name, and its caption, "" for none."""
        name, _, sample = self.images.entries[number]
        caption = ""
        if sample is not None:
            for source in reversed(self.captions):
                with suppress(data.BadSample):
                    caption = self.images.shards.texts(sample, source)[0]
        name = name.removeprefix(os.getcwd() + os.sep)
        return {"number": number, "name": name, "caption": caption}

    def image(self, number, size):
        """Return an image as a uint8 tensor (3, size, size), or None if it cannot be read."""
        return Images(self.images.entries, self.images.shards, size)[number][0]


def main(argv):
    parser = make_parser(__doc__, "checkpoint", "device")
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="texts to look for")
    add("--images", action="append", default=[], help="image, or folder of images; may be repeated")
    add("--data", action="append", default=[], help="tar shards, or their folder; may be repeated")
    add("--k", type=number(int, 1), default=12, help="images to find for each text (default 12)")
    add("--features", type=output_file(".npz"), help="file that keeps features for later searches")
    add("--workers", type=number(int, 0), help="loading processes (default: the cores, at most 16)")
    add("--serve", action="store_true", help="serve a page to search with, on this machine alone")
    add("--port", type=number(int, 0, 65535), default=8000, help="its port; 0: any (default 8000)")
    args = parser.parse_intermixed_args(argv)
    check(args.texts or args.serve, "there is no text to look for: add one, or use --serve")
    for text in args.texts:  # --images photos/*.jpg, say, takes one file
        check(not os.path.isfile(text), f"{text} is a file. Name its folder, or repeat its option")
    # Take the port first, because encoding may take an hour, and the port may be in use.
    server = serve.make_server(args.port) if args.serve else None
    files = image_files(args.images)
    shards = None
    captions = []
    if args.data or not args.images:
        paths, captions = validation_of(args.checkpoint, args.data, "--images or --data")
        shards = data.Shards(find_shards(paths), sources=())  # Captions may be missing.

    model, tokenizer, _ = evaluation.load(args.checkpoint, pick_device(args.device))
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
