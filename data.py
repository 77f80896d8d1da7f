"""Turn tar shards of image-caption pairs into batches. The file follows this path:

    shards --> index --> Samples (read) --> Pairs (draw, tokenize, crop, resize) --> batches
                                              ^ batch_indices(n, batch_size, seed, step)

A shard is a tar file as img2dataset writes it, and as Hugging Face's hub has CC3M, CC12M and
DataComp. Members of one sample share their name up to the first dot. The rest of the name tells
what a member is: .jpg, .jpeg, .png or .webp is the image, .txt is the caption, and .json is
optional metadata.

Shards are not streamed. One pass over the tar headers makes an index, which is cached
(common/index.py), and then two or three reads fetch any sample. So the shuffle is global, the
length is exact, batches have the same size on each process, and a run can be resumed from one
integer, its step. eval.py makes its own batches, in order and without random crops.
"""

import hashlib
import io
import json
import math
import random
import sys
import tarfile
import warnings
from contextlib import suppress
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from common.cli import InputError
from common.images import FORMATS, upright_rgb
from common.index import BLOCK, IMAGE, JSON, TEXT, build_index, split_name
from common.machine import make_loader

# Pillow warns about odd metadata. torch warns about a read-only array, but nobody writes to it.
warnings.filterwarnings("ignore", module="PIL|data$")

# -----------------------------------------------------------------------------
# Samples: what shards hold, at random access

MAX_CAPTION = 20_000  # characters; labels are not cut, so a batch of them is as wide as the longest


class BadSample(Exception):
    """Say that a sample cannot be used, and why."""


class Samples:
    """Read the samples in tar shards. A sample is a number, from 0 to len - 1.

    paths: the shards; sources: where their captions are, each txt or json.FIELD. The attribute
    `unused` is a list of (name, reason) for the samples and members that are not used.
    """

    def __init__(self, paths, sources=("txt",)):
        self.paths = paths
        self.sources = sources
        self.index, self.unused = build_index(paths)
        if len(self.index) == 0:
            name, reason = self.unused[0] if self.unused else (paths[0], "it is empty")
            raise InputError(f"no image-caption pairs in {name}: {reason}")
        if self.unused:
            print(f"samples or shards not used: {len(self.unused):,} (see python -m scripts.show)")
        for source in sources:
            self.check_source(source)

    def __len__(self):
        return len(self.index)

    @cached_property
    def fingerprint(self):
        """Return a short text that tells data sets apart, by sizes and sources of captions, so that
        --resume can refuse other data."""
        content = self.index.numpy().tobytes() + str(self.sources).encode()
        return hashlib.sha1(content).hexdigest()[:12]

    def read_at(self, shard, block, size):
        """Return `size` bytes of a shard. shard: its place in paths; block: where they begin."""
        with open(self.paths[shard], "rb") as file:
            file.seek(block * BLOCK)
            content = file.read(size)
        if len(content) < size:
            raise BadSample("the shard ends too early")
        return content

    def read(self, i, column):
        """Return the bytes of one member of sample i, b"" if it is missing. column: IMAGE, TEXT or
        JSON, which is 1, 3 or 5."""
        # shard, image block, image size, text block, text size, json block, json size
        row = self.index[i].tolist()
        return self.read_at(row[0], row[column], row[column + 1])

    def name(self, i):
        """Return SHARD:KEY for sample i. To save memory the index holds no keys, so the key is read
        from the tar header, the block before the image. If the shard has changed, it is "?"."""
        shard, block, *_ = self.index[i].tolist()
        try:
            header = self.read_at(shard, block - 1, BLOCK)
            key, _ = split_name(tarfile.TarInfo.frombuf(header, "utf-8", "replace").name)
        except (tarfile.TarError, BadSample, OSError):
            key = "?"
        return f"{self.paths[shard]}:{key}"

    def place(self, i):
        """Return where the image of sample i lies: the path of its shard, and its first byte."""
        shard, block, *_ = self.index[i].tolist()
        return self.paths[shard], block * BLOCK

    def image(self, i, size, rng=None, crop_area=1.0):
        """Return the pixels (3, size, size) of sample i, as `load_image` makes them."""
        return load_image(self.read(i, IMAGE), size, rng, crop_area)

    def texts(self, i, source):
        """Return all texts that sample i has in a source, as a list of strings. source: txt or
        json.FIELD; a field holds a string or a list of strings."""
        content = self.read(i, TEXT if source == "txt" else JSON)
        try:
            if source == "txt":
                value = content.decode("utf-8-sig")
            else:
                value = json.loads(content)[source.removeprefix("json.")]
            texts = value if isinstance(value, list) else [value]
            # JSON may hold half of a surrogate pair, which cannot be printed or written.
            texts = [text.encode("utf-8", "replace").decode() for text in texts if text.strip()]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            # a field may hold anything
            raise BadSample(f"{source} is missing, or no UTF-8 text or list of texts") from None
        if not texts or max(map(len, texts)) > MAX_CAPTION:
            raise BadSample(f"the caption is empty, or longer than {MAX_CAPTION:,} characters")
        return texts

    def captions(self, i):
        """Return all texts that sample i has in its sources. A source that is named twice is read
        once."""
        sources = dict.fromkeys(self.sources)
        return [text for source in sources for text in self.texts(i, source)]

    def check_source(self, source):
        """Raise InputError if none of the first hundred samples has a caption in a source. The
        usual reason is a typo in the name of the source."""
        for i in range(min(100, len(self))):
            with suppress(BadSample):
                self.texts(i, source)
                return
        raise InputError(f"the first samples of {self.paths[0]} have no captions in {source}")


