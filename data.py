"""The path from tar shards of image-caption pairs to batches, from top to bottom:

    caption --> tokenizer.py ---------------------------.
    shards --> index --> Pairs (decode, crop, resize) ---+--> collate --> batches on the GPU
                           ^ batch_indices(seed, step)

A shard is a tar as img2dataset and the hub copies of CC3M, CC12M and DataComp have them. Members of
one sample share their name up to the first dot: .jpg|.jpeg|.png|.webp is the image, .txt the
caption, .json optional metadata. Shards are not streamed: one pass over the tar headers makes an
index, after which any sample is two or three reads away. So the shuffle is global, the length is
exact, batches are as large on each process, and a run can be resumed from one integer, its step.
"""

import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tarfile
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path

import numpy as np
import regex
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from cli import STOP_SIGNALS, InputError, cache_folder, check, cores, write_file

# A progress bar for whatever takes more than a second, on a terminal. All bars share one line,
# because a notebook cannot step back up from a second one.
progress = partial(tqdm, delay=1, leave=False, disable=None, position=0)


def ignore_signals(worker=None):
    """Leave signals to the first process: Ctrl-C, a scheduler and a closed terminal reach them
    all. worker: the number of a loading process, which torch gives."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent():
    """Wait until the first process has ended, and end this one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def start_in_pool():
    ignore_signals()
    # A pool whose first process was killed would wait for tasks for ever.
    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def process_pool(n):
    """A pool of n processes. If the block fails, or a signal ends it, they begin no other task."""
    with ProcessPoolExecutor(n, initializer=start_in_pool) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# Shards


def expand_braces(pattern):
    """Yields a00.tar, a01.tar, a02.tar for "a{00..02}.tar". A pattern without braces stays as it
    is."""
    match = regex.search(r"{(\d+)\.\.(\d+)}", pattern)
    if not match:
        yield pattern
        return
    low, high = match.groups()
    for i in range(int(low), int(high) + 1):
        yield from expand_braces(pattern.replace(match[0], f"{i:0{len(low)}d}", 1))


def expand(patterns):
    """--train_data -> sorted list of shards, from paths, folders, globs and braces. Each number in
    braces must match, so that a missing download is noticed. Raises InputError."""
    shards = set()
    for pattern in chain.from_iterable(expand_braces(str(p)) for p in patterns):
        if os.path.isdir(pattern):
            pattern = f"{glob.escape(pattern)}/*.tar"
        found = glob.glob(glob.escape(pattern)) or glob.glob(pattern)  # a name may hold brackets
        check(found, f"no shards match {pattern}")
        shards.update(map(os.path.abspath, found))
    return sorted(shards)


# The name of a split between hyphens, underscores, dots and digits, as in cc3m-validation-0000.tar.
SPLIT = regex.compile(r"(?<![a-z])(train|val|valid|validation|test)(?![a-z])")


def is_validation(shard):
    """Return whether the first split that the name of a shard holds is not train."""
    splits = SPLIT.findall(Path(shard).name.lower())
    return splits[:1] not in ([], ["train"])


def by_split(shards):
    """list of shards -> (training shards, validation shards), by their names. If all are named as
    validation shards, they are returned as the first list."""
    training = [shard for shard in shards if not is_validation(shard)]
    validation = [shard for shard in shards if is_validation(shard)]
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


def read_headers(path, number):
    """A shard and its number -> (index rows, an int32 array (n, 7); list of (name, reason) of the
    samples and parts that are not used). A damaged shard is used up to the damage."""
    rows = {}  # key -> index row
    unused = {}  # key -> reason
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = split_name(member.name)
                column = COLUMN.get(extension)
                if member.size >= 2**31:  # an index row holds 32-bit numbers
                    unused[key] = "2 GiB or more"
                elif column and key and member.isfile():
                    row = rows.setdefault(key, [number, 0, 0, 0, 0, 0, 0])
                    row[column : column + 2] = member.offset_data // BLOCK, member.size
                elif not member.isdir():  # metadata, links, a.b.jpg
                    unused[f"*{extension}"] = f"no part of a sample: {member.name}"
            # tarfile stops in silence at a header that it cannot read.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(BLOCK).strip(b"\0"):
                unused[""] = "damaged, and not used from there on"
    except tarfile.TarError as error:
        unused[""] = f"damaged, compressed, or no tar: {error}"
    except OSError as error:  # this trouble may pass, and what is returned is cached
        raise InputError(f"{path}: {error}") from error
    for key, row in list(rows.items()):
        if row[IMAGE + 1] == 0:
            unused[key] = "no image, or an empty one"
            del rows[key]
    # A NumPy array: torch would send it to the main process as an open file, and there may be more
    # shards than a process may open files.
    index = np.array([*rows.values()], dtype=np.int32).reshape(-1, 7)
    return index, [(f"{path}:{key}".rstrip(":"), reason) for key, reason in unused.items()]


