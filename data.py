"""Turn tar shards of image-caption pairs into batches:

    shards -> index -> Samples (read) -> Pairs (draw, tokenize, crop, resize) -> batches

A shard is a tar file as img2dataset writes it, and as Hugging Face's hub has CC3M, CC12M and
DataComp. A sample is an image, 00042.jpg, its caption, 00042.txt, and metadata, 00042.json.

Shards are not streamed. One pass over the tar headers makes an index (common/shards.py), and then
two or three reads fetch any sample. So the shuffle is global, batches have the same size on each
process, and pairs[position] is the pair at any place of a run.

The file goes from the bytes of a shard to a batch: Samples read, Pairs draw, crop and tokenize, and
load_batches brings them into an order. Axes in comments are as in superclip.py.
"""

import hashlib
import json
import math
import random
import sys
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from common import processes, shards
from common.cli import InputError, check
from common.images import BadSample, centre_box, centre_square, load_image
from common.processes import make_loader, to_shared_memory
from common.tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# Samples: what shards hold, at random access

MAX_CAPTION = 20_000  # characters; labels are not cut, so a batch of them is as wide as the longest


def open_samples(paths, sources):
    """Return the Samples in files that the options name. All commands call this function, so here
    a fork returns data of another kind, for example if the files have another suffix.

    That is a subclass of Samples with its own __init__, which sets `paths` and `sources`, and its
    own __len__, image, read_source, name and fingerprint. sources: what --captions names, by
    default ["txt"]. If a sample is broken or lacks the source, image and read_source raise
    BadSample. image may also return a path, which load_image opens.
    """
    samples = Samples(paths, sources)
    check(len(samples) > 0, f"there are no image-caption pairs in {paths[0]}")
    for source in sources:
        samples.check_source(source)
    return samples


