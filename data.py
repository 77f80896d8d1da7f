"""The path from tar shards of image-caption pairs to batches: one reading, top to bottom.

    caption --> Tokenizer -------------------------------.
    shards --> index --> Pairs (decode, crop, resize) ---> collate --> batch on uint8
                            ^ batch_indices(seed, step)

A shard is a tar as img2dataset and the hub copies of CC3M, CC12M and DataComp have them: members of
one sample share their name up to the first dot; .jpg|.jpeg|.png|.webp is the image, .txt the
caption, .json optional metadata. Shards are not streamed: one pass over the tar headers makes an
index, and after that any sample is two or three reads away. That gives a true global shuffle, an
exact length, equal batches on every process, and it makes resuming a run a matter of one integer,
the step.

    python data.py shapes            make the built-in data set of coloured shapes
    python data.py vocab SHARDS      make a word vocabulary from the shards' own captions
    python data.py pack --csv FILE   make shards from a list of images and captions
    python data.py show SHARDS       look at shards: samples, tokens, what is dropped, a picture
"""

import argparse
import base64
import glob
import gzip
import hashlib
import html
import importlib
import importlib.util
import io
import json
import math
import os
import random
import re
import signal
import sys
import tarfile
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import regex
import tiktoken
import tiktoken.load
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from superclip import PAD, InputError

# -----------------------------------------------------------------------------
# Tokenizer

CLIP_VOCAB_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
CLIP_VOCAB_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
CLIP_MERGES = 49152 - 256 - 2  # of the file's 262,144 merges CLIP keeps the first

# CLIP's order of the 256 bytes: printable ones first. Their ids are 0-255, and 256-511 at a word's
# end.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES += [b for b in range(256) if b not in BYTES]

START, END = "<start_of_text>", "<end_of_text>"  # the last two ids of every vocabulary
# What counts as a word: CLIP's pattern, case ignored. A digit is a word of its own.
WORD = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)


def _character_table():
    """What CLIP's cleaning (the library ftfy) makes of single characters, for str.translate."""
    table = dict.fromkeys([*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, 0xFEFF])  # control: drop
    table |= dict.fromkeys([*range(0x206A, 0x2070), *range(0xFFF9, 0xFFFD)])
    table |= dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'")
    table |= dict.fromkeys(range(0x201C, 0x2020), '"')
    ligatures = [*range(0xFB00, 0xFB05), 0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4)]
    for code in [*ligatures, *range(0xFF01, 0xFFF0), 0x3000]:  # and full and half width
        table.setdefault(code, unicodedata.normalize("NFKC", chr(code)))
    return table | {0x149: "'n", 0xFB05: "\u017ft", 0xFB06: "st"}


CHARACTERS = _character_table()
ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")


def clean(text):
    """A caption as CLIP's tokenizer sees it: HTML entities decoded, quotes straightened, letters
    composed (NFC) and in lower case.

    Equal to open_clip's cleaning but for what its ftfy does beyond single characters: it repairs
    mojibake (text decoded with the wrong encoding, "cafÃ©", and the control characters 128-159),
    drops terminal colours and knows HTML entities in capitals (&EACUTE;). Captions that are right
    UTF-8 hold none of these, and one that does costs a few odd tokens, not an error.
    """
    if "&" in text:  # "&amp;amp;": captions off the web are often escaped more than once
        # ftfy takes the first line with a "<" for HTML's source, and leaves the rest to CLIP's
        # unescape
        end = text.rfind("\n", 0, text.index("<")) + 1 if "<" in text else len(text)
        head, tail = text[:end], text[end:]
        while (decoded := ENTITY.sub(lambda entity: html.unescape(entity[0]), head)) != head:
            head = decoded
        text = head + tail
    text = text.translate(CHARACTERS)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return html.unescape(html.unescape(text)).lower()  # twice, and after the rest: so does CLIP


def vocabulary_from_words(words):
    """The text of a .tiktoken file, base64 and rank a line: all bytes, then whole words."""
    tokens = [bytes([b]) for b in BYTES] + [bytes([b]) + b" " for b in BYTES]
    tokens += [word.encode() + b" " for word in words]
    return "".join(
        f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(dict.fromkeys(tokens))
    )


