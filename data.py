"""Turn tar shards of image-caption pairs into batches:

    shards -> index -> Samples (read) -> Pairs (draw, tokenize, crop, resize) -> batches

The file follows this way back, from a batch to the bytes of a file.

A shard is a tar file as img2dataset writes it, and as Hugging Face's hub has CC3M, CC12M and
DataComp. Members of one sample share their name up to the first dot. The rest of the name tells
what a member is: the image (.jpg, .jpeg, .png or .webp), its caption (.txt), or metadata (.json).

Shards are not streamed. One pass over the tar headers makes an index (common/shards.py), and then
two or three reads fetch any sample. So the shuffle is global, the length is exact, and batches have
the same size on each process. The order goes on from one integer, the step. At the end stand the
pictures that eval.py reads in order. The axes in comments are those of superclip.py.
"""

import hashlib
import io
import json
import math
import random
import sys
import tarfile
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from common import shards
from common.cli import InputError, check, progress
from common.processes import make_loader
from common.tokenizer import Tokenizer


class BadSample(Exception):
    """Say that a sample or a picture cannot be used, and why."""


# -----------------------------------------------------------------------------
# Batches and their order


def load_batches(pairs, batch_size, rows, start, stop, workers, pin=False):
    """Return an iterator over batches from `collate`, one for each step from `start` to `stop` - 1.
    rows: the slice of each batch that this process loads; pin: whether batches lie in pinned
    memory, from which a GPU can copy while it computes."""
    # For each batch, the list of the items that the loader takes from `pairs`.
    items_of_batches = (
        batch_indices(len(pairs), batch_size, pairs.seed, step)[rows] for step in range(start, stop)
    )
    options = {"batch_sampler": items_of_batches, "collate_fn": pairs.collate, "pin_memory": pin}
    return iter(make_loader(pairs, workers, **options))