def build_index(shards):
    """list of shards -> (int32 tensor (N, 7), list of (name, reason) of what is not used).

    The index takes 28 bytes a sample, in one tensor that all loading processes share, where Python
    objects would be copied to each of them. It is cached under a name that changes with the path,
    the size or the mtime of a shard.
    """
    stamps = [(shard, os.path.getsize(shard), os.stat(shard).st_mtime_ns) for shard in shards]
    digest = hashlib.sha1(repr(stamps).encode()).hexdigest()
    # Count up when read_headers changes, so that old caches are ignored.
    name = f"index-12-{digest}"
    try:
        return torch.load(cache_folder() / name, weights_only=True)
    except Exception:  # It is not there, or damaged, for which torch has half a dozen kinds.
        pass
    index = []
    unused = []
    with process_pool(min(len(shards), cores(), 61)) as pool:  # Windows allows no more
        results = pool.map(read_headers, shards, range(len(shards)))
        for rows, reasons in progress(results, "indexing shards", len(shards), unit="shard"):
            index.append(rows)
            unused += reasons
    index = torch.from_numpy(np.concatenate(index))
    # A cache that cannot be written is no reason to stop. Two commands may write it at once, since
    # each writes a file of its own and renames it.
    with suppress(OSError, RuntimeError):
        path = cache_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: torch.save((index, unused), file))
    return index, unused