def _vocabulary_from_merges(text):
    """CLIP's file of BPE merges -> the text of the same vocabulary as a .tiktoken file."""
    # The file writes each byte as a printable character, and the end of a word as </w>.
    byte_of = dict(zip(map(chr, [*BYTES[:188], *range(256, 324)]), BYTES))
    words = []
    for line in text.split("\n")[1 : CLIP_MERGES + 1]:
        token = line.replace(" ", "")
        word = bytes(byte_of[c] for c in token.removesuffix("</w>"))
        words.append(word + b" " if token.endswith("</w>") else word)
    tokens = [bytes([b]) for b in BYTES] + [bytes([b]) + b" " for b in BYTES] + words
    return "".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))


class Tokenizer:
    """Byte-pair encoding on tiktoken; with CLIP's vocabulary, id for id that of open_clip.

    The trick: write CLIP's end-of-word mark as a trailing space byte. Then CLIP's ids are
    tiktoken's ranks, a word is what `[^ ]+ ` matches, and a word that is in the vocabulary as a
    whole is one token.
    """

    def __init__(self, vocab, context_length=77):
        """vocab: the text of a .tiktoken file; context_length: tokens of a row that __call__
        returns."""
        self.vocab, self.context_length = vocab, context_length
        try:
            lines = [line.split() for line in vocab.splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except ValueError:
            raise InputError(
                "the vocabulary is no .tiktoken file (lines of base64 and rank)"
            ) from None
        if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 512:
            raise InputError("the vocabulary's ranks do not run from 0 over all bytes and words")
        if any(bytes([b]) not in ranks for b in range(256)):
            raise InputError("the vocabulary lacks some of the 256 single bytes")
        self.start, self.end = len(ranks), len(ranks) + 1
        self.vocab_size = len(ranks) + 2
        self.encoding = tiktoken.Encoding(
            "superclip",
            pat_str="[^ ]+ ",
            mergeable_ranks=ranks,
            special_tokens={START: self.start, END: self.end},
        )

    @classmethod
    def from_file(cls, path, context_length=77):
        """path: a .tiktoken file, or CLIP's bpe_simple_vocab_16e6.txt.gz. Raises InputError."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"there is no vocabulary file {path}")
        try:
            content = path.read_bytes()
            text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
            if text.startswith('"bpe_simple_vocab'):
                text = _vocabulary_from_merges(text)
            return cls(text, context_length)
        except (UnicodeDecodeError, EOFError, OSError, KeyError, InputError):
            raise InputError(
                f"{path} is no vocabulary: give a .tiktoken file or bpe_simple_vocab_16e6.txt.gz"
            ) from None

    def encode(self, text):
        """str -> list of ids, without start and end, of any length."""
        words = WORD.findall(clean(text))
        return self.encoding.encode(" ".join(words) + " ", allowed_special={START, END})

    def decode(self, ids):
        """ids -> str in lower case, a space after each word; no start, end and padding."""
        ids = list(map(int, ids))
        while ids and ids[-1] == PAD:  # a text's own last token ends a word, so it is never id 0
            ids.pop()
        return self.encoding.decode([i for i in ids if i < self.start]).strip()

    def __call__(self, texts, context_length=None):
        """list of B strings -> LongTensor (B, context_length): start, tokens, end, padding. A text
        that is too long is cut, and still ends with the end token."""
        length = context_length or self.context_length
        texts = [texts] if isinstance(texts, str) else texts
        return self.rows([self.encode(text) for text in texts], length)

    def rows(self, ids, length):
        """list of B lists of ids -> LongTensor (B, length) with start, end and padding."""
        rows = [[self.start, *tokens[: length - 2], self.end] for tokens in ids]
        rows = [row + [PAD] * (length - len(row)) for row in rows]
        return torch.tensor(rows, dtype=torch.long).view(len(ids), length)


def find_tokenizer(vocab, shards=(), context_length=77):
    """--vocab -> Tokenizer. A path; or "clip"; or None: the vocab.tiktoken beside the shards, else
    clip."""
    if vocab is None:
        beside = [Path(s).parent / "vocab.tiktoken" for s in shards[:1]]
        vocab = beside[0] if beside and beside[0].is_file() else "clip"
    if str(vocab) != "clip":
        return Tokenizer.from_file(vocab, context_length)
    spec = importlib.util.find_spec("open_clip")  # finds the package without importing it
    if spec and (path := Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").is_file():
        return Tokenizer.from_file(path, context_length)
    try:  # tiktoken's cache, else the download
        content = tiktoken.load.read_file_cached(CLIP_VOCAB_URL, CLIP_VOCAB_SHA256)
    except Exception as error:  # whatever the network raises
        raise InputError(
            f"cannot download CLIP's vocabulary ({type(error).__name__}): get {CLIP_VOCAB_URL} and "
            "name the file with --vocab"
        ) from None
    return Tokenizer(_vocabulary_from_merges(gzip.decompress(content).decode()), context_length)


# -----------------------------------------------------------------------------
# Index: where every sample lies in the shards

IMAGE, TEXT, JSON = 1, 3, 5  # columns of the index: block, then size in the next column
COLUMN = {".jpg": IMAGE, ".jpeg": IMAGE, ".png": IMAGE, ".webp": IMAGE, ".txt": TEXT, ".json": JSON}
INDEX_VERSION = 2  # raised when _read_headers changes: caches are made anew
BLOCK = 512  # a tar is made of blocks of this many bytes: 32 bits count the blocks of a terabyte


def expand(patterns):
    """--train_data -> sorted list of shard paths: paths, folders, globs and braces ({0000..0575} or
    {a,b}), several in a list, or in a string between spaces or commas. Raises InputError."""
    paths = []
    for item in map(str, [patterns] if isinstance(patterns, (str, Path)) else patterns):
        try:  # as a whole first: names may hold spaces and commas
            paths += _match(item)
        except InputError:
            parts = list(filter(None, re.split(r"[,\s]+(?![^{]*})", item)))
            if len(parts) < 2:
                raise
            paths += [path for part in parts for path in _match(part)]
    paths = sorted(dict.fromkeys(paths))
    for path in paths:
        if path.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
            raise InputError(
                f"{path} is compressed, and samples are read out of order: unpack it to a .tar"
            )
    return paths


def _match(pattern):
    """One path, folder, glob or braces -> list of paths. Raises InputError: each brace must match,
    so that a shard that was not downloaded is not left out silently."""
    found = []
    for path in _braces(pattern):
        if Path(path).is_dir():  # *.tar.*: what is compressed gets its own error
            paths = glob.glob(f"{glob.escape(path)}/*.tar") or glob.glob(
                f"{glob.escape(path)}/*.tar.*"
            )
        else:
            paths = [path] if Path(path).is_file() else glob.glob(path)
        if not paths:
            raise InputError(f"no shards match {path}")
        found += paths
    return found


def _braces(pattern):
    """ "a{00..02}.tar" -> a00.tar a01.tar a02.tar; "{x,y}" likewise; without braces, itself."""
    match = re.search(r"{(\d+)\.\.(\d+)}|{([^{}]*,[^{}]*)}", pattern)
    if not match:
        return [pattern]
    first, last, words = match.groups()
    if words is None:
        words = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    else:
        words = words.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for word in words for path in _braces(f"{head}{word}{tail}")]


def _split(name):
    """A member's name -> (key of its sample, extension): the extension starts at the first dot."""
    folder, slash, name = name.rpartition("/")
    stem, dot, extension = name.partition(".")
    return folder + slash + stem if stem else "", dot + extension.lower()


def _read_headers(path):
    """One shard -> (rows of the index as an int32 array (n, 7) with column 0 free, list of (key,
    reason))."""
    samples, bad, size = {}, {}, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # tarfile would keep them all
                key, extension = _split(member.name)
                column = COLUMN.get(extension)
                if column is None or not key or not member.isfile():
                    continue  # folders, links, hidden files, and the other things that shards carry
                row = samples.setdefault(key, [0] * 7)
                if member.offset_data + member.size > size:
                    bad[key] = f"the shard ends inside {member.name}"
                elif row[column]:
                    bad[key] = f"{member.name} is there twice: the first is used"
                elif member.size >= 2**31:
                    bad[key] = f"{member.name} is absurdly large"
                elif member.size:  # one of no bytes is as if it were not there
                    row[column], row[column + 1] = member.offset_data // BLOCK, member.size
            with open(path, "rb") as file:  # tarfile takes a damaged header for the end
                file.seek(tar.offset)
                if any(file.read(BLOCK)):
                    bad[""] = f"a damaged header at byte {tar.offset}: the rest is not read"
    except (tarfile.TarError, OSError) as error:
        if not any("the shard ends" in reason for reason in bad.values()):
            bad[""] = f"{error}: the rest is not read" if samples else f"not a tar: {error}"
    for key in [key for key, row in samples.items() if not row[IMAGE]]:
        del samples[key]
        bad.setdefault(key, "no image, or an empty one")
    # NumPy, not torch: torch sends tensors between processes as open files, and a thousand shards
    # are more files than a process may open
    return np.array(list(samples.values()), dtype=np.int32).reshape(-1, 7), list(bad.items())


def _cache_file(path):
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "superclip"
    return cache / (hashlib.sha1(os.path.abspath(path).encode()).hexdigest() + ".pt")


def _stamp(path):
    stat = os.stat(path)
    return [INDEX_VERSION, stat.st_size, stat.st_mtime_ns]


def _cached(path):
    """What _index_shard wrote for this shard, or None. It holds as long as size and mtime stay."""
    try:
        cached = torch.load(_cache_file(path), weights_only=True)
        if cached["stamp"] == _stamp(path):
            return cached["rows"].numpy(), cached["bad"]
    except Exception:  # not there, or damaged: it is only a cache
        pass
    return None


def _index_shard(path):
    """_read_headers, with the result written to the cache."""
    cache, stamp = _cache_file(path), _stamp(path)
    rows, bad = _read_headers(path)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(f".{os.getpid()}")
        torch.save({"stamp": stamp, "rows": torch.from_numpy(rows), "bad": bad}, temporary)
        os.replace(temporary, cache)
    except (OSError, RuntimeError):  # a cache that cannot be written is no reason to stop
        pass
    return rows, bad


def build_index(shards):
    """list of shard paths -> (int32 tensor (N, 7), list of (shard path, key, reason)).

    A row is shard number, then block and size in bytes of image, text and json; 0 for what is
    missing. 28 bytes a sample in one tensor: worker processes share it, where Python objects would
    be copied.
    """
    results = {shard: _cached(shard) for shard in shards}
    new = [shard for shard in shards if results[shard] is None]
    workers = min(len(new), os.cpu_count() or 1)
    # delay: no bar for what takes less than a second
    bar = dict(
        total=len(new), desc="indexing shards", unit="shard", delay=1, leave=False, disable=None
    )
    if workers <= 1:
        results.update((shard, _index_shard(shard)) for shard in tqdm(new, **bar))
    else:
        with ProcessPoolExecutor(workers) as pool:
            results.update(zip(new, tqdm(pool.map(_index_shard, new), **bar)))
    for number, (rows, _) in enumerate(results.values()):
        rows[:, 0] = number
    bad = [(shard, *entry) for shard, (_, entries) in results.items() for entry in entries]
    return torch.from_numpy(np.concatenate([rows for rows, _ in results.values()])), bad


# -----------------------------------------------------------------------------
# Images

MAX_PIXELS = 100_000_000  # more is taken for a decompression bomb
Image.MAX_IMAGE_PIXELS = None  # Pillow's own check would warn at this size: ours refuses
# What web images are. Pillow knows stranger formats, some of which start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class BadSample(Exception):
    """This sample cannot be used. The message says why."""


def crop_box(width, height, rng=None):
    """The part of an image to look at, as x, y, width, height in pixels.

    Without rng the largest central square. With rng (random.Random) CLIP's one augmentation: a
    random rectangle of 90-100 % of the area; no flip, since captions say "left".
    """
    if rng is not None:
        for _ in range(10):  # as torchvision's RandomResizedCrop draws it
            area = width * height * rng.uniform(0.9, 1.0)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    side = min(width, height)  # also where a long image has no such rectangle
    return (width - side) // 2, (height - side) // 2, side, side


def load_image(image, size, rng=None):
    """Bytes of an image file, or a PIL image -> uint8 tensor (3, size, size), cropped and resized.

    Bicubic with antialiasing. Raises BadSample. Fast for three reasons: a JPEG is decoded at a
    fraction of its size where the crop allows it (`draft`), it stays uint8 to the end, and the
    three values of a pixel stay side by side as the decoder wrote them ("channels last").
    """
    try:
        with warnings.catch_warnings():
            # Pillow's, about odd metadata, and torch's, about read-only arrays
            warnings.simplefilter("ignore")
            own = isinstance(image, bytes)
            image = _open(image) if own else image
            width, height = image.size
            orientation = _orientation(image)
            turned = orientation in (5, 6, 7, 8)  # these lie on their side
            x, y, w, h = crop_box(*((height, width) if turned else (width, height)), rng)
            scale = max(size / w, size / h)
            # JPEG's own scaling halves, and never below what the crop needs. A caller's image is
            # left alone.
            if own and scale <= 0.5:
                image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
            scale = image.width / width  # what draft made of it
            pixels = _upright(_rgb(image), orientation)  # (H, W, 3)
    except BadSample:
        raise
    except Exception as error:  # Pillow raises a dozen kinds, by file format and kind of damage
        raise BadSample(f"the image cannot be decoded: {error}") from None
    x, y, w, h = (round(v * scale) for v in (x, y, w, h))
    # The axis for the batch comes first: after permute(2, 0, 1)[None] torch would not see that this
    # is channels last, and would copy the image to planes and back.
    crop = pixels[None, y : y + h, x : x + w].permute(0, 3, 1, 2)  # (1, 3, h, w)
    return F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]


