"""The path from tar shards of image-caption pairs to batches, from top to bottom:

    caption --> Tokenizer ------------------------------.
    shards --> index --> Pairs (decode, crop, resize) ---+--> collate --> batch with uint8 images
                           ^ batch_indices(seed, step)

A shard is a tar as img2dataset and the hub copies of CC3M, CC12M and DataComp have them. Members of
one sample share their name up to the first dot: .jpg|.jpeg|.png|.webp is the image, .txt the
caption, .json optional metadata. Shards are not streamed. One pass over the tar headers makes an
index, and then any sample is two or three reads away. That gives a true global shuffle, an exact
length, and equal batches on every process. It also makes resuming a run a matter of one integer,
the step.
"""

import base64
import glob
import gzip
import hashlib
import html
import importlib.util
import io
import json
import math
import multiprocessing.queues
import os
import random
import signal
import sys
import tarfile
import unicodedata
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import regex
import tiktoken
import tiktoken.load
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from superclip import PAD, InputError, check

# A progress bar for whatever takes more than a second, on a terminal.
progress = partial(tqdm, delay=1, leave=False, disable=None)

# -----------------------------------------------------------------------------
# Tokenizer

# CLIP's order of the 256 bytes: printable ones first. Their ids are 0-255; 256-511 end a word.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES += [b for b in range(256) if b not in BYTES]
BYTE_TOKENS = [bytes([b]) for b in BYTES] + [bytes([b]) + b" " for b in BYTES]

CLIP_VOCAB_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
CLIP_VOCAB_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"

START, END = "<start_of_text>", "<end_of_text>"  # the last two ids of every vocabulary
# What counts as a word: CLIP's pattern, case ignored. Every digit is a word of its own.
SHORT = "'s|'t|'re|'ve|'m|'ll|'d"
WORD = regex.compile(rf"(?i){START}|{END}|{SHORT}|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+")
QUOTES = str.maketrans("‘’‚‛ʼ“”„‟", "'''''\"\"\"\"")
CONTROL = regex.compile("[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
# Letters of full and half width, and ligatures
WIDE = "[\u0132\u0133\u01c4-\u01cc\u01f1-\u01f3\u3000\ufb00-\ufb04\ufb06\uff01-\uffef]+"


def clean(text):
    """A caption as CLIP's tokenizer sees it: HTML entities decoded, quotes straightened, letters
    composed (NFC), of normal width and in lower case.

    This is what open_clip's cleaning does to the captions people write. It leaves out what the
    library ftfy does beyond that, above all the repair of text that was decoded with the wrong
    encoding ("cafÃ©"). Such a caption costs a few odd tokens, not an error.
    """
    if "&" in text:
        text = html.unescape(html.unescape(text))  # captions off the web are often escaped twice
    if not text.isascii():
        text = text.translate(QUOTES)
        text = regex.sub(WIDE, lambda wide: unicodedata.normalize("NFKC", wide[0]), text)
        text = unicodedata.normalize("NFC", text)
    return CONTROL.sub("", text).lower()


def tiktoken_text(tokens):
    """list of tokens as bytes -> the text of a .tiktoken file: base64 and rank on each line."""
    return "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))


def words_to_tiktoken(words):
    """list of words -> the text of a .tiktoken file: all bytes, then each word as one token."""
    return tiktoken_text(dict.fromkeys(BYTE_TOKENS + [word.encode() + b" " for word in words]))


def merges_to_tiktoken(text):
    """CLIP's file of BPE merges -> the text of a .tiktoken file of the same vocabulary."""
    # The file writes each byte as a printable character, and the end of a word as </w>.
    byte_of = dict(zip(map(chr, [*BYTES[:188], *range(256, 324)]), BYTES))
    tokens = list(BYTE_TOKENS)
    for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]:  # CLIP uses no more of its merges
        token = line.replace(" ", "")
        word = bytes(byte_of[c] for c in token.removesuffix("</w>"))
        tokens.append(word + b" " if token.endswith("</w>") else word)
    return tiktoken_text(tokens)


