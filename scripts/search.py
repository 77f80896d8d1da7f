"""Search images by text:

    python -m scripts.search --checkpoint out/best.pt --images photos/ "a red mug" "two dogs"
    python -m scripts.search --checkpoint out/best.pt --data 'shards/*.tar' "a mug"
    python -m scripts.search --checkpoint out/best.pt "a mug"
    python -m scripts.search ... --features photos.npz --serve

The command prints the best images for each text. A score is the cosine similarity of two features.
Compare only scores of the same text, because some texts have higher scores with every image than
others. Without --images and --data the command searches the validation pictures of the run. With
--serve you search on a page.

--features keeps the features of the images in a file. The next search encodes only images that are
new or have changed. If there are any, it writes the file again, with its own images alone. So give
each set of images its own file. Other programs can read the arrays by numpy.load: `names` (N,), and
`features` (N, E), float32, each of length 1.
"""

import hashlib
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

import data
import eval as evaluation
from common.checkpoint import validation_of
from common.cli import check, make_parser, number, output_file, run_command
from common.index import find_shards
from common.machine import pick_device, write_file
from common.tokenizer import unknown_words
from scripts import serve
from scripts.pictures import image_files


class Images(Dataset):
    """The images to search. An item is (uint8 tensor (3, S, S), its number), with None in place of
    the tensor if the image cannot be read.

    files: list of paths; samples: data.Samples, or None; size: S, pixels a side; captions: sources
    of captions. An image is shown with the caption from the first source that it has.
    """

    def __init__(self, files, samples, size, captions):
        self.items = [*files, *range(len(samples or ()))]  # paths, and numbers of samples
        self.samples = samples
        self.size = size
        self.captions = captions

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        if isinstance(item, Path):
            return evaluation.read_image(item, self.size), i
        try:
            return self.samples.image(item, self.size), i
        except evaluation.UNREADABLE as error:
            tqdm.write(f"skipped {self.samples.name(item)}: {error}")
            return None, i

    def stamp(self, i):
        """Return a text that tells image i from all others, and changes when the image does."""
        item = self.items[i]
        path, first = (item, 0) if isinstance(item, Path) else self.samples.place(item)
        # Of a broken link take the link itself. Reading it will say what is wrong.
        stat = os.stat(path, follow_symlinks=os.path.exists(path))
        # An archive may set the time of modification, but nobody sets the one of the last change.
        times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"
        return f"{os.path.abspath(path)} {first} {stat.st_size} {times}"

    def name(self, i):
        item = self.items[i]
        return str(item) if isinstance(item, Path) else self.samples.name(item)

    def caption(self, i):
        """Return the caption of image i, "" if it has none."""
        item = self.items[i]
        if not isinstance(item, Path):
            for source in self.captions:
                with suppress(data.BadSample, OSError):
                    return self.samples.texts(item, source)[0]
        return ""


def read_features(path, checkpoint):
    """Return the features in a file, a dict {stamp of an image: feature (E,)}. Raise InputError if
    the file is not from the checkpoint with this hash, whose features alone can be compared."""
    try:
        with np.load(path) as content:
            is_ours = content["checkpoint"] == checkpoint
            features = dict(zip(content["stamps"].tolist(), torch.from_numpy(content["features"])))
    except Exception:  # NumPy and zipfile raise many kinds
        is_ours = False
    check(is_ours, f"{path} is not from this checkpoint. Name another file, or delete it.")
    return features


def find_features(model, images, workers, path, checkpoint):
    """Return the features (N, E) of all images that can be read, and the list of their N numbers.

    path: the file that keeps them, or None; checkpoint: the hash of the checkpoint. Images that the
    file has are not encoded again. Raise InputError if no image can be read.
    """
    known = {}
    if path is not None and path.exists():
        known = read_features(path, checkpoint)
    stamps = [images.stamp(i) for i in range(len(images))]
    missing = Subset(images, [i for i, stamp in enumerate(stamps) if stamp not in known])
    device = evaluation.device_of(model)
    try:
        for pixels, numbers in evaluation.batches(missing, 128, workers, "encoding"):
            features = model.encode_image(pixels.to(device)).cpu()
            known.update(zip([stamps[i] for i in numbers], features))
    finally:  # after Ctrl-C, keep those that are done
        numbers = [i for i, stamp in enumerate(stamps) if stamp in known]
        if numbers:
            features = torch.stack([known[stamps[i]] for i in numbers])  # (N, E)
            if path is not None and len(missing) > 0:
                content = {"checkpoint": checkpoint, "stamps": [stamps[i] for i in numbers]}
                content["names"] = [images.name(i) for i in numbers]
                content["features"] = features.numpy()
                write_file(path, lambda file: np.savez(file, **content))
    check(numbers, "none of the images can be read")
    return features, numbers


def find(text, k, model, tokenizer, images, features, numbers):
    """Return a dict. `found` has the k images that fit a text best, with the highest scores first.
    `unknown` has the words of the text that the vocabulary lacks."""
    [feature] = evaluation.encode_texts(model, tokenizer, [text]).cpu()
    scores = features @ feature  # (N,)
    found = []
    for i in scores.argsort(descending=True, stable=True)[:k].tolist():
        number = numbers[i]
        facts = {"number": number, "name": images.name(number), "caption": images.caption(number)}
        found.append({"score": scores[i].item(), **facts})
    return {"text": text, "unknown": unknown_words(tokenizer, [text]), "found": found}


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
    args = parser.parse_intermixed_args(argv)
    check(args.texts or args.serve, "there is no text to look for: add one, or use --serve")
    for text in args.texts:  # --images photos/*.jpg, say, takes one file
        check(not os.path.isfile(text), f"{text} is a file. Name its folder, or repeat its option")
    files = image_files(args.images)
    samples = None
    captions = []
    if args.data or not args.images:
        paths, captions = validation_of(args.checkpoint, args.data, "--images or --data")
        samples = data.Samples(find_shards(paths), sources=())  # captions may be missing

    model, tokenizer, _ = evaluation.load(args.checkpoint, pick_device(args.device))
    images = Images(files, samples, model.config.image_size, [*captions, "txt"])
    sha256 = hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest()
    features, numbers = find_features(model, images, args.workers, args.features, sha256)
    print(f"{len(features):,} images; scores are cosine similarities")
    facts = dict(model=model, tokenizer=tokenizer, images=images)
    search = partial(find, k=args.k, features=features, numbers=numbers, **facts)
    for text in args.texts:
        result = search(text)
        print("\n" + result["text"])
        if result["unknown"]:
            print("not in the vocabulary:", ", ".join(result["unknown"]))
        for found in result["found"]:
            print(f"{found['score']:8.3f}  {found['name']}  {found['caption']}".rstrip())
    if args.serve:
        serve.run(search, images)


if __name__ == "__main__":
    run_command(main)
