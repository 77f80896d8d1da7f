"""The path from tar shards of image-caption pairs to batches, from top to bottom:

    caption --> Tokenizer ------------------------------.
    shards --> index --> Pairs (decode, crop, resize) ---+--> collate --> join --> batch on the GPU
                           ^ batch_indices(seed, step)

A shard is a tar as img2dataset and the hub copies of CC3M, CC12M and DataComp have them. Members of
one sample share their name up to the first dot: .jpg|.jpeg|.png|.webp is the image, .txt the
caption, .json optional metadata. Shards are not streamed: one pass over the tar headers makes an
index, after which any sample is two or three reads away. So the shuffle is global, the length is
exact, batches are equal on every process, and a run can be resumed from one integer, its step.
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
import threading
import unicodedata
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache, partial
from itertools import chain, islice, takewhile
from pathlib import Path

import numpy as np
import regex
import tiktoken.load
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate
from tqdm import tqdm

from cli import InputError, cache_folder, check, printable, write_file
from superclip import PAD

# A progress bar for whatever takes more than a second, on a terminal.
progress = partial(tqdm, delay=1, leave=False, disable=None)

# -----------------------------------------------------------------------------
# Tokenizer

# CLIP's order of the 256 bytes: printable ones first. Their ids are 0-255, and 256-511 are the same
# bytes at the end of a word.
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES += [b for b in range(256) if b not in BYTES]
BYTE_TOKENS = [bytes([b]) for b in BYTES] + [bytes([b]) + b" " for b in BYTES]

CLIP_VOCAB_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
CLIP_VOCAB_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"

START, END = "<start_of_text>", "<end_of_text>"  # the last two ids of every vocabulary
# CLIP splits a caption into English suffixes, letters, single digits, and runs of anything else.
OTHER = r"[^\s\p{L}\p{N}]+"
CLIP_WORD = regex.compile(rf"(?i){START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|{OTHER}")
# In a vocabulary of whole words, a word is letters and digits with inner hyphens and apostrophes,
# as in "t-shirt" and "women's". Scripts without spaces have one word per character.
ALONE = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]"
PART = rf"(?:(?!{ALONE})[\p{{L}}\p{{M}}\p{{N}}])+"
WORD = regex.compile(rf"{ALONE}\p{{M}}*|{PART}(?:[-']{PART})*|{OTHER}")
QUOTES = str.maketrans("‘’‚‛ʼ“”„‟", "'''''\"\"\"\"")
CONTROL = regex.compile("[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
# Letters of full and half width, and ligatures
WIDE = "[\u0132\u0133\u01c4-\u01cc\u01f1-\u01f3\u3000\ufb00-\ufb04\ufb06\uff01-\uffef]+"


def clean(text):
    """Returns a caption as CLIP's tokenizer sees it: HTML entities decoded, quotes straightened,
    letters composed (NFC), of normal width and in lower case.

    This is what open_clip's cleaning does to the captions people write. The library ftfy, which
    open_clip uses, also repairs text that was decoded with the wrong encoding ("cafÃ©"). We leave
    that out, because such a caption costs only a few odd tokens.
    """
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
    words = [word.encode() + b" " for word in words]
    return tiktoken_text(dict.fromkeys(BYTE_TOKENS + words))


def merges_to_tiktoken(text):
    """CLIP's file of BPE merges -> the text of a .tiktoken file of the same vocabulary."""
    # The file writes each byte as a printable character, and the end of a word as </w>.
    characters = map(chr, [*BYTES[:188], *range(256, 324)])
    byte_of = dict(zip(characters, BYTES)) | {" ": 32}
    lines = text.replace(" ", "").replace("</w>", " ").split("\n")
    merges = lines[1:48895]  # as many as fill up CLIP's vocabulary: 49,408 - 512 - 2
    return tiktoken_text(BYTE_TOKENS + [bytes(map(byte_of.get, merge)) for merge in merges])


