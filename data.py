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
import errno
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
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from itertools import islice, takewhile
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
WORD = regex.compile(rf"{START}|{END}|{ALONE}\p{{M}}*|{PART}(?:[-']{PART})*|{OTHER}")
QUOTES = str.maketrans("‘’‚‛ʼ“”„‟", "'''''\"\"\"\"")
CONTROL = regex.compile("[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
# Letters of full and half width, and ligatures
WIDE = "[\u0132\u0133\u01c4-\u01cc\u01f1-\u01f3\u3000\ufb00-\ufb04\ufb06\uff01-\uffef]+"


def clean(text):
    """A caption as CLIP's tokenizer sees it: HTML entities decoded, quotes straightened, letters
    composed (NFC), of normal width and in lower case.

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
    # The file writes each byte as a printable character, and the end of a word as </w>. CLIP uses
    # no more merges than fill up its vocabulary.
    byte_of = dict(zip(map(chr, [*BYTES[:188], *range(256, 324)]), BYTES)) | {" ": 32}
    merges = text.replace(" ", "").replace("</w>", " ").split("\n")[1 : 49152 - 256 - 2 + 1]
    return tiktoken_text(BYTE_TOKENS + [bytes(byte_of[c] for c in merge) for merge in merges])


def clip_vocabulary():
    """The text of a .tiktoken file of CLIP's vocabulary: from an installed open_clip_torch, from
    tiktoken's cache, or by download."""
    spec = importlib.util.find_spec("open_clip")  # finds the package without importing it
    with suppress(Exception):  # whatever the network raises
        if spec:
            content = Path(spec.origin).with_name(CLIP_VOCAB_URL.rpartition("/")[2]).read_bytes()
        else:
            content = tiktoken.load.read_file_cached(CLIP_VOCAB_URL, CLIP_VOCAB_SHA256)
        return merges_to_tiktoken(gzip.decompress(content).decode())
    raise InputError(f"cannot download {CLIP_VOCAB_URL}: install open_clip_torch, or give --vocab")


def vocabulary_beside(shards):
    """The default of --vocab: vocab.tiktoken beside the shards if it is there, else clip."""
    path = Path(shards[0]).with_name("vocab.tiktoken")
    return path if path.is_file() else "clip"


class Tokenizer:
    """Byte-pair encoding on tiktoken. With CLIP's vocabulary its ids are open_clip's.

    The trick is to write CLIP's end-of-word mark as a trailing space byte. Then CLIP's ids are
    tiktoken's ranks, and a word that the vocabulary has as a whole becomes one token. A vocabulary
    of whole words is one in which every token of several bytes ends in that space.
    """

    def __init__(self, vocab, context_length=77):
        """vocab: the text of a .tiktoken file; context_length: tokens of a caption in __call__."""
        self.vocab, self.context_length = vocab, context_length
        ranks = {}
        with suppress(ValueError):
            lines = [line.split() for line in vocab.splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        whole = sorted(ranks.values()) == [*range(len(ranks))] and {*BYTE_TOKENS[:256]} <= {*ranks}
        check(whole, "a vocabulary has ranks from 0 up, and all 256 single bytes among its tokens")
        self.start, self.end, self.vocab_size = (len(ranks) + i for i in range(3))
        has_parts = any(len(token) > 1 and not token.endswith(b" ") for token in ranks)
        self.pattern = CLIP_WORD if has_parts else WORD
        special = {START: self.start, END: self.end}
        self.encoding = tiktoken.Encoding(
            "superclip", pat_str="[^ ]+ ", mergeable_ranks=ranks, special_tokens=special
        )

    @classmethod
    def from_file(cls, path, context_length=77):
        """path: a .tiktoken file, CLIP's bpe_simple_vocab_16e6.txt.gz, or "clip" to find the latter
        (clip_vocabulary)."""
        if path == "clip":
            return cls(clip_vocabulary(), context_length)
        content = Path(path).read_bytes()
        with suppress(Exception):  # gzip, zlib, UTF-8, merges and base64 have errors of their own
            text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
            is_clip = text.startswith('"bpe_simple_vocab')
            return cls(merges_to_tiktoken(text) if is_clip else text, context_length)
        raise InputError(f"{path} is neither a .tiktoken file nor CLIP's file of merges")

    def encode(self, text):
        """str -> list of ids of any length, without start and end."""
        words = self.pattern.findall(clean(text))
        return self.encoding.encode(" ".join(words) + " ", allowed_special={START, END})

    def decode(self, ids):
        """ids -> str in lower case with a space after each word, without start, end and padding."""
        ids = takewhile(lambda i: i != self.end, map(int, ids))  # padding follows the end
        return self.encoding.decode([i for i in ids if i != self.start]).strip()

    def __call__(self, texts, context_length=None):
        """list of B strings -> LongTensor (B, context_length): start, tokens, end, padding. A text
        that is too long is cut, and still ends with the end token."""
        texts = [texts] if isinstance(texts, str) else texts
        return self.pad(map(self.encode, texts), context_length or self.context_length)

    def pad(self, captions, length):
        """B lists of ids -> LongTensor (B, length): start, ids, end, padding."""
        captions = [[self.start, *ids[: length - 2], self.end] for ids in captions]
        return torch.tensor([c + [PAD] * (length - len(c)) for c in captions]).view(-1, length)


# -----------------------------------------------------------------------------
# Index: where every sample lies in the shards

# Columns of an index row: shard number, then block and size in bytes of image, text and json.
IMAGE, TEXT, JSON = 1, 3, 5
COLUMN = {".jpg": IMAGE, ".jpeg": IMAGE, ".png": IMAGE, ".webp": IMAGE, ".txt": TEXT, ".json": JSON}
BLOCK = 512  # bytes; a tar is made of such blocks, and 32 bits count the blocks of a terabyte
# How the names of shards end. Those after the first are compressed, which rules out random access.
ENDINGS = ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"


def braces(pattern):
    """ "a{00..02}.tar" -> a00.tar a01.tar a02.tar; without braces, the pattern itself."""
    match = regex.fullmatch(r"(.*?){(\d+)\.\.(\d+)}(.*)", pattern)
    if not match or int(match[2]) > int(match[3]):
        return [pattern]
    head, low, high, tail = match.groups()
    numbers = (f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1))
    return [path for number in numbers for path in braces(f"{head}{number}{tail}")]


def expand(patterns):
    """--train_data -> sorted list of shards, from paths, folders, globs and braces. Each number in
    braces must match, so that a missing download is noticed."""
    shards = {}  # real path -> path: a shard that is given twice counts once
    for path in [path for pattern in patterns for path in braces(str(pattern))]:
        found = [path] if Path(path).exists() else glob.glob(path)
        if Path(path).is_dir():  # it may also hold files such as a.tar.part and a.tar.md5
            found = [p for p in glob.glob(f"{glob.escape(path)}/*") if p.endswith(ENDINGS)]
        check(found, f"no shards match {path}")
        for shard in found:
            check(os.path.isfile(shard) and not shard.endswith(ENDINGS[1:]), f"not a .tar: {shard}")
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
                check(member.size >= 0, "a size is negative")  # would make tarfile go in circles
                column = COLUMN.get(extension)
                if column and key and member.isfile():
                    row = rows.setdefault(key, [number] + [0] * 6)
                    if row[column]:
                        unused[key] = f"appears twice, the first one is used: {member.name}"
                    elif 0 < member.size < 2**31:
                        row[column : column + 2] = member.offset_data // BLOCK, member.size
                elif not member.isdir():  # metadata, links, a.b.jpg
                    others[extension] = others.get(extension, 0) + 1
            # tarfile stops silently at a damaged header, and at the end of an archive although
            # another one may follow.
            tar.fileobj.seek(tar.offset)
            if any(chunk.strip(b"\0") for chunk in iter(partial(tar.fileobj.read, 2**20), b"")):
                size = tar.fileobj.seek(0, os.SEEK_END) - tar.offset
                unused[""] = f"the archive ends, or is damaged: {size:,} bytes are not used"
    except Exception as error:  # for damaged headers tarfile has half a dozen kinds
        unused[""] = f"{str(error) or type(error).__name__}; the rest is not read"
    unused |= {f"*{e}": f"a link or another kind: {n:,} files" for e, n in others.items()}
    without = {key: "no image, or an empty one" for key, row in rows.items() if not row[IMAGE]}
    # A NumPy array: torch would send it to the main process as an open file, and there may be more
    # shards than a process may open files.
    rows = np.array([row for row in rows.values() if row[IMAGE]], dtype=np.int32).reshape(-1, 7)
    return rows, list((without | unused).items())


def build_index(shards):
    """list of shards -> (int32 tensor (N, 7), list of (shard, key, reason) of what is not used).

    The index takes 28 bytes a sample, in one tensor that all loading processes share, where Python
    objects would be copied to each of them. It is cached until the size or mtime of a shard
    changes.
    """
    name = hashlib.sha1(os.fsencode("\n".join(map(os.path.abspath, shards)))).hexdigest()
    # Count up when read_headers changes, so that old caches are ignored.
    path = cache_folder() / f"index-6-{name}"
    stamp = [(s.st_size, s.st_mtime_ns) for s in map(os.stat, shards)]
    with suppress(Exception):  # there is no cache, or a damaged one
        cached_stamp, index, unused = torch.load(path, weights_only=True)
        if cached_stamp == stamp:
            return index, unused
    try:
        with ProcessPoolExecutor(min(len(shards), os.cpu_count() or 1)) as pool:
            results = pool.map(read_headers, shards, range(len(shards)))
            results = list(progress(results, "indexing shards", len(shards), unit="shard"))
    except BrokenExecutor:
        raise InputError("a process that read the shards was killed: is memory short?") from None
    index = torch.from_numpy(np.concatenate([rows for rows, _ in results]))
    unused = [(shard, *entry) for shard, (_, entries) in zip(shards, results) for entry in entries]
    with suppress(OSError, RuntimeError):  # a cache that cannot be written is no reason to stop
        write_file(path, lambda file: torch.save((stamp, index, unused), file))
    return index, unused


def add_member(tar, name, content):
    """Add bytes as a member of a tar that is open for writing."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


# -----------------------------------------------------------------------------
# Images

Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow refuses twice as many: decompression bombs
# The formats of web images. Pillow knows stranger ones, and some of them start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# How the names of such files end, for all commands
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Pillow warns of odd metadata, and torch of a read-only array, to which nobody writes.
warnings.filterwarnings("ignore", module="PIL|data$")


class BadSample(Exception):
    """This sample cannot be used. The message says why."""


def crop_box(width, height, rng=None, smallest=0.9):
    """The part of an image to look at, as x, y, width, height in pixels.

    Without rng: the largest central square. With rng (a random.Random): CLIP's only augmentation,
    a random rectangle that covers a share of the area from `smallest` to 1. It is not mirrored,
    because captions say "left".
    """
    for _ in range(10 if rng else 0):  # as torchvision's RandomResizedCrop does it
        area = width * height * rng.uniform(smallest, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    side = min(width, height)  # also if the image is too long for such a rectangle
    return (width - side) // 2, (height - side) // 2, side, side


def upright_rgb(image, box=None):
    """PIL image -> the part of it in the box (x0, y0, x1, y1), or all, as an RGB image: turned as
    its EXIF data says, with transparent parts white."""
    # Older versions of Pillow have mode I for PNGs of 16 bits, too.
    if image.mode == "F" or image.mode == "I" and image.format != "PNG":
        raise BadSample(f"32-bit pixels (mode {image.mode}) have no fixed range of brightness")
    image = image.crop(box)
    with suppress(Exception):  # damaged EXIF data is no reason to lose the picture
        if image.getexif().get(0x0112, 1) != 1:  # the tag of the orientation
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to 8 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(source, size, rng=None, crop_area=0.9):
    """Bytes of an image file, or a PIL image -> uint8 tensor (3, size, size), cropped (crop_box)
    and resized, bicubic with antialiasing. Raises BadSample.

    Three things make it fast: a JPEG is decoded at a fraction of its size where the crop allows it
    (`draft`), pixels stay uint8 to the end, and the three values of a pixel stay side by side, as
    the decoder wrote them ("channels last").
    """
    try:
        is_file = isinstance(source, bytes)
        image = Image.open(io.BytesIO(source), formats=FORMATS) if is_file else source
        width, height = image.size
        x, y, w, h = crop_box(width, height, rng, crop_area)
        scale = max(size / w, size / h)
        if is_file and scale <= 0.5:  # draft halves the picture while the crop allows it
            image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
        k = 2 ** round(math.log2(width / image.width))  # 1, 2, 4 or 8; draft rounds the size up
        image = upright_rgb(image, (x / k, y / k, (x + w) / k, (y + h) / k))
    except Exception as error:  # Pillow raises a dozen kinds, some with an address in memory
        raise BadSample(f"the image cannot be decoded: {str(error).partition(' <')[0]}") from None
    # With a batch axis in front, torch sees that this is channels last.
    pixels = torch.from_numpy(np.asarray(image))[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]


# -----------------------------------------------------------------------------
# Samples and their order

MAX_CAPTION = 20_000  # characters; a longer caption would make its whole batch as wide


@lru_cache(max(16, min(500, os.sysconf("SC_OPEN_MAX") // 2)))
def open_shard(path):
    """A shard, open for reading. Up to 500 shards stay open, and at most half as many as a process
    may have open files."""
    try:
        return open(path, "rb")
    except OSError as error:
        # That says nothing about the sample.
        check(error.errno != errno.EMFILE, f"too many open files to open {path}: raise ulimit -n")
        raise


class Pairs(Dataset):
    """Image-caption pairs in tar shards.

    shards: paths. captions, labels: lists of sources, each "txt" or "json.FIELD", where the
    field holds a string or a list of strings. One text is drawn each time; a source that is named
    twice is drawn twice as often. Index it with (visit, sample): `visit` counts the samples of the
    whole run and seeds the crop and the choice of the caption, so that these do not depend on which
    process loads the sample.
    """

    def __init__(
        self, shards, tokenizer, image_size, captions=("txt",), labels=None, seed=0, crop_area=0.9
    ):
        self.shards, self.tokenizer = shards, tokenizer
        self.image_size, self.seed, self.crop_area = image_size, seed, crop_area
        self.captions, self.label_captions = captions, labels or captions
        self.index, self.unused = build_index(shards)
        for source in (*self.captions, *self.label_captions):
            check(regex.fullmatch(r"txt|json\.\w+", source), f"{source!r} is not txt or json.FIELD")
        why = f" ({self.unused[0][0]}: {self.unused[0][2]})" if self.unused else ""
        check(len(self.index), printable(f"no image-caption pairs in {self.shards[0]}{why}"))

    def __len__(self):
        return len(self.index)

    def read(self, row, column):
        """The bytes of one member: IMAGE, TEXT or JSON. Raises BadSample."""
        shard, block, size = self.shards[row[0]], row[column], row[column + 1]
        if size == 0:
            raise BadSample(f"no {'txt' if column == TEXT else 'json'}, or an empty one")
        content = os.pread(open_shard(shard).fileno(), size, block * BLOCK)
        if len(content) < size:
            raise BadSample("the shard ends too early")
        return content

    def key(self, row):
        """The sample's name, read from the tar header before the image to save memory. The header
        may shorten a name that is long or not ASCII."""
        with suppress(tarfile.TarError, BadSample, OSError):  # the shard has changed, or is gone
            header = self.read([row[0], row[IMAGE] - 1, BLOCK], IMAGE)  # one block before the image
            return split_name(tarfile.TarInfo.frombuf(header, "utf-8", "replace").name)[0]
        return "?"

    def texts(self, row, source):
        """All captions that a sample has in a source, a list of strings. Raises BadSample."""
        try:
            texts = self.read(row, TEXT if source == "txt" else JSON).decode("utf-8-sig")
            texts = texts if source == "txt" else json.loads(texts)[source.removeprefix("json.")]
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
                crop = rng if self.crop_area < 1 else None
                image = load_image(self.read(row, IMAGE), self.image_size, crop, self.crop_area)
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
            "tokens": self.tokenizer.pad(captions, length),
            "label_tokens": self.tokenizer.pad(labels, round_up(labels)),  # the whole captions
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


# -----------------------------------------------------------------------------
# Loading: small batches in many processes, joined on the device

SMALL = 64  # pairs that a process loads at a time, so that it soon has something to hand over


def small_batches(n, batch_size, local, micro_batch_size, seed, start, stop):
    """Yield what one process of a run loads from step `start` to `stop`, as lists of (visit,
    sample): its slice `local` of each global batch, in small batches of at most SMALL pairs, none
    of which reaches across a micro-batch."""
    for step in range(start, stop):
        batch = batch_indices(n, batch_size, seed, step)[local]
        for micro_batch in BatchSampler(batch, micro_batch_size, drop_last=False):
            yield from BatchSampler(micro_batch, SMALL, drop_last=False)


def start_worker(_):
    # The main process answers Ctrl-C and SIGTERM, and needs its workers until it has saved. So they
    # ignore the first, and end half a minute after the second.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    # If a batch cannot be put into shared memory, the worker would drop it and the main process
    # would wait for ever. So the worker ends instead, which the main process notices.
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *_: os._exit(1)


def plan_workers(workers=None, ahead=0, batch_bytes=1):
    """-> (number of workers, batches that each of them keeps ready), for a loader that should be
    `ahead` batches of batch_bytes ahead of the training.

    By default there are as many workers as cores that this process may use (in a container or
    under a scheduler, fewer than the machine has), shared among the processes of a run. All the
    batches that are ready on a machine fit into 4 GiB of shared memory.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = 2**32 // processes // batch_bytes  # batches
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(cores // processes, max(1, room // 2))
    return workers, max(2, min(math.ceil(ahead / max(1, workers)), room // max(1, workers)))


def make_loader(dataset, workers=None, ahead=0, batch_bytes=1, **options):
    """Yield the batches of a DataLoader, made by workers (plan_workers). These are forked, so that
    they share the index, which Python 3.14's default would copy."""
    workers, ready = plan_workers(workers, ahead, batch_bytes)
    if workers:
        fork = "fork" if sys.platform == "linux" else None
        options |= {"prefetch_factor": ready, "multiprocessing_context": fork}
    options |= {"num_workers": workers, "worker_init_fn": start_worker}
    try:
        batches = iter(DataLoader(dataset, **options))
        # torch's handler would raise the death of a worker wherever this process happens to be, as
        # in the middle of an update. Without it, the death is noticed when a batch is fetched.
        with suppress(ValueError):  # this is not the main thread
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from batches
    except (RuntimeError, EOFError, ConnectionError) as error:
        text = r"DataLoader worker \(|shared memory|open files|ancdata"
        died = not isinstance(error, RuntimeError) or regex.search(text, str(error))
        check(not died, "a loading process has died: try docker --shm-size, ulimit -n, --workers 0")
        raise


def pad_and_join(captions):
    """list of tokens (B, T), with a T of their own each -> one tensor, padded to the longest."""
    T = max(tokens.shape[1] for tokens in captions)
    return torch.cat([F.pad(x, (0, T - x.shape[1]), value=PAD) for x in captions])


def join(batches):
    """list of small batches -> one batch: images one after the other, captions padded."""
    parts = {name: [batch[name] for batch in batches] for name in batches[0]}
    return {k: (torch.cat if k == "images" else pad_and_join)(part) for k, part in parts.items()}


def load_batches(pairs, batch_size, local, micro_batch_size, start, stop, workers, device):
    """Yield the micro-batches of one process from step `start` to `stop`, each as soon as its small
    batches are there: (dict of images, tokens and label_tokens on the device, number of the bad
    samples that were replaced in it). Each bad sample is named once.

    local: the slice of the global batch that this process loads, a multiple of micro_batch_size.
    A GPU copies and joins on a stream of its own, while it computes the batch before. Images travel
    as uint8.
    """
    order = small_batches(len(pairs), batch_size, local, micro_batch_size, pairs.seed, start, stop)
    micro_batches = len(range(batch_size)[local]) // micro_batch_size  # in a step
    parts, named = math.ceil(micro_batch_size / SMALL), set()  # in a micro-batch; bad samples
    part_bytes = min(SMALL, micro_batch_size) * 3 * pairs.image_size**2
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    options = {"batch_sampler": order, "collate_fn": pairs.collate, "pin_memory": bool(stream)}
    loader = make_loader(pairs, workers, micro_batches * parts, part_bytes, **options)
    for _ in range((stop - start) * micro_batches):
        batch, replaced = [], []
        with torch.cuda.stream(stream):  # which does nothing for None
            for part in islice(loader, parts):
                replaced += map(tuple, part.pop("replaced"))  # pin_memory makes lists of them
                batch.append({k: x.to(device, non_blocking=True) for k, x in part.items()})
            batch = join(batch) if parts > 1 else batch[0]
        for x in batch.values() if stream else ():
            torch.cuda.current_stream(device).wait_stream(stream)
            x.record_stream(torch.cuda.current_stream(device))  # else its memory is reused too soon
        for entry in sorted({*replaced} - named):
            tqdm.write(printable("bad sample: {} {}: {}".format(*entry)), sys.stderr)
        named.update(replaced)
        yield batch, len(replaced)
