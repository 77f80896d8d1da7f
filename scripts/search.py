"""Search pictures by text:

    python -m scripts.search --checkpoint out/best.pt "a red star"
    python -m scripts.search --checkpoint clip.pt --images photos/ "a red mug" --out found.png
    python -m scripts.search --checkpoint clip.pt --images photos/ --features photos.npz "two dogs"

The command prints the best pictures for each text, and --out draws them. A score is the cosine
similarity of two features. Compare only scores of the same text, because some texts have higher
scores with every picture than others. Without --images the command searches the validation pictures
of the run.

--features keeps the features of the pictures in a file. The next search encodes only files that are
new or have changed. If there are any, it writes the file again, without pictures that have been
changed or deleted. Other programs can read the arrays by numpy.load: `names` (N,), which are whole
paths, and `features` (N, E), float32, each of length 1.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

import eval as evaluation
from common.cli import check, make_parser, number, output_file, run_command, write_file
from common.devices import pick_device
from common.images import readable_batches
from scripts.pictures import SIDE, NumberedPictures, contact_sheet, find_pictures


def encode(model, pictures, workers):
    """Encode pictures. Yield (number, feature (E,)) for each one that can be read."""
    device = evaluation.device_of(model)
    for pixels, numbers in readable_batches(pictures, 128, workers):
        yield from zip(numbers, model.encode_image(pixels.to(device)).cpu())


# -----------------------------------------------------------------------------
# The file of features


def stamp_of(name):
    """Return a text that changes when a file does. It is empty if there is no such file."""
    if not os.path.exists(name):
        return ""
    stat = os.stat(name)
    return f"{stat.st_size} {stat.st_mtime_ns}"


def read_features(path, checkpoint):
    """Return what a file of features holds, a dict {path of an image: feature (E,)}, without images
    that have been changed or deleted. checkpoint: a hash, because the features of two checkpoints
    cannot be compared."""
    content = {}
    with suppress(Exception):  # the file is damaged, for which NumPy has many kinds
        content = dict(np.load(path))
    is_ours = content.get("checkpoint") == checkpoint
    check(is_ours, f"{path} is not from this checkpoint, or damaged. Delete it, or name another.")
    names = content["names"].tolist()
    rows = zip(names, content["stamps"].tolist(), torch.from_numpy(content["features"]))
    return {name: feature for name, stamp, feature in rows if stamp == stamp_of(name)}


def encode_or_read(model, pictures, workers, path, checkpoint):
    """Return the features of image files, as a dict {number: feature (E,)}. Encode those that the
    file of features at `path` lacks, and write it again if there are any."""
    sha256 = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
    known = read_features(path, sha256) if path.exists() else {}
    num_known = len(known)
    names = [str(file.resolve()) for file, _ in pictures.labelled]
    stamps = {name: stamp_of(name) for name in [*known, *names]}
    missing = [i for i, name in enumerate(names) if name not in known]
    try:
        for i, feature in encode(model, Subset(pictures, missing), workers):
            known[names[i]] = feature
    finally:  # after Ctrl-C, keep those that are done
        if len(known) > num_known:
            content = {
                "checkpoint": sha256,
                "names": [*known],
                "stamps": [stamps[name] for name in known],
                "features": torch.stack([*known.values()]).numpy(),
            }
            write_file(path, lambda file: np.savez(file, **content))
    return {i: known[name] for i, name in enumerate(names) if name in known}


def main(argv):
    parser = make_parser(__doc__, "checkpoint", "device", "workers")
    add = parser.add_argument
    add("texts", nargs="+", metavar="TEXT", help="texts to look for")
    add("--images", type=Path, help="image, or folder of images (default: validation pictures)")
    add("--k", type=number(int, 1), default=12, help="pictures for each text (default: 12)")
    add("--features", type=output_file(".npz"), help="file that keeps the features of --images")
    add("--out", type=output_file(".png"), help="picture to draw of what is found")
    args = parser.parse_intermixed_args(argv)
    check(args.images or not args.features, "--features needs --images")
    for text in args.texts:  # such as the other files of --images photos/*.jpg
        check(not os.path.isfile(text), f"{text} is a file. Name its folder with --images.")

    model, tokenizer, options = evaluation.load(args.checkpoint, pick_device(args.device))
    pictures = find_pictures(args.images, options, model.config.image_size)
    if args.features:
        found = encode_or_read(model, pictures, args.workers, args.features, args.checkpoint)
    else:
        found = dict(encode(model, pictures, args.workers))
    check(found, "none of the pictures can be read")
    numbers = [*found]
    image_features = torch.stack([*found.values()])  # (N, E)
    text_features = evaluation.encode_texts(model, tokenizer, args.texts).cpu()
    print(f"{len(numbers):,} pictures; scores are cosine similarities")
    images = []  # of the sheet
    captions = []
    for text, feature in zip(args.texts, text_features):
        print(f"\n{text}")
        unknown = tokenizer.unknown_words([text])
        if unknown:
            print(f"The vocabulary lacks these words: {', '.join(unknown)}.")
        best = (image_features @ feature).topk(min(args.k, len(numbers)))
        for score, place in zip(best.values.tolist(), best.indices.tolist()):
            i = numbers[place]
            line = f"{score:8.3f}  {pictures.title(i)}"
            print(line)
            if args.out:
                image, _ = NumberedPictures(pictures.labelled, SIDE)[i]
                images.append(image)
                captions.append(f"{text}: {line}")
    if args.out:
        contact_sheet(images, captions, args.out)
        print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run_command(main)