def clip_vocabulary():
    """Returns the text of a .tiktoken file of CLIP's vocabulary: from an installed open_clip_torch,
    from tiktoken's cache, or by download. Raises InputError."""
    spec = importlib.util.find_spec("open_clip")  # finds the package without importing it
    try:
        if spec and spec.origin:
            content = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
        else:
            content = tiktoken.load.read_file_cached(CLIP_VOCAB_URL, CLIP_VOCAB_SHA256)
        return merges_to_tiktoken(gzip.decompress(content).decode())
    except Exception as error:  # whatever the disk and the network raise
        reason = f"CLIP's vocabulary can neither be read nor downloaded ({error})"
        raise InputError(f"{reason}: install open_clip_torch, or give --vocab") from error


def read_ranks(vocab):
    """The text of a .tiktoken file -> dict of token (bytes) -> rank. Raises InputError."""
    try:
        lines = [line.split() for line in vocab.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise InputError("lines of a vocabulary are tokens in base64 and ranks") from error
    check(sorted(ranks.values()) == [*range(len(ranks))], "tokens do not have ranks from 0 up")
    check(ranks.keys() >= {*BYTE_TOKENS[:256]}, "tokens do not include each single byte")
    return ranks


class Tokenizer:
    """Byte-pair encoding on tiktoken. With CLIP's vocabulary its ids are open_clip's.

    The trick is to write CLIP's end-of-word mark as a trailing space byte. Then CLIP's ids are
    tiktoken's ranks, and a word that the vocabulary has as a whole becomes one token. A vocabulary
    of whole words is one in which every token of several bytes ends in that space, and every byte
    has a token with it. It spells an unknown word in bytes.
    """

    def __init__(self, vocab, context_length=77):
        """vocab: the text of a .tiktoken file; context_length: tokens of a caption in __call__."""
        self.vocab = vocab
        self.context_length = context_length
        self.ranks = read_ranks(vocab)
        self.start = len(self.ranks)
        self.end = self.start + 1
        self.vocab_size = self.start + 2
        self.encoding = tiktoken.Encoding(
            "superclip",
            pat_str="[^ ]+ ",
            mergeable_ranks=self.ranks,
            special_tokens={START: self.start, END: self.end},
        )
        parts = [token for token in self.ranks if len(token) > 1 and not token.endswith(b" ")]
        has_all_bytes = self.ranks.keys() >= {*BYTE_TOKENS}
        self.pattern = WORD if has_all_bytes and not parts else CLIP_WORD

    @classmethod
    def from_file(cls, path, context_length=77):
        """path: a .tiktoken file, CLIP's bpe_simple_vocab_16e6.txt.gz, or "clip" to find the latter
        (clip_vocabulary). Raises InputError."""
        if path == "clip":
            return cls(clip_vocabulary(), context_length)
        content = Path(path).read_bytes()
        try:
            if content.startswith(b"\x1f\x8b"):
                content = gzip.decompress(content)
            text = content.decode()
            if text.startswith('"bpe_simple_vocab'):
                text = merges_to_tiktoken(text)
            return cls(text, context_length)
        except Exception as error:  # gzip, zlib, UTF-8, merges and base64 have errors of their own
            raise InputError(f"{path} is neither a .tiktoken file nor CLIP's: {error}") from error

    def encode(self, text):
        """str -> list of ids of any length, without start and end."""
        words = self.pattern.findall(clean(text))
        if self.pattern is CLIP_WORD:
            return self.encoding.encode(" ".join(words) + " ", allowed_special={START, END})
        # tiktoken would merge an unknown word where it ends in a known one: "pumpkin" would have
        # the token of "in", and the head would learn to see "in". Here it is spelled in bytes.
        ids = []
        for word in words:
            token = word.encode() + b" "
            if token in self.ranks:
                ids.append(self.ranks[token])
            else:
                ids += [self.ranks[bytes([byte])] for byte in token[:-2]]
                ids.append(self.ranks[token[-2:]])  # the last byte has the space
        return ids

    def decode(self, ids):
        """ids -> str in lower case with a space after each word, without start, end and padding."""
        ids = takewhile(lambda i: i != self.end, map(int, ids))  # padding follows the end
        return self.encoding.decode([i for i in ids if i != self.start]).strip()

    def __call__(self, texts, context_length=None):
        """list of B strings -> LongTensor (B, context_length): start, tokens, end, padding. A text
        that is too long is cut, and still ends with the end token."""
        if isinstance(texts, str):
            texts = [texts]
        return self.pad(map(self.encode, texts), context_length or self.context_length)

    def pad(self, captions, length):
        """B lists of ids -> LongTensor (B, length): start, ids, end, padding."""
        rows = [[self.start, *ids[: length - 2], self.end] for ids in captions]
        rows = [row + [PAD] * (length - len(row)) for row in rows]
        return torch.tensor(rows).view(-1, length)


def tokenizer_for(shards, vocab=None):
    """Returns the tokenizer of --vocab, a file or "clip". By default it is vocab.tiktoken beside
    the shards if that is there, else CLIP's."""
    default = Path(shards[0]).with_name("vocab.tiktoken")
    if vocab is None:
        vocab = default if default.is_file() else "clip"
    return Tokenizer.from_file(vocab)


def trim(tokens):
    """(B, T) -> the columns up to the last end token, which has the largest id. Tokens that follow
    it change nothing, because attention is causal."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1]


# -----------------------------------------------------------------------------
# Processes


def cores():
    """Returns the number of cores that this process may use. In a container or under a scheduler
    they may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def end_with_parent():
    """Makes this process end when the one that has started it does, even if that is killed. Left
    alone, it would wait for work for ever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def process_pool(tasks):
    """A pool of processes for so many tasks, for a `with` statement. Raises InputError if one of
    the processes is killed."""
    try:
        with ProcessPoolExecutor(min(tasks, cores()), initializer=end_with_parent) as pool:
            yield pool
    except BrokenExecutor:
        raise InputError("a process of the pool was killed: is memory short?") from None


# -----------------------------------------------------------------------------
# Shards


# How the names of shards end. Those after the first are compressed, which rules out random access.
ENDINGS = ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"


def braces(pattern):
    """Yields a00.tar, a01.tar, a02.tar for "a{00..02}.tar", and a pattern without braces itself."""
    match = regex.search(r"{(\d{1,18})\.\.(\d{1,18})}", pattern)
    if not match:
        yield pattern
        return
    low, high = match.groups()
    numbers = range(int(low), int(high) + 1)
    check(numbers, f"there are no numbers in {match[0]}")
    for i in numbers:
        yield from braces(pattern.replace(match[0], f"{i:0{len(low)}d}", 1))


def shards_at(path):
    """Returns the shards that a path, a folder or a glob names, as a list. Raises InputError."""
    if Path(path).is_dir():  # it may also hold files such as a.tar.part and a.tar.md5
        found = [p for p in glob.glob(f"{glob.escape(path)}/*") if p.endswith(ENDINGS)]
    elif Path(path).exists():
        found = [path]
    else:
        found = glob.glob(path)
    check(found, f"no shards match {path}")
    return found


def expand(patterns):
    """--train_data -> sorted list of shards, from paths, folders, globs and braces. Each number in
    braces must match, so that a missing download is noticed."""
    shards = {}  # real path -> path: a shard that is given twice counts once
    for pattern in patterns:
        for path in braces(str(pattern)):
            for shard in shards_at(path):
                check(os.path.isfile(shard), f"not a file: {shard}")
                check(not shard.endswith(ENDINGS[1:]), f"not an uncompressed .tar: {shard}")
                shards[os.path.realpath(shard)] = shard
    return sorted(shards.values())


def real_paths(paths):
    """Returns the set of the files that these paths lead to."""
    return {os.path.realpath(path) for path in paths}


# What the names of shards say of the side that they are on.
SIDES = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "validation",
}


def side(path):
    """Returns "train" or "validation" if the name of a shard has such a word between hyphens,
    underscores, dots and digits, as cc3m-train-0000.tar has, else None."""
    for word in regex.split(r"[-_.\d]+", Path(path).name.lower()):
        if word in SIDES:
            return SIDES[word]


def split_sides(shards):
    """list of shards -> (training shards, validation shards). Those whose names do not tell are
    training shards. If all are of one side, they are returned as the first list."""
    training = [shard for shard in shards if side(shard) != "validation"]
    validation = [shard for shard in shards if side(shard) == "validation"]
    return (training, validation) if training else (validation, [])


# -----------------------------------------------------------------------------
# Index: where every sample lies in the shards

# Columns of an index row: shard number, then block and size in bytes of image, text and json.
IMAGE, TEXT, JSON = 1, 3, 5
COLUMN = {".jpg": IMAGE, ".jpeg": IMAGE, ".png": IMAGE, ".webp": IMAGE, ".txt": TEXT, ".json": JSON}
BLOCK = 512  # bytes; a tar is made of such blocks, and 32 bits count the blocks of a terabyte


def split_name(name):
    """A member's name -> (key of its sample, extension). The extension starts at the first dot."""
    folder, slash, name = name.rpartition("/")
    stem, dot, extension = name.partition(".")
    return folder + slash + stem if stem else "", dot + extension.lower()


def has_data(file):
    """Is there a byte that is not 0 in the rest of a file?"""
    while chunk := file.read(2**20):
        if chunk.strip(b"\0"):
            return True
    return False


def read_headers(path, number):
    """A shard and its number -> (index rows, an int32 array (n, 7); list of (shard, key, reason) of
    the samples and parts that are not used).

    A damaged shard is used up to the damage. A file that cannot be read raises InputError, because
    what is returned here is cached, and the trouble may pass.
    """
    rows = {}  # key -> index row
    unused = {}  # key -> reason
    try:
        with tarfile.open(path, "r:") as tar:
            end = os.stat(path).st_size
            for member in tar:
                check(member.size >= 0, "a size is negative")  # would make tarfile go in circles
                key, extension = split_name(member.name)
                column = COLUMN.get(extension)
                if column and key and member.isfile():
                    row = rows.setdefault(key, [number, 0, 0, 0, 0, 0, 0])
                    if row[column]:
                        unused[key] = f"appears twice, the first one is used: {member.name}"
                    elif 0 < member.size < 2**31:
                        row[column : column + 2] = member.offset_data // BLOCK, member.size
                elif not member.isdir():  # metadata, links, a.b.jpg
                    unused[f"*{extension}"] = f"a link or another kind: {member.name}"
                check(tar.offset <= end, "the archive ends too early")
            # tarfile stops silently at a damaged header, and at the end of an archive although
            # another one may follow.
            tar.fileobj.seek(tar.offset)
            if has_data(tar.fileobj):
                unused[""] = f"ends early, or is damaged: {end - tar.offset:,} bytes are not used"
    except (OSError, MemoryError) as error:
        raise InputError(f"{path} cannot be read: {error!r}") from error
    except Exception as error:  # for damaged headers tarfile has half a dozen kinds
        unused[""] = f"{str(error) or repr(error)}; the rest is not read"

    without_image = [key for key, row in rows.items() if not row[IMAGE]]
    for key in without_image:
        unused.setdefault(key, "no image, or an empty one")
        del rows[key]
    # A NumPy array: torch would send it to the main process as an open file, and there may be more
    # shards than a process may open files.
    index = np.array([*rows.values()], dtype=np.int32).reshape(-1, 7)
    return index, [(path, key, reason) for key, reason in unused.items()]


def build_index(shards):
    """list of shards -> (int32 tensor (N, 7), list of (shard, key, reason) of what is not used).

    The index takes 28 bytes a sample, in one tensor that all loading processes share, where Python
    objects would be copied to each of them. It is cached until the size or mtime of a shard
    changes.
    """
    name = hashlib.sha1(os.fsencode("\n".join(map(os.path.abspath, shards)))).hexdigest()
    # Count up when read_headers changes, so that old caches are ignored.
    path = cache_folder() / f"index-7-{name}"
    stamp = [(s.st_size, s.st_mtime_ns) for s in map(os.stat, shards)]
    with suppress(Exception):  # there is no cache, or a damaged one
        cached_stamp, index, unused = torch.load(path, weights_only=True)
        if cached_stamp == stamp:
            return index, unused

    with process_pool(len(shards)) as pool:
        results = pool.map(read_headers, shards, range(len(shards)))
        rows, unused = zip(*progress(results, "indexing shards", len(shards), unit="shard"))
    index = torch.from_numpy(np.concatenate(rows))
    unused = list(chain.from_iterable(unused))
    # A cache that cannot be written is no reason to stop. Two commands may write it at once, since
    # each writes a file of its own and renames it.
    with suppress(OSError, RuntimeError):
        write_file(path, lambda file: torch.save((stamp, index, unused), file))
    return index, unused


def add_member(tar, name, content):
    """Adds bytes as a member of a tar that is open for writing."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


# -----------------------------------------------------------------------------
# Samples: what shards hold, at random access


MAX_CAPTION = 20_000  # characters; a longer caption would make its whole batch as wide
# Shards that stay open: at most half as many as a process may have open files.
OPEN_SHARDS = max(16, min(500, os.sysconf("SC_OPEN_MAX") // 2))


class BadSample(Exception):
    """This sample cannot be used. The message says why."""


@lru_cache(OPEN_SHARDS)
def open_shard(path):
    """A shard, open for reading."""
    return open(path, "rb")


def check_sources(sources):
    """Sources of captions are txt or json.FIELD. Raises InputError."""
    for source in sources:
        check(regex.fullmatch(r"txt|json\.\w+", source), f"{source!r} is not txt or json.FIELD")


class Shards:
    """The samples in tar shards.

    index: int32 tensor (N, 7), a row for each sample, in which IMAGE, TEXT and JSON name columns.
    unused: list of (shard, key, reason) of what is not used. Raises InputError if no sample is
    left. Methods take a row as a list.
    """

    def __init__(self, shards):
        self.shards = shards
        self.index, self.unused = build_index(shards)
        if len(self.index) == 0:
            reason = self.unused[0][2] if self.unused else "it is empty"
            raise InputError(f"no image-caption pairs in {shards[0]}: {reason}")

    def __len__(self):
        return len(self.index)

    def read_at(self, number, block, size):
        """Returns `size` bytes of a shard from a block on. Raises BadSample."""
        file = open_shard(self.shards[number])
        content = os.pread(file.fileno(), size, block * BLOCK)
        if len(content) < size:
            raise BadSample("the shard ends too early")
        return content

    def read(self, row, column):
        """Returns the bytes of one member: IMAGE, TEXT or JSON. Raises BadSample."""
        block, size = row[column], row[column + 1]
        if size == 0:
            raise BadSample("it has no such member, or an empty one")
        return self.read_at(row[0], block, size)

    def key(self, row):
        """Returns the sample's name, or "?" if the shard has changed or is gone. It is read from
        the tar header, which is the block before the image, to save memory. The header may shorten
        a name that is long or not ASCII."""
        try:
            header = self.read_at(row[0], row[IMAGE] - 1, BLOCK)
            name = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
        except (tarfile.TarError, BadSample, OSError):
            return "?"
        return split_name(name)[0]

    def texts(self, row, source):
        """Returns all texts that a sample has in a source, txt or json.FIELD, as a list of strings.
        A field holds a string or a list of strings. Raises BadSample."""
        try:
            if source == "txt":
                value = self.read(row, TEXT).decode("utf-8-sig")
            else:
                value = json.loads(self.read(row, JSON))[source.removeprefix("json.")]
            texts = value if isinstance(value, list) else [value]
            # JSON may hold half of a surrogate pair, which cannot be printed or written.
            texts = [text.encode("utf-8", "replace").decode() for text in texts if text.strip()]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise BadSample(f"{source} is missing, or is not UTF-8 text or a list of it") from None
        if not texts or max(map(len, texts)) > MAX_CAPTION:
            raise BadSample(f"the caption is empty, or longer than {MAX_CAPTION:,} characters")
        return texts

    def all_texts(self, row, sources):
        """Returns all texts of several sources, each source once. Raises BadSample."""
        texts = []
        for source in dict.fromkeys(sources):
            texts += self.texts(row, source)
        return texts


# -----------------------------------------------------------------------------
# Images

Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow refuses twice as many: decompression bombs
# The formats of web images. Pillow knows stranger ones, and some of them start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# How the names of such files end, for all commands
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Pillow warns of odd metadata, and torch of a read-only array, to which nobody writes.
warnings.filterwarnings("ignore", module="PIL|data$")


def crop_box(width, height, rng=None, crop_area=1.0):
    """Returns the part of an image to look at, as x, y, width, height in pixels.

    With a crop_area of 1 that is the largest central square. Otherwise it is CLIP's only
    augmentation, a random rectangle that covers a share of the area from crop_area to 1. It is not
    mirrored, because captions say "left".
    """
    w = h = min(width, height)
    if crop_area < 1:
        # As torchvision's RandomResizedCrop does it, but with random numbers of our own, so that a
        # crop depends on nothing but the seed and the visit.
        for _ in range(10):
            area = width * height * rng.uniform(crop_area, 1.0)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w = round(math.sqrt(area * ratio))
            h = round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, width - w), rng.randint(0, height - h), w, h
        # The image is too long for such a rectangle. As much of its centre as fits into 4:3:
        w = min(width, round(height * 4 / 3))
        h = min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def upright_rgb(image, box=None):
    """PIL image -> the part of it in the box (x0, y0, x1, y1), or all, as an RGB image: turned as
    its EXIF data says, with transparent parts white."""
    # Older versions of Pillow have mode I for PNGs of 16 bits, too.
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise BadSample(f"32-bit pixels (mode {image.mode}) have no fixed range of brightness")
    image = image.crop(box)
    with suppress(Exception):  # damaged EXIF data is no reason to lose the picture
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to 8 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(source, size, rng=None, crop_area=1.0):
    """Bytes of an image file, or a PIL image -> uint8 tensor (3, size, size), cropped (crop_box)
    and resized, bicubic with antialiasing. Raises BadSample.

    Three things make it fast: a JPEG is decoded at a fraction of its size where the crop allows it
    (`draft`), pixels stay uint8 to the end, and the three values of a pixel stay side by side, as
    the decoder wrote them ("channels last").
    """
    try:
        image = source
        if isinstance(source, bytes):
            image = Image.open(io.BytesIO(source), formats=FORMATS)
        if image.format == "TIFF":
            image.load()  # older versions of Pillow turn it here, which may change its size
        width, height = image.size
        x, y, w, h = crop_box(width, height, rng, crop_area)
        scale = max(size / w, size / h)
        if isinstance(source, bytes) and scale <= 0.5:  # draft halves it while the crop allows it
            image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
        k = 2 ** round(math.log2(width / image.width))  # 1, 2, 4 or 8; draft rounds the size up
        image = upright_rgb(image, (x / k, y / k, (x + w) / k, (y + h) / k))
    except Exception as error:  # Pillow raises a dozen kinds, some with an address in memory
        raise BadSample(f"the image cannot be decoded: {str(error).partition(' <')[0]}") from None
    # With a batch axis in front, torch sees that this is channels last. torchvision's resize gives
    # the same bits, but with its pil_to_tensor an image of 256 to 512 pixels takes 7 to 9 % longer.
    pixels = torch.from_numpy(np.asarray(image))[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]


# -----------------------------------------------------------------------------
# Pairs and their order


def rng_of_visit(seed, visit):
    """Returns the generator of one visit, the number of a pair among all that a run draws. It
    chooses the pair's captions and its crop."""
    return random.Random(seed << 40 | visit)


class Pairs(Shards, Dataset):
    """Image-caption pairs in tar shards.

    shards: paths. captions, labels: lists of sources, each txt or json.FIELD. One text is drawn
    each time; a source that is named twice is drawn twice as often. Index it with (visit, sample):
    `visit` counts the samples of the whole run and seeds the crop and the choice of the caption, so
    that these do not depend on which process loads the sample.
    """

    def __init__(
        self, shards, tokenizer, image_size, captions=("txt",), labels=None, seed=0, crop_area=0.9
    ):
        super().__init__(shards)
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.captions = captions
        self.label_captions = labels or captions
        self.seed = seed
        self.crop_area = crop_area
        check_sources([*self.captions, *self.label_captions])

    @cached_property  # because a checkpoint must be written even if the shards have gone meanwhile
    def fingerprint(self):
        """A short text that changes when the shards or the sources of captions do, or the captions
        of one of 64 samples at even distances."""
        content = hashlib.sha1(self.index.numpy().tobytes() + str(self.captions).encode())
        for texts in self.texts_of_some(64):
            content.update(str(texts).encode())
        return content.hexdigest()[:12]

    def texts_of_some(self, n):
        """Yields the captions of at most n samples at even distances, a list for each. Bad ones are
        left out, because training will name them."""
        for row in self.index[:: math.ceil(len(self) / n)].tolist():
            with suppress(BadSample):
                yield self.all_texts(row, self.captions)

    def draw(self, row, rng):
        """A row of the index -> (image, ids of the caption, ids of the label caption). Raises
        BadSample."""
        caption = rng.choice(self.texts(row, rng.choice(self.captions)))
        ids = self.tokenizer.encode(caption)
        label_ids = ids
        if self.label_captions != self.captions:
            label = rng.choice(self.texts(row, rng.choice(self.label_captions)))
            label_ids = self.tokenizer.encode(label)
        image = load_image(self.read(row, IMAGE), self.image_size, rng, self.crop_area)
        return image, ids, label_ids

    def __getitem__(self, item):
        """(visit, sample) -> (image, ids of the caption, ids of the label caption, replaced).

        Another sample, at random, replaces a bad one, so that batches have the same size on every
        process; replaced is a list of texts, which name the bad ones and say what is wrong."""
        visit, sample = item
        rng = rng_of_visit(self.seed, visit)
        replaced = []
        while len(replaced) < 100:
            row = self.index[sample].tolist()
            try:
                image, ids, label_ids = self.draw(row, rng)
                return image, ids, label_ids, replaced
            except (BadSample, OSError) as error:
                replaced.append(f"{self.shards[row[0]]} {self.key(row)}: {error}")
                sample = rng.randrange(len(self))
        raise InputError(f"a hundred bad samples in a row, the last one in {replaced[-1]}")

    def collate(self, items):
        """list of B items -> dict of images (B, 3, S, S) uint8, tokens (B, T), label_tokens (B,
        T'), replaced."""
        images, captions, labels, replaced = zip(*items)
        # default_collate stacks like torch.stack, and in a worker straight into shared memory
        images = default_collate([image.permute(1, 2, 0) for image in images])  # (B, S, S, 3)
        length = min(self.tokenizer.context_length, round_up(captions))
        return {
            "images": images.permute(0, 3, 1, 2),  # channels last, which convolutions like
            "tokens": self.tokenizer.pad(captions, length),
            "label_tokens": self.tokenizer.pad(labels, round_up(labels)),  # the whole captions
            "replaced": list(chain.from_iterable(replaced)),
        }


def round_up(captions):
    """Returns the length of the longest of these lists of ids, with start and end, as a multiple of
    16. Few distinct lengths mean few recompilations, and trimmed padding costs nothing."""
    return 16 * math.ceil((max(map(len, captions)) + 2) / 16)


def hold_out(pairs, val_pairs):
    """Moves every hundredth pair, but at most a thousand, from training to validation. Both are of
    the same shards."""
    held_out = torch.arange(len(pairs)) % max(100, math.ceil(len(pairs) / 1000)) == 0
    pairs.index = pairs.index[~held_out]
    val_pairs.index = val_pairs.index[held_out]


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """Returns a random permutation of the n samples."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_indices(n, batch_size, seed, step):
    """Returns the global batch of a step, as a list of batch_size pairs (visit, sample). A pure
    function, so that a run can start at any step.

    Every epoch is another permutation of the n samples, cut into n // batch_size batches. What is
    left over is not used in that epoch.
    """
    epoch, batch = divmod(step, n // batch_size)
    order = epoch_order(n, seed, epoch)[batch * batch_size : (batch + 1) * batch_size]
    return list(enumerate(order.tolist(), start=step * batch_size))


# -----------------------------------------------------------------------------
# Loading: small batches in many processes, joined on the device

SMALL = 64  # pairs that a process loads at a time, so that it soon has something to hand over


def small_batches(n, batch_size, local, micro_batch_size, seed, start, stop):
    """Yields what one process of a run loads from step `start` to `stop`, as lists of (visit,
    sample): its slice `local` of each global batch, in small batches of at most SMALL pairs, none
    of which reaches across a micro-batch."""
    for step in range(start, stop):
        batch = batch_indices(n, batch_size, seed, step)[local]
        # BatchSampler cuts a list into lists.
        for micro_batch in BatchSampler(batch, micro_batch_size, drop_last=False):
            yield from BatchSampler(micro_batch, SMALL, drop_last=False)


def start_worker(_):
    """What a loading process does first."""
    # A scheduler, Ctrl-C or a closed terminal sends its signal to all processes. The main process
    # answers it, and needs the others until it has saved, and perhaps validated. They end with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    # If a batch cannot be put into shared memory, the worker would drop it and the main process
    # would wait for ever. So the worker ends instead, which the main process notices.
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)


def kill_workers():
    """Ends the loading processes that are left. They ignore SIGTERM, by which Python and torch
    would end them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


# How torch says that a loading process has died, or could not hand over its batch
DEATH = regex.compile(r"DataLoader worker \(|shared memory|open files|ancdata")


def make_loader(dataset, workers=None, ahead=0, **options):
    """Yields the batches of a DataLoader, made by so many workers, which keep `ahead` batches
    ready.

    By default there is a worker for each core, shared among the processes of a run. An evaluation
    has no more of them than batches, because each takes a tenth of a second to start. They are
    forked, so that they share the index, which Python 3.14's default would copy.
    """
    if workers is None:
        workers = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = min(workers, math.ceil(len(dataset) / options.get("batch_size", 1)))
    if workers > 0:
        options["prefetch_factor"] = max(2, math.ceil(ahead / workers))
        options["multiprocessing_context"] = "fork" if sys.platform == "linux" else None
    options |= {"num_workers": workers, "worker_init_fn": start_worker}
    # Python runs this before it waits, at the end of the program, for all that it has started.
    multiprocessing.util.Finalize(None, kill_workers, exitpriority=0)
    try:
        batches = iter(DataLoader(dataset, **options))
    except BaseException:  # too many processes or open files: torch would wait long for the others
        kill_workers()
        raise
    # torch's handler would raise the death of a worker wherever this process happens to be, as in
    # the middle of an update. Without it, the death is noticed when a batch is fetched.
    with suppress(ValueError):  # this is not the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    except (RuntimeError, EOFError, ConnectionError) as error:
        if isinstance(error, RuntimeError) and not DEATH.search(str(error)):
            raise
        raise InputError(
            "a loading process has died: try docker --shm-size, ulimit -n, --workers 0"
        ) from error


def pad_and_join(captions):
    """list of tokens (B, T), with a T of their own each -> one tensor, padded to the longest."""
    T = max(tokens.shape[1] for tokens in captions)
    return torch.cat([F.pad(tokens, (0, T - tokens.shape[1]), value=PAD) for tokens in captions])


def join(batches):
    """list of small batches -> one batch: images one after the other, captions padded."""
    return {
        "images": torch.cat([batch["images"] for batch in batches]),
        "tokens": pad_and_join([batch["tokens"] for batch in batches]),
        "label_tokens": pad_and_join([batch["label_tokens"] for batch in batches]),
    }


def load_batches(pairs, batch_size, local, micro_batch_size, start, stop, workers, device):
    """Yields the micro-batches of one process from step `start` to `stop`, each as soon as its
    small batches are there: (dict of images, tokens and label_tokens on the device, number of the
    bad samples that were replaced in it). Each bad sample is named once.

    local: the slice of the global batch that this process loads, a multiple of micro_batch_size.
    A GPU copies and joins on a stream of its own, while it computes the batch before. Images travel
    as uint8.
    """
    B = len(range(batch_size)[local])  # pairs of this process
    per_step = B // micro_batch_size  # micro-batches in a step
    parts = math.ceil(micro_batch_size / SMALL)  # small batches in a micro-batch
    on_gpu = device.type == "cuda"
    stream = torch.cuda.Stream(device) if on_gpu else None
    loader = make_loader(
        pairs,
        workers,
        ahead=per_step * parts,  # a step
        batch_sampler=small_batches(
            len(pairs), batch_size, local, micro_batch_size, pairs.seed, start, stop
        ),
        collate_fn=pairs.collate,
        pin_memory=on_gpu,
    )
    named = set()  # bad samples
    for _ in range((stop - start) * per_step):
        small = []
        replaced = []
        with torch.cuda.stream(stream):  # does nothing for None
            for part in islice(loader, parts):
                replaced += part.pop("replaced")
                # Only pinned memory stays as it is until it has been copied.
                small.append({k: x.to(device, non_blocking=on_gpu) for k, x in part.items()})
            batch = join(small)
        if on_gpu:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(stream)
            for x in batch.values():
                x.record_stream(computing)  # else its memory is reused too soon
        for text in replaced:
            if text not in named:
                tqdm.write(printable(f"bad sample: {text}"), sys.stderr)
        named.update(replaced)
        yield batch, len(replaced)