class Samples:
    """Read the samples in tar shards. A sample is a number, from 0 to len - 1. paths: the shards;
    sources: where captions are, each txt or json.FIELD."""

    def __init__(self, paths, sources=("txt",)):
        self.paths = paths
        self.sources = sources
        self.index, self.unused = shards.build_index(paths)
        if self.unused:
            print(f"samples or shards not used: {len(self.unused):,}, such as {self.unused[0]}")

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        return self.image(i), self.captions(i)

    def image(self, i):
        """Return the image of sample i, as bytes or as anything else that load_image takes."""
        return self.read(i, shards.IMAGE)

    def captions(self, i):
        """Return all captions of sample i. A source that is named twice is read once."""
        sources = dict.fromkeys(self.sources)
        return [caption for source in sources for caption in self.captions_in(i, source)]

    def captions_in(self, i, source):
        """Return the captions that sample i has in a source, a list of strings."""
        found = self.read_source(i, source)
        captions = [found] if isinstance(found, str) else found
        # JSON may hold half of a surrogate pair, which cannot be printed or written.
        captions = [x.encode("utf-8", "replace").decode() for x in captions if x.strip()]
        if not captions or max(map(len, captions)) > MAX_CAPTION:
            raise BadSample(f"{source} is missing, empty or longer than {MAX_CAPTION:,} characters")
        return captions

    def read_source(self, i, source):
        """Return what a source of sample i holds, a string or a list of strings."""
        try:
            if source == "txt":
                return self.read(i, shards.TEXT).decode("utf-8-sig")
            value = json.loads(self.read(i, shards.JSON))[source.removeprefix("json.")]
        # The bytes are no UTF-8 or JSON, or the JSON lacks the field or is nested too deeply.
        except (ValueError, LookupError, TypeError, RecursionError):
            raise BadSample(f"{source} is missing, or cannot be decoded") from None
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(x, str) for x in texts):
            raise BadSample(f"{source} holds something else than texts")
        return texts

    def read(self, i, column):
        """Return the bytes of a member of sample i, b"" if there is none. column: IMAGE, TEXT or
        JSON of common/shards.py."""
        row = self.index[i].tolist()
        shard = row[0]
        block, size = row[column : column + 2]
        try:
            with open(self.paths[shard], "rb") as file:
                file.seek(block * shards.BLOCK)
                content = file.read(size)
        except OSError as error:
            raise BadSample(str(error)) from None
        if len(content) < size:
            raise BadSample("the shard ends too early")
        return content

    def check_source(self, source):
        """Raise InputError if a source has no captions. It tries a hundred samples at most."""
        for i in range(0, len(self), 1 + len(self) // 100):
            with suppress(BadSample):
                self.captions_in(i, source)
                return
        raise InputError(f"no captions in {source} of {self.paths[0]}: name other sources")

    @cached_property
    def fingerprint(self):
        """A short text that tells data sets apart, so that --resume can refuse other data. It
        depends on all that decides the pairs: here sizes, and the sources of captions. It does not
        depend on where the files lie, so the data of a run may move."""
        content = self.index.numpy().tobytes() + str(self.sources).encode()
        return hashlib.sha1(content).hexdigest()[:12]

    def name(self, i):
        """Return SHARD:KEY for sample i. The index holds no keys, to save memory. The key is in the
        tar header, the block before the image, unless the shard has changed."""
        shard, image_block, *_ = self.index[i].tolist()
        path = self.paths[shard]
        try:
            with open(path, "rb") as file:
                file.seek((image_block - 1) * shards.BLOCK)
                header = tarfile.TarInfo.frombuf(file.read(shards.BLOCK), "utf-8", "replace")
            key, _ = shards.split_name(header.name)
        except (tarfile.TarError, OSError):
            key = "?"
        return f"{path}:{key}"


# -----------------------------------------------------------------------------
# Pairs: what a step draws of a sample


@dataclass
class Pairs(Dataset):
    """Draw image-caption pairs from Samples, ready to train on. pairs[position] is the pair at a
    place of the whole run, which never ends: in batches of 4, step 2 has the positions 8 to 11.

    Every epoch is another permutation of the samples, and those that fill no batch are not used in
    that epoch. So with 10 samples in batches of 4, the positions 0 to 7 are the first epoch, in
    which two samples are not used. The second epoch begins at position 8.

    The position also seeds all that is random about the pair. So a sample is another pair in each
    epoch, but the same one after --resume.

    The caption is drawn from the sources of the samples. A source that is named twice is drawn
    twice as often. label_sources: the same for the words to predict, by default the caption itself;
    crop_area: for crop_box; patch_dropout: the share of the num_patches patches that is left out.
    """

    samples: Samples
    tokenizer: Tokenizer
    image_size: int
    batch_size: int
    label_sources: list | None = None
    seed: int = 0
    crop_area: float = 1.0
    num_patches: int | None = None
    patch_dropout: float = 0.0

    def __post_init__(self):
        self.reported = set()  # bad samples that this process has printed, a hundred at most
        for source in self.label_sources or ():
            self.samples.check_source(source)

    def __getitem__(self, position):
        """Return what draw_pair returns, and whether the pair replaces a bad sample. Another sample
        takes the place of a bad one, so that batches keep their size. After a hundred bad ones in a
        row the run ends."""
        n = len(self.samples)
        used = n // self.batch_size * self.batch_size  # in each epoch
        epoch, place = divmod(position, used)
        i = epoch_order(n, self.seed, epoch)[place].item()
        rng = random.Random(self.seed * 2**40 + position)  # no run has 2**40 pairs
        for tried in range(100):
            try:
                return *self.draw_pair(i, rng), tried > 0
            except BadSample as error:
                problem = f"{self.samples.name(i)}: {error}"
                if i not in self.reported and len(self.reported) < 100:
                    self.reported.add(i)
                    tqdm.write(f"bad sample: {problem}", sys.stderr)
                i = rng.randrange(n)  # the sample that replaces it
        raise InputError(f"a hundred samples in a row cannot be used. The last one: {problem}")

    def draw_pair(self, i, rng):
        """Return the image of sample i, the ids of its caption, the ids of its label caption, and
        the list of the patches to keep, or None for all. rng: the generator that draws them."""
        caption = self.draw_ids(i, self.samples.sources, rng)
        label = caption
        if self.label_sources:
            label = self.draw_ids(i, self.label_sources, rng)
        crop = partial(crop_box, crop_area=self.crop_area, rng=rng)
        image = load_image(self.samples.image(i), self.image_size, crop)
        keep = None
        if self.patch_dropout > 0:  # FLIP, arXiv 2212.00794
            K = max(1, round(self.num_patches * (1 - self.patch_dropout)))
            keep = rng.sample(range(self.num_patches), K)
        return image, caption, label, keep

    def draw_ids(self, i, sources, rng):
        captions = self.samples.captions_in(i, rng.choice(sources))
        return self.tokenizer.encode(rng.choice(captions))

    def collate(self, items):
        """Return a batch of B items as two values. The first is a dict of the arguments of
        SuperCLIP.forward: images (B, 3, S, S), uint8; tokens (B, T); label_tokens (B, T'); and with
        patch dropout keep (B, K). The second is the number of pairs that replace a bad sample."""
        images, captions, labels, keep, is_replacement = zip(*items)
        # `pad` puts start and end around each caption. It cuts what the text tower cannot read, but
        # keeps the end. Labels are never cut.
        length = min(self.tokenizer.context_length, padded_length(captions))
        batch = {
            "images": torch.stack(images),
            "tokens": self.tokenizer.pad(captions, length),
            "label_tokens": self.tokenizer.pad(labels, padded_length(labels)),
        }
        if self.patch_dropout > 0:
            batch["keep"] = torch.tensor(keep)
        to_shared_memory(*batch.values())
        return batch, sum(is_replacement)


def crop_box(width, height, crop_area, rng):
    """Return the part of an image to train on, as x0, y0, x1 and y1 in pixels. With a crop_area of
    1 this is the largest square in the centre. Otherwise it is a random rectangle, whose share of
    the area is between crop_area and 1, and whose ratio is between 3:4 and 4:3. This is open_clip's
    only augmentation, and also ours. Images are not mirrored, because captions say "left"."""
    if crop_area == 1:
        return centre_square(width, height)
    # Draw as torchvision's RandomResizedCrop does, but from `rng`, in any process the same.
    for _ in range(10):
        area = width * height * rng.uniform(crop_area, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.randint(0, width - w), rng.randint(0, height - h)
            return x, y, x + w, y + h
    # None of the ten fits, as in every image of 3:2 with a crop_area of 0.9. Take the middle.
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return centre_box(width, height, w, h)


def padded_length(captions):
    """Return the length to which a batch of captions, lists of ids, is padded: that of the longest
    one with start and end, rounded up to a multiple of 16. Few lengths mean few compilations."""
    longest = max(len(ids) for ids in captions)
    return 16 * math.ceil((longest + 2) / 16)


# -----------------------------------------------------------------------------
# The order of pairs, and batches


@lru_cache(maxsize=1)
def epoch_order(n, seed, epoch):
    """Return the n samples of an epoch in random order, a tensor (n,). int32 saves memory in each
    loading process."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator, dtype=torch.int32)


def load_batches(pairs, start, stop, workers, pin=False):
    """Return an iterator over batches from `collate`, one for each step from `start` to `stop` - 1.
    Each process loads its own part of every batch. pin: whether batches lie in pinned memory, from
    which a GPU can copy while it computes."""
    B = pairs.batch_size // processes.WORLD
    steps = range(start, stop)
    firsts = (step * pairs.batch_size + processes.RANK * B for step in steps)
    positions = (range(first, first + B) for first in firsts)
    # For each range that batch_sampler yields, a loader calls collate on pairs[position] of it.
    options = {"batch_sampler": positions, "collate_fn": pairs.collate, "pin_memory": pin}
    return iter(make_loader(pairs, workers, **options))