def add_member(tar, name, content):
    """Adds bytes as a member of a tar that is open for writing."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def add_sample(tar, key, suffix, image, caption, fields):
    """Adds a sample to a shard that is open for writing. suffix: of its image, such as .jpg; image:
    the bytes of that file; fields: a dict for .json."""
    text = caption.encode("utf-8", "replace")
    metadata = json.dumps(fields).encode()
    add_member(tar, key + suffix, image)
    add_member(tar, key + ".txt", text)
    add_member(tar, key + ".json", metadata)


# -----------------------------------------------------------------------------
# Samples: what shards hold, at random access


MAX_CAPTION = 20_000  # characters; a batch is as wide as its longest caption


class BadSample(Exception):
    """This sample cannot be used. The message says why."""


@lru_cache(100)  # shards that stay open: macOS allows a process 256 files
def open_shard(path, process):
    """A shard, open for reading. Each process has files of its own, because a forked one would
    share the place in the file where the next read begins."""
    return open(path, "rb")


class Shards:
    """The samples in tar shards. A sample is a number, from 0 to len - 1.

    paths: of the shards. sources: of captions, each txt or json.FIELD. unused: list of (name,
    reason) of what is not used. Raises InputError if no sample is left, or if a source has no
    captions.
    """

    def __init__(self, paths, sources=("txt",)):
        self.paths = paths
        self.sources = sources
        self.index, self.unused = build_index(paths)
        if len(self.index) == 0:
            name, reason = self.unused[0] if self.unused else (paths[0], "it is empty")
            raise InputError(f"no image-caption pairs in {name}: {reason}")
        if self.unused:
            print(f"{len(self.unused):,} parts of shards are not used: see python -m scripts.show")
        for source in sources:
            self.check_source(source)

    def __len__(self):
        return len(self.index)

    @cached_property
    def fingerprint(self):
        """A short text that changes with the sizes in the shards and the sources of captions."""
        content = self.index.numpy().tobytes() + str(self.sources).encode()
        return hashlib.sha1(content).hexdigest()[:12]

    def read_at(self, number, block, size):
        """Returns `size` bytes of a shard from a block on. Raises BadSample."""
        file = open_shard(self.paths[number], os.getpid())
        file.seek(block * BLOCK)
        content = file.read(size)
        if len(content) < size:
            raise BadSample("the shard ends too early")
        return content

    def read(self, i, column):
        """Returns the bytes of one member: IMAGE, TEXT or JSON. Raises BadSample."""
        row = self.index[i].tolist()
        block, size = row[column], row[column + 1]
        if size == 0:
            raise BadSample("its .txt or .json is missing or empty")
        return self.read_at(row[0], block, size)

    def name(self, i):
        """Returns SHARD:KEY. The key is read from the tar header, which is the block before the
        image, to save memory. The header may shorten one that is long or not ASCII, and the key is
        "?" if the shard has changed or is gone."""
        number, block, *_ = self.index[i].tolist()
        try:
            header = self.read_at(number, block - 1, BLOCK)
            key, _ = split_name(tarfile.TarInfo.frombuf(header, "utf-8", "replace").name)
        except (tarfile.TarError, BadSample, OSError):
            key = "?"
        return f"{self.paths[number]}:{key}"

    def place(self, i):
        """Returns where the image of a sample lies: the path of its shard, and a byte there."""
        number, block, *_ = self.index[i].tolist()
        return self.paths[number], block * BLOCK

    def image(self, i, size, rng=None, crop_area=1.0):
        """Returns pixels (3, size, size), as `load_image` does. Raises BadSample."""
        return load_image(self.read(i, IMAGE), size, rng, crop_area)

    def texts(self, i, source):
        """Returns all texts that a sample has in a source, txt or json.FIELD, as a list of strings.
        A field holds a string or a list of strings. Raises BadSample."""
        try:
            if source == "txt":
                value = self.read(i, TEXT).decode("utf-8-sig")
            else:
                value = json.loads(self.read(i, JSON))[source.removeprefix("json.")]
            texts = value if isinstance(value, list) else [value]
            # JSON may hold half of a surrogate pair, which cannot be printed or written.
            texts = [text.encode("utf-8", "replace").decode() for text in texts if text.strip()]
        except Exception:  # there is none, or JSON holds something else
            raise BadSample(f"{source} is missing, or not UTF-8 text or a list of it") from None
        if not texts or max(map(len, texts)) > MAX_CAPTION:
            raise BadSample(f"the caption is empty, or longer than {MAX_CAPTION:,} characters")
        return texts

    def captions(self, i):
        """Returns all texts that a sample has in the sources, each source once. Raises
        BadSample."""
        texts = []
        for source in dict.fromkeys(self.sources):
            texts += self.texts(i, source)
        return texts

    def check_source(self, source):
        """Raises InputError if none of the first hundred samples has a caption in a source, which
        is what a typo looks like."""
        for i in range(min(100, len(self))):
            with suppress(BadSample):
                self.texts(i, source)
                return
        raise InputError(f"the first samples of {self.paths[0]} have no captions in {source}")


# -----------------------------------------------------------------------------
# Images

Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow refuses twice as many: decompression bombs
# The formats of web images. Pillow knows stranger ones, and some of them start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")
# Pillow warns of odd metadata, and torch of a read-only array, to which nobody writes.
warnings.filterwarnings("ignore", module="PIL|data$")


def is_hidden(name):
    """Return whether a file or folder is one that people do not see: .ipynb_checkpoints, or the
    __MACOSX of a zip that was made on a Mac."""
    return name.startswith((".", "__"))


def images_below(folder):
    """Return the image files in a folder and in all folders below it, but no hidden ones."""
    found = []
    for path in sorted(Path(folder).rglob("*.*")):
        names = path.relative_to(folder).parts
        if path.suffix.lower() in SUFFIXES and not any(map(is_hidden, names)):
            found.append(path)
    return found


def crop_box(width, height, rng=None, crop_area=1.0):
    """Returns the part of an image to look at, as x, y, width, height in pixels.

    With a crop_area of 1 that is the largest central square. Otherwise it is open_clip's only
    augmentation, a random rectangle that covers a share of the area from crop_area to 1, or, where
    none fits, the central 4:3. It is not mirrored, because captions say "left".
    """
    w = h = min(width, height)
    if crop_area < 1:
        # As torchvision's RandomResizedCrop does it, but with random numbers of our own, so that a
        # crop does not depend on which process makes it.
        for _ in range(10):
            area = width * height * rng.uniform(crop_area, 1.0)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w = round(math.sqrt(area * ratio))
            h = round(math.sqrt(area / ratio))
            if w <= width and h <= height:
                return rng.randint(0, width - w), rng.randint(0, height - h), w, h
        # No such rectangle has fitted. As much of the image's centre as fits into 4:3:
        w = min(width, round(height * 4 / 3))
        h = min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def upright_rgb(image, box=None):
    """PIL image -> the part of it in the box (x0, y0, x1, y1), or all, as an RGB image: turned as
    its EXIF data says, with transparent parts white."""
    image = image.crop(box)
    with suppress(Exception):  # damaged EXIF data is no reason to lose the picture
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to 8 instead of scaling
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
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
        width, height = image.size
        x, y, w, h = crop_box(width, height, rng, crop_area)
        scale = max(size / w, size / h)
        if isinstance(source, bytes) and scale <= 0.5:  # draft makes it 2, 4 or 8 times smaller
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
    """Returns the random generator of a visit. Visits count the pairs that a run draws: in batches
    of 32, the first batch has visits 0 to 31, and the second begins with 32. The generator chooses
    a pair's captions, crop and patches, and another pair if this one is bad."""
    return random.Random(seed << 40 | visit)