# -----------------------------------------------------------------------------
# Images


def crop_box(width, height, rng=None, crop_area=1.0):
    """Return the part of an image to look at, as x, y, width and height in pixels.

    With a crop_area of 1 this is the largest square in the centre. Otherwise it is a random
    rectangle, whose share of the area is between crop_area and 1. The random crop is open_clip's
    only augmentation, and also ours. Images are not mirrored, because captions say "left".
    """
    w = h = min(width, height)
    if crop_area < 1:
        # Draw as torchvision's RandomResizedCrop does, but from `rng`, in any process the same.
        for _ in range(10):
            area = width * height * rng.uniform(crop_area, 1.0)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w = round(math.sqrt(area * ratio))
            h = round(math.sqrt(area / ratio))
            if w <= width and h <= height:
                return rng.randint(0, width - w), rng.randint(0, height - h), w, h
        # None of the ten rectangles fits. Take as much of the centre as 4:3 allows.
        w = min(width, round(height * 4 / 3))
        h = min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def load_image(picture, size, rng=None, crop_area=1.0):
    """Return a picture as a uint8 tensor (3, size, size), cropped by `crop_box` and resized,
    bicubic with antialiasing. picture: the bytes of an image file, or an image of Pillow.

    Three things make loading fast. `draft` lets the decoder shrink a JPEG if the crop is larger
    than needed. Pixels stay uint8 to the end. The three values of a pixel stay side by side in
    memory, as the decoder wrote them ("channels last").
    """
    try:
        image = picture
        if isinstance(picture, bytes):
            image = Image.open(io.BytesIO(picture), formats=FORMATS)
        width, height = image.size
        x, y, w, h = crop_box(width, height, rng, crop_area)
        scale = max(size / w, size / h)
        if isinstance(picture, bytes) and scale <= 0.5:
            image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
        # draft has made image.width about 2, 4 or 8 times smaller than width, if it could. Sizes
        # are rounded up, so the quotient is not exact.
        shrink = 2 ** round(math.log2(width / image.width))
        image = upright_rgb(image, [side / shrink for side in (x, y, x + w, y + h)])
    except Exception as error:  # Pillow raises many kinds, some with an address in memory
        raise BadSample(f"the image cannot be decoded: {str(error).partition(' <')[0]}") from None
    # Put a batch axis in front, so that torch sees that the image is channels last. torchvision's
    # resize gives the same bits, but takes 7 to 9 % longer for an image of 256 to 512 pixels.
    pixels = torch.from_numpy(np.asarray(image))[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]


# -----------------------------------------------------------------------------
# Pairs and their order