def clip_vocabulary():
    """The text of a .tiktoken file of CLIP's vocabulary: from an installed open_clip_torch, from
    tiktoken's cache, or by download. Raises InputError."""
    spec = importlib.util.find_spec("open_clip")  # finds the package without importing it
    if spec:
        content = Path(spec.origin).with_name(CLIP_VOCAB_URL.rpartition("/")[2]).read_bytes()
    else:
        try:
            content = tiktoken.load.read_file_cached(CLIP_VOCAB_URL, CLIP_VOCAB_SHA256)
        except Exception:  # whatever the network raises
            raise InputError(
                f"cannot download {CLIP_VOCAB_URL}: pip install open_clip_torch brings it along, "
                "--vocab names a copy, and python -m scripts.vocab makes one of your captions"
            ) from None
    return merges_to_tiktoken(gzip.decompress(content).decode())


def vocabulary_beside(shards):
    """The default of --vocab: vocab.tiktoken beside the shards if it is there, else clip."""
    path = Path(shards[0]).with_name("vocab.tiktoken")
    return path if path.is_file() else "clip"


class Tokenizer:
    """Byte-pair encoding on tiktoken. With CLIP's vocabulary its ids are open_clip's.

    The trick: CLIP's end-of-word mark is written as a trailing space byte. Then CLIP's ids are
    tiktoken's ranks, and a word that the vocabulary has as a whole becomes one token.
    """

    def __init__(self, vocab, context_length=77):
        """vocab: the text of a .tiktoken file; context_length: the default row length of __call__.
        Raises InputError."""
        self.vocab, self.context_length = vocab, context_length
        try:
            lines = [line.split() for line in vocab.splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError:
            ranks = {}
        whole = sorted(ranks.values()) == [*range(len(ranks))] and {*BYTE_TOKENS[:256]} <= {*ranks}
        check(whole, "a vocabulary has ranks from 0 up, and all 256 single bytes among its tokens")
        self.start, self.end = len(ranks), len(ranks) + 1
        self.vocab_size = len(ranks) + 2
        special = {START: self.start, END: self.end}
        self.encoding = tiktoken.Encoding(
            "superclip", pat_str="[^ ]+ ", mergeable_ranks=ranks, special_tokens=special
        )

    @classmethod
    def from_file(cls, path, context_length=77):
        """path: a .tiktoken file, CLIP's bpe_simple_vocab_16e6.txt.gz, or "clip", which finds that
        one. Raises InputError."""
        if path == "clip":
            return cls(clip_vocabulary(), context_length)
        check(Path(path).is_file(), f"there is no vocabulary file {path}")
        content = Path(path).read_bytes()
        with suppress(ValueError, EOFError, OSError, KeyError):  # InputError is a ValueError
            text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
            if text.startswith('"bpe_simple_vocab'):
                text = merges_to_tiktoken(text)
            return cls(text, context_length)
        raise InputError(f"{path} is neither a .tiktoken file nor CLIP's file of merges")

    def encode(self, text):
        """str -> list of ids of any length, without start and end."""
        words = WORD.findall(clean(text))
        return self.encoding.encode(" ".join(words) + " ", allowed_special={START, END})

    def decode(self, ids):
        """ids -> str in lower case with a space after each word, without start, end and padding."""
        ids = [int(i) for i in ids if i != self.start]
        ids = ids[: ids.index(self.end)] if self.end in ids else ids  # padding follows the end
        return self.encoding.decode(ids).strip()

    def __call__(self, texts, context_length=None):
        """list of B strings -> LongTensor (B, context_length): start, tokens, end, padding. A text
        that is too long is cut, and still ends with the end token."""
        texts = [texts] if isinstance(texts, str) else texts
        return self.rows(map(self.encode, texts), context_length or self.context_length)

    def rows(self, ids, length):
        """B lists of ids -> LongTensor (B, length) with start, end and padding."""
        rows = [[self.start, *tokens[: length - 2], self.end] for tokens in ids]
        return torch.tensor([row + [PAD] * (length - len(row)) for row in rows]).view(-1, length)


# -----------------------------------------------------------------------------
# Index: where every sample lies in the shards

# Columns of an index row: shard number, then block and size in bytes of image, text and json.
IMAGE, TEXT, JSON = 1, 3, 5
COLUMN = {".jpg": IMAGE, ".jpeg": IMAGE, ".png": IMAGE, ".webp": IMAGE, ".txt": TEXT, ".json": JSON}
BLOCK = 512  # bytes; a tar is made of such blocks, and 32 bits count the blocks of a terabyte


def braces(pattern):
    """ "a{00..02}.tar" -> a00.tar a01.tar a02.tar; without braces, the pattern itself."""
    match = regex.fullmatch(r"(.*?){(\d+)\.\.(\d+)}(.*)", pattern)
    if not match or int(match[2]) > int(match[3]):
        return [pattern]
    head, low, high, tail = match.groups()
    numbers = [f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)]
    return [path for i in numbers for path in braces(head + i + tail)]


