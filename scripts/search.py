"""Search images by text, or by another image:

    python -m scripts.search --checkpoint out/best.pt --images photos/ "a red mug" "two dogs"
    python -m scripts.search --checkpoint out/best.pt --images photos/ --like photos/1.jpg --k 30
    python -m scripts.search --checkpoint out/best.pt --data 'shards/*.tar' "a mug" --out found.html
    python -m scripts.search --checkpoint out/best.pt "a mug"
    python -m scripts.search ... --features photos.npz --serve

The first command prints the best images for each text with their scores. --out also shows them, as
a picture or, for a name that ends in .html, as a page that needs no network, and --serve opens a
page to search with: see scripts/serve.py. Without --images and --data, the validation pictures of
the run are searched. A score is the cosine similarity of two features. Compare only scores of the
same text, because some texts score higher than others everywhere.

--features keeps the features of the images searched, so that the next search encodes only those
that are new or have changed. Other programs, such as a notebook or FAISS, can read the file:

    photos = numpy.load("photos.npz")
    photos["names"]     # (N,) absolute paths; SHARD:KEY for images in shards
    photos["features"]  # (N, E) float32, of length 1

The other arrays tell versions apart: image i is sizes[i] bytes of files[i], from offsets[i] on, as
they were at mtimes[i], in ns; checkpoint is the SHA-256 of the checkpoint.

Axes: N images, E embedding, Q searches, S pixels a side.
"""

import hashlib
import math
import os
import threading
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

import data
import eval as evaluation
from cli import (
    InputError,
    check,
    make_parser,
    number,
    output_file,
    pick_device,
    printable,
    run_command,
    write_file,
    write_json,
)
from scripts import serve
from scripts.pictures import (
    FORMATS,
    contact_sheet,
    image_files,
    load_font,
    wrap,
)

# -----------------------------------------------------------------------------
# Where images are

# An image is `size` bytes of a file, from `offset` on, as they were at mtime, in ns. Images that
# are equal in all of that have the same content, so they are encoded once.
Entry = namedtuple("Entry", "file name offset size mtime")
COLUMNS = "files", "names", "offsets", "sizes", "mtimes"  # in the file of features


def file_entries(paths):
    """Image files and folders -> list of their entries."""
    entries = []
    for path in image_files(paths):
        name = os.path.abspath(path)
        status = os.stat(path)
        entries.append(Entry(name, name, 0, status.st_size, status.st_mtime_ns))
    return entries


def shard_entries(pairs):
    """data.Shards -> the entries of all their images, with or without captions, as a dict {entry:
    its row of the index}."""
    files = [os.path.abspath(shard) for shard in pairs.shards]
    mtimes = [os.stat(shard).st_mtime_ns for shard in pairs.shards]
    entries = {}
    for row in pairs.index.tolist():
        file = files[row[0]]
        name = f"{file}:{pairs.key(row)}"
        offset = row[data.IMAGE] * data.BLOCK
        size = row[data.IMAGE + 1]
        entries[Entry(file, name, offset, size, mtimes[row[0]])] = row
    return entries


def first_text(pairs, row, sources):
    """The first text that a sample of shards has in the first of the sources that it has, or ""."""
    for source in sources:
        with suppress(data.BadSample, OSError):
            return pairs.texts(row, source)[0]
    return ""


def short_name(path):
    """A path without the current folder."""
    return path.removeprefix(os.getcwd() + os.sep)


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
            made_by = content["checkpoint"].item()
            vectors = torch.from_numpy(content["features"]).view(len(content["names"]), E)
            columns = [content[name].tolist() for name in COLUMNS]
        entries = [Entry(*values) for values in zip(*columns, strict=True)]
        features = dict(zip(entries, vectors, strict=True))
        intact = vectors.dtype == torch.float32 and bool(vectors.isfinite().all())
    except Exception:  # NumPy and zipfile raise a dozen kinds
        intact = False
    check(intact, f"{path} is damaged, or no file of this command: name another")
    check(made_by == checkpoint, f"{path} is of another checkpoint: name another file or delete it")
    return features


def write_features(path, features, checkpoint):
    """Write what read_features reads. features: dict {entry: feature (E,)}."""
    content = {"checkpoint": checkpoint, "features": torch.stack([*features.values()]).numpy()}
    for name, values in zip(COLUMNS, zip(*features)):
        content[name] = np.array(values)
    write_file(path, lambda file: np.savez(file, **content))