class Pairs(Samples, Dataset):
    """Draw image-caption pairs from tar shards, ready to train on. An item is (draw, sample). Draws
    are numbered through the whole run: in batches of 32 the first batch has draws 0 to 31. All that
    is random about a pair follows from the seed and the number of its draw.

    sources, label_sources: where captions and labels are drawn from, one text each time. A source
    that is named twice is drawn twice as often. Without other label_sources the label is the text
    that was drawn as the caption. num_patches: the number of patches in an image; patch_dropout:
    the share of them that is left out at random.
    """

    def __init__(
        self,
        paths,
        tokenizer,
        image_size,
        sources=("txt",),
        label_sources=None,
        seed=0,
        crop_area=1.0,
        num_patches=None,
        patch_dropout=0.0,
    ):
        super().__init__(paths, sources)
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.label_sources = label_sources or sources
        self.seed = seed
        self.crop_area = crop_area
        self.num_patches = num_patches
        self.patch_dropout = patch_dropout
        self.reported = set()  # bad samples
        for source in self.label_sources:
            self.check_source(source)

    def draw_pair(self, i, rng):
        """Return the image of sample i, the ids of its caption, the ids of its label caption, and
        the list of the patches to keep, or None for all. rng: the generator that draws them."""
        caption = rng.choice(self.texts(i, rng.choice(self.sources)))
        ids = self.tokenizer.encode(caption)
        label_ids = ids
        if self.label_sources != self.sources:
            label = rng.choice(self.texts(i, rng.choice(self.label_sources)))
            label_ids = self.tokenizer.encode(label)
        image = self.image(i, self.image_size, rng, self.crop_area)
        keep = None
        if self.patch_dropout > 0:  # FLIP, arXiv 2212.00794
            K = max(1, round(self.num_patches * (1 - self.patch_dropout)))
            keep = rng.sample(range(self.num_patches), K)
        return image, ids, label_ids, keep

    def __getitem__(self, item):
        """Return what `draw_pair` returns. item: (draw, sample). A random other sample replaces a
        bad one, so that batches have the same size on every process. A hundred bad samples in a row
        end the run. Each process prints a bad sample once, and a hundred bad samples at most."""
        draw, sample = item
        rng = random.Random(self.seed << 40 | draw)  # no run has 2**40 draws
        for _ in range(100):
            try:
                return self.draw_pair(sample, rng)
            except (BadSample, OSError) as error:
                reason = f"bad sample: {self.name(sample)}: {error}"
            if sample not in self.reported and len(self.reported) < 100:
                self.reported.add(sample)
                tqdm.write(reason, sys.stderr)
            sample = rng.randrange(len(self))
        raise InputError(f"a hundred samples in a row cannot be used. The last one: {reason}")

    def collate(self, items):
        """Return a batch of B items, each from `draw_pair`, as a dict of the arguments of
        SuperCLIP.forward: images (B, 3, S, S), uint8; tokens (B, T); label_tokens (B, T'); and with
        patch dropout keep (B, K)."""
        images, captions, labels, keep = zip(*items)
        # default_collate stacks as torch.stack does, but in a worker it writes to shared memory.
        images = default_collate([image.permute(1, 2, 0) for image in images])  # (B, S, S, 3)
        length = min(self.tokenizer.context_length, padded_length(captions))
        batch = {
            "images": images.permute(0, 3, 1, 2),  # channels last: fast to cut into patches
            "tokens": self.tokenizer.pad(captions, length),
            "label_tokens": self.tokenizer.pad(labels, padded_length(labels)),  # whole captions
        }
        if self.patch_dropout > 0:
            batch["keep"] = torch.tensor(keep)
        return batch


def padded_length(captions):
    """Return the length to which a batch of captions, lists of ids, is padded: that of the longest
    one with start and end, rounded up to a multiple of 16. Few lengths mean few compilations."""
    return 16 * math.ceil((max(map(len, captions)) + 2) / 16)


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """Return a random permutation of the n samples, a tensor (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_indices(n, batch_size, seed, step):
    """Return the global batch of a step, as a list of batch_size pairs (draw, sample). The result
    depends on the arguments alone, so a run can start at any step.

    Every epoch is another permutation of the n samples, cut into n // batch_size batches. The
    samples that are left over are not used in that epoch.
    """
    epoch, batch = divmod(step, n // batch_size)
    order = epoch_order(n, seed, epoch)[batch * batch_size : (batch + 1) * batch_size]
    return list(enumerate(order.tolist(), start=step * batch_size))


# -----------------------------------------------------------------------------
# Loading


def load_batches(pairs, batch_size, local, start, stop, workers, pin=False):
    """Return an iterator over batches from `collate`, one for each step from `start` to `stop` - 1.

    local: the slice of the global batch that this process loads; pin: whether batches lie in pinned
    memory, from which a GPU can copy while it computes.
    """
    n = len(pairs)
    steps = range(start, stop)
    order = (batch_indices(n, batch_size, pairs.seed, step)[local] for step in steps)
    options = {"batch_sampler": order, "collate_fn": pairs.collate, "pin_memory": pin}
    return iter(make_loader(pairs, workers, **options))