def expand(patterns):
    """--train_data -> sorted list of shards, from paths, folders, globs and braces. Each brace must
    match, so that a missing download is noticed. Raises InputError."""
    shards = {}  # real path -> path: a shard that is given twice counts once
    for path in [path for pattern in patterns for path in braces(str(pattern))]:
        found = glob.glob(f"{glob.escape(path)}/*.tar*") if Path(path).is_dir() else [path]
        found = found if Path(path).exists() else glob.glob(path)
        check(found, f"no shards match {path}")
        for shard in found:
            packed = shard.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst"))
            check(not packed, f"{shard} is compressed and has no random access: unpack it to .tar")
            shards[os.path.realpath(shard)] = shard
    return sorted(shards.values())


def split_name(name):
    """A member's name -> (key of its sample, extension). The extension starts at the first dot."""
    folder, slash, name = name.rpartition("/")
    stem, dot, extension = name.partition(".")
    return folder + slash + stem if stem else "", dot + extension.lower()


def read_headers(path, number):
    """A shard and its number -> (index rows, an int32 array (n, 7); list of (key, reason) of the
    samples and parts that are not used)."""
    rows, unused, others = {}, {}, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = split_name(member.name)
                column = COLUMN.get(extension)
                if not (member.isdir() or column and member.isfile()):  # metadata, links, a.b.jpg
                    others[extension] = others.get(extension, 0) + 1
                if column is None or not key or not member.isfile():
                    continue
                row = rows.setdefault(key, [number] + [0] * 6)
                if row[column]:
                    unused[key] = f"appears twice, the first one is used: {member.name}"
                elif 0 < member.size < 2**31:
                    row[column : column + 2] = member.offset_data // BLOCK, member.size
            tar.fileobj.seek(tar.offset)  # tarfile stops at a damaged header, silently
            if any(tar.fileobj.read(BLOCK)):
                unused[""] = f"damaged header, the rest is not read: byte {tar.offset}"
    except (tarfile.TarError, OSError) as error:
        unused[""] = f"{error}; the rest is not read"
    unused |= {f"*{e}": f"a link or another kind: {n:,} files" for e, n in others.items()}
    for key in [key for key, row in rows.items() if not row[IMAGE]]:
        del rows[key]
        unused.setdefault(key, "no image, or an empty one")
    # A NumPy array: torch would send it to the main process as an open file, and there may be more
    # shards than a process may open files.
    return np.array(list(rows.values()), dtype=np.int32).reshape(-1, 7), list(unused.items())


