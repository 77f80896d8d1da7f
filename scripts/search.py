"""Search pictures by text:

    python -m scripts.search --checkpoint out/best.pt "a red star"
    python -m scripts.search --checkpoint clip.pt --images photos/ "a red mug" "two dogs"
    python -m scripts.search --checkpoint clip.pt --images photos/ --features photos.npz --serve

The command prints the best pictures for each text. A score is the cosine similarity of two
features. Compare only scores of the same text, because some texts have higher scores with every
picture than others. Without --images the command searches the validation pictures of the run. With
--serve you search on a page.

--features keeps the features of the pictures in a file. The next search encodes only files that are
new or have changed. If there are any, it writes the file again, without pictures that have been
changed or deleted. Other programs can read the arrays by numpy.load: `names` (N,), which are whole
paths, and `features` (N, E), float32, each of length 1.
"""

import base64
import hashlib
import html
import os
import secrets
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from torch.utils.data import Subset
from torchvision.io import encode_jpeg

import eval as evaluation
from common.cli import check, make_parser, number, output_file, run_command, write_file
from common.devices import pick_device
from common.images import readable_batches
from scripts.pictures import find_pictures

# -----------------------------------------------------------------------------
# Features


def encode(model, pictures, workers):
    """Encode pictures. Yield (number, feature (E,)) for each one that can be read."""
    device = evaluation.device_of(model)
    for pixels, numbers in readable_batches(pictures, 128, workers):
        yield from zip(numbers, model.encode_image(pixels.to(device)).cpu())


def stamp_of(file):
    """Return a text that tells an image file from all others, and changes when the file does."""
    stat = file.stat()
    return f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def file_of(stamp):
    return Path(stamp.rsplit(" ", 2)[0])


def read_features(path, checkpoint):
    """Return what a file of features holds, a dict {stamp: feature (E,)}, without images that have
    been changed or deleted. Raise InputError if the file is not from the checkpoint with
    this hash, whose features alone can be compared."""
    content = dict(np.load(path))
    is_ours = content.get("checkpoint") == checkpoint
    check(is_ours, f"{path} is not from this checkpoint. Name another file, or delete it.")
    known = {}
    features = torch.from_numpy(content["features"])
    for stamp, feature in zip(content["stamps"].tolist(), features):
        file = file_of(stamp)
        if file.exists() and stamp_of(file) == stamp:
            known[stamp] = feature
    return known


def encode_or_read(model, pictures, workers, path, checkpoint):
    """Return the features of image files, as a dict {number: feature (E,)}. Encode those that a
    file of features lacks, and write it again. path: that file; checkpoint: the checkpoint's."""
    sha256 = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
    known = read_features(path, sha256) if path.exists() else {}
    stamps = [stamp_of(file) for file, _ in pictures.labelled]
    missing = [i for i, stamp in enumerate(stamps) if stamp not in known]
    try:
        for i, feature in encode(model, Subset(pictures, missing), workers):
            known[stamps[i]] = feature
    finally:  # after Ctrl-C, keep those that are done
        if missing and known:
            content = {
                "checkpoint": sha256,
                "stamps": [*known],
                "names": [str(file_of(stamp)) for stamp in known],
                "features": torch.stack([*known.values()]).numpy(),
            }
            write_file(path, lambda file: np.savez(file, **content))
    return {i: known[stamp] for i, stamp in enumerate(stamps) if stamp in known}


# -----------------------------------------------------------------------------
# The page

PAGE = Template(Path(__file__).with_suffix(".html").read_text("utf-8"))
ITEM = '<li><img src="data:image/jpeg;base64,{}" alt="">{}<div>{:.3f}</div></li>\n'


def page(text, search, pictures):
    """Return the page with the pictures that fit a text best, or an empty page if there is none.
    search: returns what the vocabulary lacks, and a list of (score, number of a picture)."""
    items = []
    note, found = search(text) if text else ("", [])
    for score, i in found:
        image, _ = pictures[i]
        if image is None:  # The file has been moved or deleted since it was encoded.
            continue
        jpeg = base64.b64encode(encode_jpeg(image).numpy().tobytes()).decode()
        items.append(ITEM.format(jpeg, html.escape(pictures.title(i)), score))
    return PAGE.substitute(text=html.escape(text), note=html.escape(note), items="".join(items))


def serve(search, pictures):
    """Answer requests until Ctrl-C.

    Only this machine can use the page, or one that is connected to it by `ssh -L`, because the
    server listens on 127.0.0.1. The address has a random part, which other users of this machine
    and websites do not know.
    """
    address = f"/{secrets.token_urlsafe(16)}/"
    lock = threading.Lock()  # not every device lets two threads use a model

    class Handler(BaseHTTPRequestHandler):
        def handle(self):
            with suppress(ConnectionError):  # A browser that leaves does not wait for the page.
                super().handle()

        def do_GET(self):
            url = urlsplit(self.path)
            if url.path != address:
                self.send_error(404)
                return
            text = parse_qs(url.query).get("text", [""])[0]
            with lock:
                # The name of a file may have bytes that are no UTF-8.
                content = page(text, search, pictures).encode(errors="replace")
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            """Print nothing, because a request may contain any text."""

    # Each connection has a thread, because a browser opens connections that it may never use.
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)  # 0 is any free port
    print(f"\nopen http://127.0.0.1:{server.server_port}{address} in a browser; Ctrl-C ends it")
    server.serve_forever()


def main(argv):
    parser = make_parser(__doc__, "checkpoint", "device")
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="texts to look for")
    add("--images", type=Path, help="image, or folder of images (default: validation pictures)")
    add("--k", type=number(int, 1), default=12, help="pictures for each text (default: 12)")
    add("--features", type=output_file(".npz"), help="file that keeps the features of --images")
    text = "loading processes (default: the cores, at most 16)"
    add("--workers", type=number(int, 0), help=text)
    add("--serve", action="store_true", help="serve a page to search with, on this machine alone")
    args = parser.parse_intermixed_args(argv)
    check(args.texts or args.serve, "there is no text to look for: add one, or use --serve")
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
    features = torch.stack([*found.values()])  # (N, E)

    def search(text):
        """Return which words the vocabulary lacks, as a sentence, or "" if there are none, and a
        list of (score, number of a picture), with the highest scores first."""
        unknown = ", ".join(tokenizer.unknown_words([text]))
        note = f"The vocabulary lacks these words: {unknown}." if unknown else ""
        [feature] = evaluation.encode_texts(model, tokenizer, [text]).cpu()
        scores, places = (features @ feature).topk(min(args.k, len(features)))
        return note, [(score, numbers[i]) for score, i in zip(scores.tolist(), places.tolist())]

    print(f"{len(features):,} pictures; scores are cosine similarities")
    for text in args.texts:
        note, best = search(text)
        print(f"\n{text}")
        if note:
            print(note)
        for score, i in best:
            print(f"{score:8.3f}  {pictures.title(i)}")
    if args.serve:
        serve(search, pictures)


if __name__ == "__main__":
    run_command(main)