def _open(content):
    """Bytes of an image file -> PIL image, of which only the header is read. Raises BadSample."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:  # its own message holds an address in memory
        raise BadSample("the image cannot be decoded: no image, or of an unknown format") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"{image.width} x {image.height} pixels: taken for a decompression bomb")
    return image


def _orientation(image):
    """How the camera was held, 1 to 8, from the EXIF data; 1 is upright."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF data is no reason to lose the picture
        return 1


def _rgb(image):
    """PIL image -> uint8 array (H, W, 3), decoded."""
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to 8, not scale them
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode == "P":  # a palette may have transparent colours
        image = image.convert("RGBA")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _upright(pixels, orientation):
    """uint8 array (H, W, 3) -> tensor, mirrored and turned as the EXIF orientation says."""
    pixels = torch.from_numpy(pixels)  # of a read-only array: nothing here writes to it
    if orientation in (2, 4, 5, 7):
        pixels = pixels.flip(1)  # mirrored
    quarter_turns = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)  # counter-clockwise
    return pixels.rot90(quarter_turns, (0, 1)) if quarter_turns else pixels


class Preprocess:
    """PIL image -> uint8 tensor (3, image_size, image_size): the largest central square,
    resized."""

    def __init__(self, image_size):
        self.image_size = image_size

    def __call__(self, image):
        return load_image(image, self.image_size)