class Pairs(Shards, Dataset):
    """What a run draws from tar shards: image-caption pairs, ready to train on.

    sources, label_sources: where captions and labels are drawn from, one text each time; a source
    that is named twice is drawn twice as often. Index it with (visit, sample): see rng_of_visit.
    """

    def __init__(
        self,
        paths,
        tokenizer,
        image_size,
        sources=("txt",),
        label_sources=None,
        seed=0,
        crop_area=0.9,
        patches=None,
        patch_dropout=0.0,
    ):
        super().__init__(paths, sources)
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.label_sources = label_sources or sources
        self.seed = seed
        self.crop_area = crop_area
        self.patches = patches
        self.patch_dropout = patch_dropout
        self.named = set()  # numbers of bad samples
        for source in self.label_sources:
            self.check_source(source)

    def sample_pair(self, i, rng):
        """A sample -> (image, ids of the caption, ids of the label caption, the patches to keep or
        None). Raises BadSample."""
        caption = rng.choice(self.texts(i, rng.choice(self.sources)))
        ids = self.tokenizer.encode(caption)
        label_ids = ids
        if self.label_sources != self.sources:
            label = rng.choice(self.texts(i, rng.choice(self.label_sources)))
            label_ids = self.tokenizer.encode(label)
        image = self.image(i, self.image_size, rng, self.crop_area)
        keep = None
        if self.patch_dropout > 0:  # FLIP, arXiv 2212.00794
            K = max(1, round(self.patches * (1 - self.patch_dropout)))
            keep = rng.sample(range(self.patches), K)
        return image, ids, label_ids, keep

    def __getitem__(self, item):
        """(visit, sample) -> what `sample_pair` returns.

        Another sample, at random, replaces a bad one, so that batches have the same size on every
        process. Each process names a bad one once, and a hundred at most."""
        visit, sample = item
        rng = rng_of_visit(self.seed, visit)
        for _ in range(100):
            try:
                return self.sample_pair(sample, rng)
            except (BadSample, OSError) as error:
                reason = f"bad sample: {self.name(sample)}: {error}"
            if sample not in self.named and len(self.named) < 100:
                self.named.add(sample)
                tqdm.write(reason, sys.stderr)
            sample = rng.randrange(len(self))
        raise InputError(f"a hundred bad samples in a row, such as this {reason}")

    def collate(self, items):
        """list of B items -> dict of images (B, 3, S, S) uint8, tokens (B, T), label_tokens (B,
        T') and, with patch dropout, keep (B, K): the arguments of SuperCLIP.forward."""
        images, captions, labels, keep = zip(*items)
        # default_collate stacks like torch.stack, and in a worker straight into shared memory
        images = default_collate([image.permute(1, 2, 0) for image in images])  # (B, S, S, 3)
        length = min(self.tokenizer.context_length, round_up(captions))
        batch = {
            "images": images.permute(0, 3, 1, 2),  # channels last: fast to cut into patches
            "tokens": self.tokenizer.pad(captions, length),
            "label_tokens": self.tokenizer.pad(labels, round_up(labels)),  # the whole captions
        }
        if self.patch_dropout > 0:
            batch["keep"] = torch.tensor(keep)
        return batch


def round_up(captions):
    """Returns the length of the longest of these lists of ids, with start and end, as a multiple of
    16. Few distinct lengths mean few recompilations, and trimmed padding costs nothing."""
    return 16 * math.ceil((max(map(len, captions)) + 2) / 16)


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
# Loading


def make_loader(dataset, workers, **options):
    """A DataLoader. workers: its processes, by default this process's share of the cores, at most
    16."""
    if workers is None:
        # More than 16 would only take shared memory, because each keeps two batches ready.
        workers = min(16, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if workers > 0 and sys.platform == "linux":
        # Forked processes share the index and start at once. Python 3.14 would not fork them.
        options["multiprocessing_context"] = "fork"
    return DataLoader(dataset, num_workers=workers, worker_init_fn=ignore_signals, **options)


def load_batches(pairs, batch_size, local, start, stop, workers, pin=False):
    """Returns an iterator over what one process needs for each step from `start` to `stop`, as
    `collate` makes it.

    local: the slice of the global batch that this process loads; pin: keep batches where a GPU can
    copy them from while it computes.
    """
    n = len(pairs)
    steps = range(start, stop)
    order = (batch_indices(n, batch_size, pairs.seed, step)[local] for step in steps)
    options = {"batch_sampler": order, "collate_fn": pairs.collate, "pin_memory": pin}
    return iter(make_loader(pairs, workers, **options))