def build_index(shards):
    """list of shards -> (int32 tensor (N, 7), list of (shard, key, reason) of what is not used).

    That is 28 bytes a sample in one tensor, which worker processes share. Python objects would be
    copied to each of them. The index is cached until the size or mtime of a shard changes.
    """
    # Rename this folder when read_headers changes, so that old caches are ignored.
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "superclip-5"
    name = hashlib.sha1("\n".join(map(os.path.abspath, shards)).encode()).hexdigest()
    stamp = [(s.st_size, s.st_mtime_ns) for s in map(os.stat, shards)]
    with suppress(Exception):  # there is no cache, or a damaged one
        cached = torch.load(folder / name, weights_only=True)
        if cached["stamp"] == stamp:
            return cached["index"], cached["unused"]
    with ProcessPoolExecutor(min(len(shards), os.cpu_count() or 1)) as pool:
        results = pool.map(read_headers, shards, range(len(shards)))
        results = list(progress(results, "indexing shards", len(shards), unit="shard"))
    content = {
        "stamp": stamp,
        "index": torch.from_numpy(np.concatenate([rows for rows, _ in results])),
        "unused": [(shard, *e) for shard, (_, unused) in zip(shards, results) for e in unused],
    }
    with suppress(OSError, RuntimeError):  # a cache that cannot be written is no reason to stop
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, lambda file: torch.save(content, file))
    return content["index"], content["unused"]


# -----------------------------------------------------------------------------
# Images

Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow refuses twice as many: decompression bombs
# The formats of web images. Pillow knows stranger ones, and some of them start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
warnings.filterwarnings("ignore", module="PIL")  # about odd metadata
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it


class BadSample(Exception):
    """This sample cannot be used. The message says why."""


def crop_box(width, height, rng=None):
    """The part of an image to look at, as x, y, width, height in pixels.

    Without rng: the largest central square. With rng (a random.Random): CLIP's only augmentation,
    a random rectangle of 90-100 % of the area. It is never flipped, since captions say "left".
    """
    if rng is not None:
        for _ in range(10):  # as torchvision's RandomResizedCrop does it
            area = width * height * rng.uniform(0.9, 1.0)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    side = min(width, height)  # also if the image is too long for such a rectangle
    return (width - side) // 2, (height - side) // 2, side, side


def upright_rgb(image):
    """PIL image -> decoded RGB image, turned as its EXIF data says, transparent parts white."""
    with suppress(Exception):  # damaged EXIF data is no reason to lose the picture
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to 8 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(source, size, rng=None):
    """Bytes of an image file, or a PIL image -> uint8 tensor (3, size, size), cropped (crop_box)
    and resized, bicubic with antialiasing. Raises BadSample.

    Three things make it fast. A JPEG is decoded at a fraction of its size where the crop allows it
    (`draft`). It stays uint8 to the end. And the three values of a pixel stay side by side, as the
    decoder wrote them ("channels last").
    """
    try:
        fresh = isinstance(source, bytes)  # a caller's image is left as it is
        image = Image.open(io.BytesIO(source), formats=FORMATS) if fresh else source
        width, height = image.size
        x, y, w, h = crop_box(width, height, rng)
        scale = max(size / w, size / h)
        if fresh and scale <= 0.5:  # draft halves the picture while the crop allows it
            image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
        fx, fy = image.width / width, image.height / height  # not quite equal: draft rounds up
        image = upright_rgb(image.crop((x * fx, y * fy, (x + w) * fx, (y + h) * fy)))
    except Exception as error:  # Pillow raises a dozen kinds, some with an address in memory
        reason = str(error).partition(" <")[0]
        raise BadSample(f"the image cannot be decoded: {reason}") from None
    # With a batch axis in front, torch sees that this is channels last.
    pixels = torch.from_numpy(np.asarray(image))[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]


# -----------------------------------------------------------------------------
# Samples and their order

MAX_CAPTION = 20_000  # characters; a longer caption would make its whole batch as wide


open_shard = lru_cache(maxsize=500)(partial(open, mode="rb"))  # processes may open a thousand files