# -----------------------------------------------------------------------------
# Samples and their order

MAX_CAPTION = 20_000  # characters; one that is longer would make its whole batch as wide


class Pairs(Dataset):
    """Image-caption pairs in tar shards.

    shards: paths. captions, label_captions: "txt", or "json.FIELD" for a string or a list of
    strings (one is drawn each time). Items are asked for as (draw, sample): the number of the draw
    seeds the crop and the choice of caption, so that they do not depend on which worker does the
    work.
    """

    def __init__(self, shards, tokenizer, image_size, captions="txt", label_captions=None, seed=0):
        self.shards, self.tokenizer = shards, tokenizer
        self.image_size, self.seed = image_size, seed
        self.captions, self.label_captions = captions, label_captions or captions
        self.files = {}  # shard number -> file descriptor, of this process
        self.index, self.bad = build_index(shards)
        named = {(shard, key) for shard, key, _ in self.bad}
        for source in dict.fromkeys((self.captions, self.label_captions)):
            if source != "txt" and not re.fullmatch(r"json\.\w+", source):
                raise InputError(f"captions come from txt or json.FIELD, not from {source!r}")
            column, reason = (
                (TEXT, "no .txt, or an empty one") if source == "txt" else (JSON, "no .json")
            )
            missing = self.index[:, column] == 0
            named_rows = self.index[missing][:1000]  # beyond a thousand they are only counted
            for row in named_rows.tolist():
                if (self.shards[row[0]], self.key(row)) not in named:
                    self.bad.append((self.shards[row[0]], self.key(row), reason))
            self.bad += [("", "", reason)] * max(0, int(missing.sum()) - 1000)
            self.index = self.index[~missing]
        if not len(self.index):
            reason = f" ({self.bad[0][0]}: {self.bad[0][2]})" if self.bad else ""
            raise InputError(f"no image-caption pairs in {self.shards[0]} and its like{reason}")

    def __len__(self):
        return len(self.index)

    def __getstate__(self):
        return {**self.__dict__, "files": {}}  # where workers are not forked, they open their own

    def _pread(self, shard, block, size):
        if shard not in self.files:
            if len(self.files) > 500:  # processes may open about a thousand files
                os.close(self.files.pop(next(iter(self.files))))
            self.files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return os.pread(self.files[shard], size, block * BLOCK)

    def read(self, row, column):
        """The bytes of one member: its image, text or json."""
        content = self._pread(row[0], row[column], row[column + 1])
        if len(content) < row[column + 1]:
            raise BadSample("the shard has become shorter than its index says")
        return content

    def key(self, row):
        """The sample's name. It is not kept in memory but in the tar header that stands before its
        image: a block, or three where the name is long or not ASCII."""
        for blocks in (3, 1):
            try:
                header = io.BytesIO(self._pread(row[0], row[IMAGE] - blocks, blocks * BLOCK))
                member = tarfile.open(fileobj=header).next()
                if member.offset_data == blocks * BLOCK:  # it is the image's
                    return _split(member.name)[0]
            except (tarfile.TarError, OSError, AttributeError):
                pass
        return "?"

    def texts(self, row, source):
        """All captions of a sample as a list of strings. Raises BadSample."""
        try:
            if source == "txt":
                texts = self.read(row, TEXT).decode()
            else:
                texts = json.loads(self.read(row, JSON)).get(source[5:])
        except UnicodeDecodeError:
            raise BadSample("the caption is not UTF-8") from None
        except (ValueError, AttributeError, RecursionError):
            raise BadSample("the .json is none") from None
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise BadSample(f"{source} is neither a string nor a list of strings")
        texts = [t for t in texts if t.strip()]
        if not texts:
            raise BadSample("the caption is empty")
        if max(map(len, texts)) > MAX_CAPTION:
            raise BadSample(
                f"a caption of {max(map(len, texts)):,} characters: taken for something else"
            )
        return texts

    def __getitem__(self, item):
        """(draw, sample) -> (image, ids of the caption, ids of the label caption, samples found
        bad).

        A bad sample is replaced by the one after it, which keeps batches equal in size everywhere.
        """
        draw, sample = item
        rng = random.Random(self.seed << 40 | draw)
        bad = []
        while len(bad) < 100:
            row = self.index[sample].tolist()
            try:
                caption = rng.choice(self.texts(row, self.captions))
                label = caption
                if self.label_captions != self.captions:
                    label = rng.choice(self.texts(row, self.label_captions))
                image = load_image(self.read(row, IMAGE), self.image_size, rng)
                ids = self.tokenizer.encode(caption)
                return image, ids, ids if label is caption else self.tokenizer.encode(label), bad
            except (BadSample, OSError) as error:
                bad.append((sample, self.shards[row[0]], self.key(row), str(error)))
                sample = (sample + 1) % len(self)
        raise InputError(f"a hundred bad samples in a row, the last in {bad[-1][1]}: {bad[-1][3]}")

    def collate(self, samples):
        """list of B items -> dict of images (B, 3, S, S) uint8, tokens (B, T), label_tokens (B,
        T'), bad."""
        images, captions, labels, bad = zip(*samples)
        context = self.tokenizer.context_length
        rows = self.tokenizer.rows
        # default_collate stacks like torch.stack, and in a worker straight into shared memory
        images = default_collate([image.permute(1, 2, 0) for image in images])  # (B, S, S, 3)
        return {
            "images": images.permute(0, 3, 1, 2),  # channels last, which convolutions like
            "tokens": rows(captions, min(context, round_up(captions))),
            "label_tokens": rows(labels, round_up(labels)),  # whole, also beyond the context
            "bad": [entry for entries in bad for entry in entries],
        }