def find_features(model, entries, workers, path=None, checkpoint="", batch_size=128):
    """list of entries -> dict {entry: feature (E,)} of all images that can be read; the others are
    named. Features that are in the file `path` come from there, and all are kept there; checkpoint
    is its SHA-256. Raises InputError."""
    before = {}
    if path and path.exists():
        before = read_features(path, checkpoint, model.config.embed_dim)
    found = {entry: before[entry] for entry in entries if entry in before}
    missing = [entry for entry in dict.fromkeys(entries) if entry not in before]
    images = Images(missing, model.config.image_size)
    try:
        for batch, encoded in evaluation.batches(images, batch_size, workers, "encoding"):
            vectors = model.encode_image(batch.to(evaluation.device_of(model))).cpu()
            found.update(zip(encoded, vectors))
    finally:  # also after Ctrl-C, so that the next search starts from there
        found = {entry: found[entry] for entry in entries if entry in found}  # in their order
        if path and found and list(found) != list(before):
            write_features(path, found, checkpoint)
    check(found, "none of the images can be used")
    return found


# -----------------------------------------------------------------------------
# Searching


class Search:
    """A model, and the images to search with it. An image's number is its place in `entries`.

    features: dict {entry: feature (E,)}; pairs: data.Shards, or None; row_of: dict {entry: its row
    of pairs.index}; captions: sources, of which the first that an image has is taken. The result of
    a search is a dict: the text, or the name of the image that others are like, and what was found,
    a list of dicts.
    """

    def __init__(self, model, tokenizer, features, pairs, row_of, captions):
        self.model = model
        self.tokenizer = tokenizer
        self.entries = list(features)
        self.features = torch.stack([*features.values()])  # (N, E)
        self.pairs = pairs
        self.row_of = row_of
        self.captions = captions
        self.lock = threading.Lock()  # for the model, which the page of --serve asks from threads

    def by_text(self, text, k, skip=0):
        """The images that fit a text best: k of them, after the first `skip`."""
        with self.lock:
            [feature] = evaluation.encode_texts(self.model, self.tokenizer, [text]).cpu()
        found = self.best(self.features @ feature, k, skip)
        return {"text": text, "found": found}

    def by_image(self, entry, feature, k, skip=0):
        """The images that are most like another, which need not be one of them."""
        scores = self.features @ feature
        # An image would find itself and its copies, which are of no use to anybody.
        scores = scores.masked_fill(scores > 1 - 1e-5, -math.inf)
        found = self.best(scores, k, skip)
        return {"like": short_name(entry.name), "found": found}

    def best(self, scores, k, skip):
        order = scores.argsort(descending=True, stable=True)[skip : skip + k].tolist()
        return [self.about(i, scores[i].item()) for i in order if scores[i] > -math.inf]

    def about(self, i, score):
        """What is known of image i. Its file is the one that scripts/pack.py made it from, and it
        has a caption only in shards; each is "" if it is not known."""
        entry = self.entries[i]
        found = {"number": i, "score": score, "name": short_name(entry.name)}
        found |= {"file": "", "caption": ""}
        row = self.row_of.get(entry)
        if row is not None:
            found["file"] = first_text(self.pairs, row, ["json.image"])
            found["caption"] = first_text(self.pairs, row, self.captions)
        return found

    def image(self, entry, side):
        """An image as a uint8 tensor (3, side, side), or, a text, the reason why not."""
        image, _ = Images([entry], side)[0]
        return image


def print_result(result):
    title = result.get("text") or f"like {result['like']}"
    print("\n" + printable(title))
    for found in result["found"]:
        known = [found["name"], found["file"], found["caption"]]
        line = "  ".join(filter(None, known))
        print(f"{found['score']:8.3f}  {printable(line)}")


# -----------------------------------------------------------------------------
# The picture

# Pixels of an image; images in a row; images in all: more would not fit into a .webp.
SIDE, IN_A_ROW, MAX_IMAGES = 180, 7, 420