class Pairs(Dataset):
    """Image-caption pairs in tar shards.

    shards: paths. captions, labels: lists of sources, each "txt" or "json.FIELD", where the
    field holds a string or a list of strings. One text is drawn each time; a source that is named
    twice is drawn twice as often. Index it with (visit, sample): `visit` counts the
    samples of the whole run and seeds the crop and the choice of the caption, so that they do not
    depend on which worker does the work. Raises InputError.
    """

    def __init__(self, shards, tokenizer, image_size, captions=("txt",), labels=None, seed=0):
        self.shards, self.tokenizer = shards, tokenizer
        self.image_size, self.seed = image_size, seed
        self.captions, self.label_captions = captions, labels or captions
        self.index, self.unused = build_index(shards)
        for source in (*self.captions, *self.label_captions):
            known = source == "txt" or regex.fullmatch(r"json\.\w+", source)
            check(known, f"captions come from txt or json.FIELD, not from {source!r}")
        why = f" ({self.unused[0][0]}: {self.unused[0][2]})" if self.unused else ""
        check(len(self.index), f"no image-caption pairs in {self.shards[0]}{why}")

    def __len__(self):
        return len(self.index)

    def read_blocks(self, shard, block, size):
        """Read `size` bytes of a shard, from a block on."""
        return os.pread(open_shard(self.shards[shard]).fileno(), size, block * BLOCK)

    def read(self, row, column):
        """The bytes of one member: IMAGE, TEXT or JSON. Raises BadSample."""
        if not row[column]:
            raise BadSample(f"no {'txt' if column == TEXT else 'json'}, or an empty one")
        content = self.read_blocks(row[0], row[column], row[column + 1])
        if len(content) < row[column + 1]:
            raise BadSample("the shard ends too early")
        return content

    def key(self, row):
        """The sample's name, read from the tar header before the image to save memory. The header
        may shorten a name that is long or not ASCII."""
        with suppress(tarfile.TarError, OSError):  # the shard has changed, or is gone
            header = self.read_blocks(row[0], row[IMAGE] - 1, BLOCK)
            return split_name(tarfile.TarInfo.frombuf(header, "utf-8", "replace").name)[0]
        return "?"

    def texts(self, row, source):
        """All captions that a sample has in a source, a list of strings. Raises BadSample."""
        try:
            if source == "txt":
                texts = self.read(row, TEXT).decode()
            else:
                texts = json.loads(self.read(row, JSON))[source.removeprefix("json.")]
            texts = texts if isinstance(texts, list) else [texts]
            # JSON may hold half of a surrogate pair, which cannot be printed or written.
            texts = [text.encode("utf-8", "replace").decode() for text in texts if text.strip()]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise BadSample(f"{source} is missing, or is not UTF-8 text or a list of it") from None
        if not texts or max(map(len, texts)) > MAX_CAPTION:
            raise BadSample(f"the caption is empty, or longer than {MAX_CAPTION:,} characters")
        return texts

    def __getitem__(self, item):
        """(visit, sample) -> (image, ids of the caption, ids of the label caption, replaced).

        Another sample, at random, replaces a bad one, so that batches have the same size on every
        process; replaced is the list of (shard, key, reason) of the bad ones."""
        visit, sample = item
        rng = random.Random(self.seed << 40 | visit)
        replaced = []
        while len(replaced) < 100:
            row = self.index[sample].tolist()
            try:
                caption = label = rng.choice(self.texts(row, rng.choice(self.captions)))
                if self.label_captions != self.captions:
                    label = rng.choice(self.texts(row, rng.choice(self.label_captions)))
                image = load_image(self.read(row, IMAGE), self.image_size, rng)
                return image, *map(self.tokenizer.encode, (caption, label)), replaced
            except (BadSample, OSError) as error:
                replaced.append((self.shards[row[0]], self.key(row), str(error)))
                sample = rng.randrange(len(self))
        shard, _, reason = replaced[-1]
        raise InputError(f"a hundred bad samples in a row, the last one in {shard}: {reason}")

    def collate(self, items):
        """list of B items -> dict of images (B, 3, S, S) uint8, tokens (B, T), label_tokens (B,
        T'), replaced."""
        images, captions, labels, replaced = zip(*items)
        # default_collate stacks like torch.stack, and in a worker straight into shared memory
        images = default_collate([image.permute(1, 2, 0) for image in images])  # (B, S, S, 3)
        length = min(self.tokenizer.context_length, round_up(captions))
        return {
            "images": images.permute(0, 3, 1, 2),  # channels last, which convolutions like
            "tokens": self.tokenizer.rows(captions, length),
            "label_tokens": self.tokenizer.rows(labels, round_up(labels)),  # the whole captions
            "replaced": [entry for entries in replaced for entry in entries],
        }