def batch_indices(n, batch_size, seed, step):
    """Return the batch of a step, as a list of batch_size tuples (position, sample). Positions
    number the pairs of the whole run, and a position seeds the random draws of its pair.

    Every epoch is another permutation of the n samples. Those that fill no batch are not used in
    that epoch. The result depends on the arguments alone, so a run can start at any step.

    An example: of 100 samples in batches of 4, step 2 has the positions 8 to 11. With seed 0 it is
    [(8, 53), (9, 91), (10, 81), (11, 42)]. Of two processes the second one loads rows slice(2, 4),
    which are (10, 81) and (11, 42).
    """
    epoch, batch = divmod(step, n // batch_size)  # the step's epoch, and its batch in there
    first = batch * batch_size
    samples = epoch_order(n, seed, epoch)[first : first + batch_size].tolist()
    return list(enumerate(samples, start=step * batch_size))


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """Return a random permutation of the n samples, a tensor (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


# -----------------------------------------------------------------------------
# Pairs


@dataclass
class Pairs(Dataset):
    """Draw image-caption pairs from Samples, ready to train on. pairs[position, i] is a tuple: a
    pair of sample i, and whether the pair replaces a bad sample. All that is random about it
    follows from the seed and the position.

    The caption is one text from the sources of the samples. A source that is named twice is drawn
    twice as often. label_sources: the same for the words to predict, by default the text that was
    drawn as the caption.

    crop_area: for `crop_box`; num_patches: the number of patches in an image; patch_dropout: the
    share of them that is left out at random.
    """

    samples: "Samples"
    tokenizer: Tokenizer
    image_size: int
    label_sources: list | None = None
    seed: int = 0
    crop_area: float = 1.0
    num_patches: int | None = None
    patch_dropout: float = 0.0

    def __post_init__(self):
        self.reported = set()  # bad samples that were printed
        for source in self.label_sources or ():
            self.samples.check_source(source)

    def __len__(self):
        return len(self.samples)

    def draw_pair(self, i, rng):
        """Return the image of sample i, the ids of its caption, the ids of its label caption, and
        the list of the patches to keep, or None for all. rng: the generator that draws them."""
        caption = self.draw_caption(i, self.samples.sources, rng)
        label = caption
        if self.label_sources:
            label = self.draw_caption(i, self.label_sources, rng)
        picture = self.samples.image(i)
        image = load_image(picture, self.image_size, rng, self.crop_area)
        keep = None
        if self.patch_dropout > 0:  # FLIP, arXiv 2212.00794
            K = max(1, round(self.num_patches * (1 - self.patch_dropout)))
            keep = rng.sample(range(self.num_patches), K)
        return image, caption, label, keep

    def draw_caption(self, i, sources, rng):
        """Return the ids of a text that sample i has in one of the sources."""
        source = rng.choice(sources)
        return self.tokenizer.encode(rng.choice(self.samples.texts(i, source)))

    def __getitem__(self, item):
        """Return what `draw_pair` returns, and whether this replaces a bad sample. item: (position,
        sample). A random other sample takes the place of a bad one, so that batches have the same
        size on every process. A hundred bad samples in a row end the run."""
        position, i = item
        rng = random.Random(self.seed * 2**40 + position)  # no run has 2**40 pairs
        # For what draws from torch and not from rng, such as torchvision's transforms in a fork. It
        # draws the same in any loading process. manual_seed of torch would also look for GPUs.
        torch.default_generator.manual_seed(torch_seed(self.seed, position))
        for tried in range(100):
            try:
                return self.draw_pair(i, rng), tried > 0
            except BadSample as error:
                problem = f"{self.samples.name(i)}: {error}"
                # Each process prints a sample once, and a hundred at most.
                if i not in self.reported and len(self.reported) < 100:
                    self.reported.add(i)
                    tqdm.write(f"bad sample: {problem}", sys.stderr)
                i = rng.randrange(len(self))  # the sample that replaces it
        raise InputError(f"a hundred samples in a row cannot be used. The last one: {problem}")

    def collate(self, items):
        """Return a batch of B items as two values. The first is a dict of the arguments of
        SuperCLIP.forward: images (B, 3, S, S), uint8; tokens (B, T); label_tokens (B, T'); and with
        patch dropout keep (B, K). The second is the number of pairs that replace a bad sample."""
        pairs, is_replacement = zip(*items)
        images, captions, labels, keep = zip(*pairs)
        # In memory the three values of a pixel lie side by side. Stack the images in this order,
        # (B, S, S, 3), because copying memory as it is takes a third less time.
        pixels = torch.stack([image.permute(1, 2, 0) for image in images])
        # The tokenizer's `pad` puts start and end around each caption. It cuts one that is longer
        # than the text tower can read, but keeps its end. Labels are never cut.
        length = min(self.tokenizer.context_length, padded_length(captions))
        batch = {
            "images": pixels.permute(0, 3, 1, 2),
            "tokens": self.tokenizer.pad(captions, length),
            "label_tokens": self.tokenizer.pad(labels, padded_length(labels)),
        }
        if self.patch_dropout > 0:
            batch["keep"] = torch.tensor(keep)
        return batch, sum(is_replacement)


def torch_seed(*numbers):
    """Return a seed for torch that depends on several integers, such as a seed and a step. On a CPU
    torch looks at 32 bits of a seed only, so all of the numbers must change these."""
    return random.Random(str(numbers)).getrandbits(32)


def padded_length(captions):
    """Return the length to which a batch of captions, lists of ids, is padded: that of the longest
    one with start and end, rounded up to a multiple of 16. Few lengths mean few compilations."""
    longest = max(len(ids) for ids in captions)
    return 16 * math.ceil((longest + 2) / 16)


# -----------------------------------------------------------------------------
# Samples: what shards hold, at random access

MAX_CAPTION = 20_000  # characters; labels are not cut, so a batch of them is as wide as the longest


def open_samples(names, sources=("txt",)):
    """Return the Samples in some shards. names: paths, folders, globs or braces; sources: where the
    captions are. All commands open their pairs here.

    For data of another kind, return an object of a subclass of Samples. It needs its own __init__,
    __len__, image, texts, name and fingerprint. It sets `sources` and `paths`, a list of texts. A
    checkpoint stores the paths, and other commands open the same data by them.
    """
    return Samples(shards.find_shards(names), sources)


class Samples:
    """Read the samples in tar shards. A sample is a number, from 0 to len - 1. paths: the shards;
    sources: where their captions are, each txt or json.FIELD.

    The index has a row for each sample, which says where the sample lies (common/shards.py).
    """

    def __init__(self, paths, sources=("txt",)):
        self.paths = paths
        self.sources = sources
        self.index, self.unused = shards.build_index(paths)  # unused: texts that say what and why
        if self.unused:
            print(f"samples or shards not used: {len(self.unused):,}, such as {self.unused[0]}")
        check(len(self.index) > 0, f"there are no image-caption pairs in {paths[0]}")
        for source in sources:
            self.check_source(source)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        """Return the image of sample i and a list of its captions."""
        return self.image(i), self.captions(i)

    def image(self, i):
        """Return the image of sample i, as the bytes of its file. Another kind of data may return
        a Path, or whatever else load_image takes."""
        return self.read(i, shards.IMAGE)

    def read(self, i, column):
        """Return the bytes of a member of sample i, b"" if there is none. column: IMAGE, TEXT or
        JSON."""
        row = self.index[i].tolist()
        shard, block, size = row[0], row[column], row[column + 1]
        try:
            with open(self.paths[shard], "rb") as file:
                file.seek(block * shards.BLOCK)
                content = file.read(size)
        except OSError as error:
            raise BadSample(str(error)) from None
        if len(content) < size:
            raise BadSample("the shard ends too early")
        return content

    def texts(self, i, source):
        """Return all texts that sample i has in a source, as a list of strings. source: txt or
        json.FIELD; a field holds a string or a list of strings."""
        try:
            if source == "txt":
                value = self.read(i, shards.TEXT).decode("utf-8-sig")
            else:
                value = json.loads(self.read(i, shards.JSON))[source.removeprefix("json.")]
            texts = value if isinstance(value, list) else [value]
            # JSON may hold half of a surrogate pair, which cannot be printed or written.
            texts = [text.encode("utf-8", "replace").decode() for text in texts if text.strip()]
        # A field may hold anything. JSON that is nested too deeply gives a RecursionError.
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise BadSample(f"{source} is missing, or no UTF-8 text or list of texts") from None
        if not texts or max(map(len, texts)) > MAX_CAPTION:
            raise BadSample(f"{source} is missing, empty or longer than {MAX_CAPTION:,} characters")
        return texts

    def captions(self, i):
        """Return all texts of sample i. A source that is named twice is read once."""
        sources = dict.fromkeys(self.sources)
        return [text for source in sources for text in self.texts(i, source)]

    def check_source(self, source):
        """Raise InputError if none of the first hundred samples has a caption in a source. The
        usual reason is a typo in the name of the source."""
        for i in range(min(100, len(self))):
            with suppress(BadSample):
                self.texts(i, source)
                return
        raise InputError(f"no captions in {source} of {self.paths[0]}: name others by --captions")

    @cached_property
    def fingerprint(self):
        """Return a short text that tells data sets apart, by sizes and sources of captions, so that
        --resume can refuse other data."""
        content = self.index.numpy().tobytes() + str(self.sources).encode()
        return hashlib.sha1(content).hexdigest()[:12]

    def name(self, i):
        """Return SHARD:KEY for sample i. To save memory the index holds no keys, so the key is read
        from the tar header, the block before the image. If the shard has changed, it is "?"."""
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
# Images

# Pillow refuses an image with more than twice this number of pixels. It may be a bomb, a small file
# that fills the memory.
Image.MAX_IMAGE_PIXELS = 50_000_000
# These formats are those of web images. Pillow reads more, and for some it starts other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Pillow warns about odd metadata and half a bomb, torch about a read-only array.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


def load_image(picture, size, rng=None, crop_area=1.0):
    """Return a picture as uint8 (3, size, size), cropped by `crop_box` and resized, bicubic with
    antialiasing. picture: path or bytes of an image file, or an image of Pillow, which stays as it
    is. Raise BadSample if it cannot be read."""
    is_file = not isinstance(picture, Image.Image)
    image = open_file(picture) if is_file else picture
    box = crop_box(*image.size, rng, crop_area)
    if is_file:
        box = decode_smaller(image, box, size)
    with only_pillow():
        image.load()  # decode the pixels
    image = upright_rgb(image.crop(box))
    # The three values of a pixel stay side by side in memory, as decoded, and stay uint8.
    # torchvision's resize gives the same bits, but takes 7 to 9 % longer.
    pixels = torch.from_numpy(np.asarray(image))[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]


@contextmanager
def only_pillow():
    """Turn every error in the block into BadSample. Files can be damaged in many ways, and Pillow
    raises many kinds of errors for them. The block must call Pillow alone, so that a mistake in our
    own code, or in that of a fork, shows its trace."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition(" <")[0]  # without an address in memory
        raise BadSample(f"the image cannot be decoded: {reason}") from None


def open_file(picture):
    """Return an image of Pillow that has read the header of a file, but no pixels. picture: path or
    bytes of an image file."""
    file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    with only_pillow():
        return Image.open(file, formats=FORMATS)


def crop_box(width, height, rng=None, crop_area=1.0):
    """Return the part of an image to look at, as x0, y0, x1 and y1 in pixels. With a crop_area of 1
    this is the largest square in the centre. Otherwise it is a random rectangle, whose share of the
    area is between crop_area and 1, and whose ratio is between 3:4 and 4:3. This is open_clip's
    only augmentation, and also ours. Images are not mirrored, because captions say "left".

    In a long image no such rectangle fits. Then the box is the largest one of 4:3 or 3:4 in the
    centre. With a crop_area of 0.9 this happens to every image of 3:2, which keeps 89 %, and of
    16:9, which keeps 75 %.
    """
    w = h = min(width, height)
    if crop_area < 1:
        # Draw as torchvision's RandomResizedCrop does, but from `rng`, in any process the same.
        for _ in range(10):
            area = width * height * rng.uniform(crop_area, 1.0)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w = round(math.sqrt(area * ratio))
            h = round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                x, y = rng.randint(0, width - w), rng.randint(0, height - h)
                return x, y, x + w, y + h
        # None of the ten rectangles fits.
        w = min(width, round(height * 4 / 3))
        h = min(height, round(width * 4 / 3))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def decode_smaller(image, box, size):
    """Let the decoder shrink a JPEG, which saves most of its time, if the crop has at least twice
    as many pixels on each side as needed. This changes `image`, which is not decoded yet. Return
    the box in its new pixels."""
    x0, y0, x1, y1 = box
    width = image.width
    scale = max(size / (x1 - x0), size / (y1 - y0))
    if scale <= 0.5:
        with only_pillow():
            image.draft("RGB", (math.ceil(width * scale), math.ceil(image.height * scale)))
    # This is 1, 2, 4 or 8. It must be rounded, because the decoder rounds sizes up: 193 pixels,
    # shrunk 8 times, become 25.
    shrink = 2 ** round(math.log2(width / image.width))
    return [side / shrink for side in box]


def upright_rgb(image):
    """Return an image of Pillow as RGB, turned as its EXIF data says, with transparent parts white.
    Its pixels must be decoded."""
    with suppress(Exception):  # keep a picture whose EXIF data is damaged
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8 and not scale
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        with only_pillow():  # the colours of a palette may be damaged
            image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


# -----------------------------------------------------------------------------
# Pictures in order, which eval.py and scripts/ read


@dataclass
class Pictures(Dataset):
    """Read pictures in order, without random crops. An item is pixels (3, size, size) and a label.
    If a picture cannot be read, it is named, and its item is (None, None).

    labelled: labelled[i] is a picture, as load_image takes it, and its label. So it may be a list
    of such pairs, a data set of torchvision, or Samples, whose labels are lists of captions;
    classes: the names of the classes, if the labels are their numbers.
    """

    labelled: object
    size: int
    classes: list | None = None

    def __len__(self):
        return len(self.labelled)

    def __getitem__(self, i):
        name = f"picture {i}"
        try:
            picture, label = self.labelled[i]
            if isinstance(picture, Path):
                name = picture
            return load_image(picture, self.size), label
        except BadSample as error:
            tqdm.write(f"skipped {name}: {error}")
            return None, None


def readable_batches(pictures, batch_size, workers):
    """Yield Pictures in batches, without those that cannot be read: pixels, uint8 (B, 3, S, S), and
    a list of B labels."""
    loader = make_loader(pictures, workers, batch_size=batch_size, collate_fn=stack_readable)
    for pixels, labels in progress(loader, "encoding", unit="batch"):
        if labels:
            yield pixels, labels


def stack_readable(items):
    """Return the pixels of the items that can be read, stacked, or None if there are none, and a
    list of their labels."""
    items = [(pixels, label) for pixels, label in items if pixels is not None]
    if not items:
        return None, []
    pixels, labels = zip(*items)
    # Stack them here, in the loading process, because each tensor on its way out of it keeps a file
    # open.
    return torch.stack(pixels), list(labels)


SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")
HIDDEN = (".", "__")  # begin what programs hide from people: .ipynb_checkpoints, __MACOSX in a zip


def images_below(folder):
    """Return a sorted list of the image files in and below a folder, without hidden ones."""
    found = []
    for path in sorted(folder.rglob("*")):
        is_hidden = any(x.startswith(HIDDEN) for x in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not is_hidden:
            found.append(path)
    return found


# Data sets that torchvision downloads, and for which it needs no other package. For each, the class
# of torchvision, and the arguments that choose its images for training, and those for tests.
STANDARD_SETS = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "dtd": ("DTD", {"split": "train"}, {"split": "test"}),
    "fgvcaircraft": ("FGVCAircraft", {"split": "trainval"}, {"split": "test"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "oxfordiiitpet": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
}


def standard_set(name, training):
    """Return a data set of torchvision, whose items are (image of Pillow, number of its class).
    Download it into the cache folder, unless it is there. name: one of STANDARD_SETS; training:
    whether to return its images for training, or those for tests."""
    check(name in STANDARD_SETS, f"{name} is no folder, and none of {[*STANDARD_SETS]}")
    from torchvision import datasets  # only here, because this import is slow

    kind, for_training, for_tests = STANDARD_SETS[name]
    options = for_training if training else for_tests
    try:
        return getattr(datasets, kind)(shards.cache_folder() / "datasets", download=True, **options)
    except Exception as error:  # the network and torchvision raise many kinds
        raise InputError(f"{name} can neither be read nor downloaded: {error}") from error


def class_pictures(name, size, training=False):
    """Return Pictures with classes. name: a folder that holds a folder of images for each class, or
    else a name in STANDARD_SETS; training: whether to return the training images of such a set. A
    folder without images is a class, too: images can be mistaken for it."""
    if Path(name).is_dir():
        folders = sorted(path for path in Path(name).iterdir() if path.is_dir())
        folders = [path for path in folders if not path.name.startswith(HIDDEN)]
        classes = [path.name for path in folders]
        labelled = []
        for c, folder in enumerate(folders):
            labelled += [(file, c) for file in images_below(folder)]
        check(labelled, f"{name} has no folders with images in it, one for each class")
    else:
        labelled = standard_set(name, training)
        classes = labelled.classes
    return Pictures(labelled, size, [c.replace("_", " ") for c in classes])