def card(text):
    """A text in the place of an image: uint8 tensor (3, SIDE, SIDE)."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    font = load_font(22)
    lines = wrap(text, font, SIDE, lines=6)
    ImageDraw.Draw(picture).text((0, 0), "\n".join(lines), "black", font)
    return pil_to_tensor(picture)


def block_of(query, result, entries):
    """The cells that draw() shows of a search, list of (entry or text, caption). query: what it was
    for, a text or an entry."""
    caption = "like this" if isinstance(query, Entry) else ""
    cells = [(query, caption)]
    for found in result["found"]:
        title = found["caption"] or found["file"] or os.path.basename(found["name"])
        cells.append((entries[found["number"]], f"{found['score']:.3f} {title}"))
    return cells


def draw(blocks, path):
    """Draw a block for each search, on rows of its own, and write the picture to `path`. blocks:
    lists of (entry or text, caption)."""
    columns = min(IN_A_ROW, max(map(len, blocks)))
    cells = []
    for block in blocks:
        empty = -len(block) % columns  # cells at the end of its last row
        cells += block + [("", "")] * empty
    cells = cells[:MAX_IMAGES]

    images = []
    for cell, _ in cells:
        image = cell
        if isinstance(cell, Entry):
            image, _ = Images([cell], SIDE)[0]
        if isinstance(image, str):  # a text to search for, or the reason why there is no image
            image = card(image)
        images.append(image)
    contact_sheet(images, [caption for _, caption in cells], path, columns)


def write_out(path, results, search):
    """Write the file of --out. results: dict {text or entry: the result of its search}."""
    if path.suffix.lower() == ".html":
        serve.write_results(path, results, search)
    else:
        draw([block_of(*pair, search.entries) for pair in results.items()], path)


# -----------------------------------------------------------------------------
# The command


def read_options(argv):
    parser = make_parser(__doc__, "checkpoint", "device")
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="what to look for")
    add("--images", action="append", default=[], help="folder or image; may be repeated")
    add("--data", action="append", default=[], help="tar shards, or a folder; may be repeated")
    add("--like", action="append", default=[], help="image to look for; may be repeated")
    add("--k", type=number(int, 1), default=12, help="images to find for each (default 12)")
    add("--out", type=output_file(".html", *FORMATS), help="page or picture to write: .html, .png")
    add("--json", type=output_file(".json"), help="file to write what was found to")
    npz_file = output_file(".npz")
    add("--features", type=npz_file, help=".npz file that keeps the features for the next search")
    add("--workers", type=number(int, 0), help="loading processes (default: one a core)")
    add("--serve", action="store_true", help="serve a page to search with, to this machine alone")
    port = number(int, 0, 65535)
    add("--port", type=port, default=8000, help="of that page (default 8000; 0: any free one)")
    args = parser.parse_intermixed_args(argv)
    if not args.texts and not args.like:
        check(args.serve, "name a text to look for, or an image (--like), or open a page (--serve)")
        check(not args.out, "--out shows what was found: name a text to look for, or an image")
    # The shell makes several names of --images *.jpg, and all but the first would become texts.
    wrong = [text for text in args.texts if not text.strip() or os.path.exists(text)]
    if wrong:
        raise InputError(f"texts must not be empty or files (repeat --images for each): {wrong}")
    return args


def open_shards(args):
    """Returns the pairs to search, those of --data or, if there is nothing to search, validation
    pairs of the run, and the sources of their captions. Or None and None."""
    if args.images and not args.data:
        return None, None
    shards, captions = evaluation.validation_of(args.checkpoint)
    shards = args.data or shards
    check(
        shards, f"{args.checkpoint} names no validation shards: name --images or --data to search"
    )
    return data.Shards(data.expand(shards)), list(dict.fromkeys([*captions, "txt"]))


def main(argv):
    args = read_options(argv)
    server = None
    if args.serve:
        server = serve.open_server(args.port)  # now, so that no work is lost if another has it
    like = file_entries(args.like)
    entries = file_entries(args.images)
    pairs, captions = open_shards(args)
    row_of = {}  # entry in a shard -> its row of the index
    if pairs:
        row_of = shard_entries(pairs)
    model, tokenizer, _ = evaluation.load(args.checkpoint, pick_device(args.device))

    features_of_like = {}
    if like:
        features_of_like = find_features(model, like, workers=0)
    sha256 = hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest()
    features = find_features(model, [*entries, *row_of], args.workers, args.features, sha256)
    search = Search(model, tokenizer, features, pairs, row_of, captions)

    print(f"{len(features):,} images; scores are cosine similarities")
    results = {}  # text or entry -> the result of its search
    for entry, feature in features_of_like.items():
        results[entry] = search.by_image(entry, feature, args.k)
    for text in args.texts:
        results[text] = search.by_text(text, args.k)
    for result in results.values():
        print_result(result)
    write_json(args.json, [*results.values()])
    if args.out:
        write_out(args.out, results, search)
        print(f"\nwrote {args.out}")
    if server:
        serve.run(server, search, args.k)


if __name__ == "__main__":
    run_command(main)