def round_up(ids):
    """Length of the longest of these lists of ids, with start and end, as a multiple of 16. Few
    distinct lengths mean few recompilations, and trimmed padding costs nothing."""
    return 16 * math.ceil((max(map(len, ids)) + 2) / 16)


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_indices(n, batch_size, seed, step):
    """The global batch of a step, as a list of batch_size pairs (visit, sample). A pure function,
    so that a run can start at any step.

    Every epoch is another permutation of the n samples, cut into n // batch_size batches. What is
    left over is not used in that epoch.
    """
    epoch, batch = divmod(step, n // batch_size)
    order = epoch_order(n, seed, epoch)[batch * batch_size : (batch + 1) * batch_size]
    return list(enumerate(order.tolist(), start=step * batch_size))


def micro_batches(n, batch_size, rows, micro_batch_size, seed, start, stop):
    """Yield what one process loads from step `start` to `stop`: its rows of each global batch, in
    parts of micro_batch_size."""
    for step in range(start, stop):
        batch = batch_indices(n, batch_size, seed, step)[rows]
        yield from (batch[i : i + micro_batch_size] for i in range(0, len(batch), micro_batch_size))


def start_worker(_):
    # The main process answers Ctrl-C and SIGTERM, and needs its workers until it has saved. So they
    # ignore the first, and end half a minute after the second.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    # If a batch cannot be put into shared memory, the worker would drop it and the main process
    # would wait for ever. So the worker ends instead, which the main process notices.
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)


def make_loader(dataset, workers=None, batch_bytes=1, **options):
    """Yield the batches of a DataLoader. Its workers are forked, so that they share the index.
    (Python 3.14's default would copy it.) Raises InputError if one of them dies.

    workers: by default, the cores that this process may use, which are fewer than there are in a
    container or under a scheduler, shared among the processes of this machine. Each keeps two
    batches ready in shared memory, so large batches get fewer workers: 4 GiB must do for all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    share = min(share, max(1, 2**32 // (2 * batch_bytes)))
    options["num_workers"] = share if workers is None else workers
    if options["num_workers"] and sys.platform == "linux":
        options["multiprocessing_context"] = "fork"
    try:
        yield from DataLoader(dataset, worker_init_fn=start_worker, **options)
        return
    except RuntimeError as error:
        if not any(text in str(error) for text in ("DataLoader worker (", "shared memory")):
            raise
        error.__traceback__ = None  # it would keep the other workers alive
    raise InputError("a loading process has died: try docker run --shm-size 8g, or --workers 0")


def load_batches(pairs, order, micro_batch_size, workers, device):
    """Yield the micro-batches of `order` as dicts of tensors on the device. A GPU copies them on a
    stream of their own, while the step before is still computing. Images travel as uint8."""
    batch_bytes = micro_batch_size * 3 * pairs.image_size**2
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    options = {"collate_fn": pairs.collate, "pin_memory": side is not None}
    for part in make_loader(pairs, workers, batch_bytes, batch_sampler=order, **options):
        replaced = list(map(tuple, part.pop("replaced")))  # pin_memory may have made lists of them
        with torch.cuda.stream(side):  # which does nothing for None
            part = {name: x.to(device, non_blocking=True) for name, x in part.items()}
        for x in part.values() if side else ():
            torch.cuda.current_stream().wait_stream(side)
            x.record_stream(torch.cuda.current_stream())  # else its memory is reused too early
        yield {**part, "replaced": replaced}


# -----------------------------------------------------------------------------
# What all commands share: files that are written whole


def write_file(path, write):
    """Write a file whole or not at all. `write(file)` fills a temporary file, which is flushed to
    the disk and then renamed. After an OSError, what was at `path` before is still there."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there after an error