def round_up(ids):
    """The longest of the lists of ids, with start and end, rounded up to a multiple of 16: few
    lengths, so that a compiled model is compiled few times; and what is trimmed off costs no
    attention."""
    return 16 * math.ceil((max(map(len, ids)) + 2) / 16)


@lru_cache(maxsize=2)
def _epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_indices(n, batch_size, seed, step):
    """The samples of a step's global batch: a pure function, so that any step can be where a run
    starts.

    Every epoch is another permutation of the n samples, cut into n // batch_size batches; the rest
    of it is left out. Returns a list of batch_size pairs (draw, sample); draws are numbered through
    the run.
    """
    epoch, batch = divmod(step, n // batch_size)
    order = _epoch_order(n, seed, epoch)[batch * batch_size : (batch + 1) * batch_size]
    return list(enumerate(order.tolist(), start=step * batch_size))


class Batches:
    """The batch_sampler of one process: its slice of each global batch from step `start` to
    `stop`."""

    def __init__(self, n, batch_size, seed, start, stop, rank=0, world=1):
        if n < batch_size:
            raise InputError(f"--batch_size {batch_size} is more than the {n:,} samples there are")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.steps, self.rank, self.local = range(start, stop), rank, batch_size // world

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        for step in self.steps:
            batch = batch_indices(self.n, self.batch_size, self.seed, step)
            yield batch[self.rank * self.local : (self.rank + 1) * self.local]


def _outlive_signals(_):
    # Ctrl-C, and a scheduler's SIGTERM to all processes, are for the main process to answer: it
    # needs its workers until it has saved. After half a minute nobody does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def worker_settings(workers):
    """The arguments of a DataLoader that concern its processes."""
    # Forked workers share the index without a copy; Python 3.14 would start them otherwise.
    context = "fork" if workers and sys.platform == "linux" else None
    return {
        "num_workers": workers,
        "worker_init_fn": _outlive_signals,
        "multiprocessing_context": context,
    }


def loader(dataset, batches, workers, pin_memory=False):
    """A DataLoader over `batches` (lists of what dataset.__getitem__ takes)."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        **worker_settings(workers),
    )


# -----------------------------------------------------------------------------
# Commands


def make_vocabulary(shards, size, captions="txt"):
    """The `size` most frequent words of the shards' captions -> the text of a .tiktoken file."""
    if size < 514:
        raise InputError(f"--size {size} has no room: bytes and special tokens alone are 514")
    pairs = Pairs(shards, None, 0, captions)
    counts = Counter()
    for row in tqdm(
        pairs.index.tolist(),
        desc="counting words",
        unit="sample",
        delay=1,
        leave=False,
        disable=None,
    ):
        try:
            for text in pairs.texts(row, captions):
                counts.update(WORD.findall(clean(text)))
        except BadSample:  # training will name it
            pass
    # single bytes are in every vocabulary
    long = [word for word, _ in counts.most_common() if len(word.encode()) > 1]
    return vocabulary_from_words(long[: size - 514])


def cli(main, argv=None):
    """Run a command: a mistake of the user is one sentence and exit code 2, not a trace."""
    try:
        sys.exit(main(argv))
    except InputError as error:
        # from a worker process the message comes with the trace before it
        print(f"error: {str(error).rpartition('InputError: ')[2].strip()}", file=sys.stderr)
        sys.exit(2)
    except (FileNotFoundError, PermissionError) as error:  # somewhere to write to, most often
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in ("shapes", "pack", "show"):  # these live in scripts/
        return importlib.import_module(f"scripts.{argv[0]}").main(argv[1:])
    parser = argparse.ArgumentParser(prog="data.py", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "shapes", help="make the built-in data set of coloured shapes", add_help=False
    )
    commands.add_parser(
        "pack", help="make shards from a list of images and captions", add_help=False
    )
    commands.add_parser(
        "show", help="look at shards: samples, tokens, what is dropped, a picture", add_help=False
    )
    vocab = commands.add_parser("vocab", help="make a word vocabulary from the shards' captions")
    vocab.add_argument("shards", nargs="+", help="tar files, folders, globs or braces")
    vocab.add_argument(
        "--size", type=int, default=10_000, help="entries, 514 of them bytes and specials"
    )
    vocab.add_argument("--captions", default="txt", help="txt, or json.FIELD")
    vocab.add_argument("--out", default="vocab.tiktoken", help="file to write")
    args = parser.parse_args(argv)
    text = make_vocabulary(expand(args.shards), args.size, args.captions)
    Path(args.out).write_text(text)
    print(f"{args.out}: {len(text.splitlines()) + 2:,} entries")


if __name__ == "__main__":
    cli(main)
