"""Files of images: how one becomes pixels, and how eval.py and scripts/ read many in order."""

import io
import math
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from common.cli import InputError, check, progress
from common.processes import make_loader, to_shared_memory
from common.shards import cache_folder

# The formats of web images. Pillow reads more, and for some it starts other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 100_000_000  # A file that claims more may be small, and still fill the memory.
# Pillow warns of odd metadata, and of large images, which load_image refuses by itself.
warnings.filterwarnings("ignore", module="PIL")


class BadSample(Exception):
    """An image or a caption that cannot be used. The message says why."""


# -----------------------------------------------------------------------------
# From a file to pixels


def centre_box(width, height, w, h):
    """Return the box of w x h pixels in the centre of an image, as x0, y0, x1 and y1."""
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def centre_square(width, height):
    side = min(width, height)
    return centre_box(width, height, side, side)


def load_image(picture, size, crop=centre_square):
    """Return a picture as uint8 (3, size, size), cropped and resized, bicubic with antialiasing.

    The picture may be the path or the bytes of an image file, or an image of Pillow, which stays as
    it is. `crop` chooses the box to keep. Raise BadSample if the picture cannot be read."""
    if isinstance(picture, Image.Image):
        image = picture
        box = crop(*image.size)
    else:
        file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
        with only_pillow():
            image = Image.open(file, formats=FORMATS)  # reads the header
        if image.width * image.height > MAX_PIXELS:
            raise BadSample(f"the image has more than {MAX_PIXELS:,} pixels")
        box = decode_smaller(image, crop(*image.size), size)
    with only_pillow():
        image.load()  # decode the pixels
    image = upright_rgb(image.crop(box))
    # The three values of a pixel stay side by side in memory, as decoded, and stay uint8.
    # torchvision's resize gives the same bits, but takes 7 to 9 % longer.
    pixels = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]


@contextmanager
def only_pillow():
    """Turn every error in the block into BadSample, because Pillow raises many kinds. The block
    calls Pillow alone, so that a mistake in our code, or in that of a fork, shows its trace."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition(" <")[0]  # without an address in memory
        raise BadSample(f"the image cannot be decoded: {reason}") from None


def decode_smaller(image, box, size):
    """Let the decoder shrink a JPEG if the box has at least twice as many pixels a side as needed,
    which saves most of its time. Return the box in the pixels that will be decoded."""
    x0, y0, x1, y1 = box
    width, height = image.size
    scale = max(size / (x1 - x0), size / (y1 - y0))
    if scale > 0.5:
        return box
    with only_pillow():
        image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
    # The factor by which `draft` has shrunk the image: 1, 2, 4 or 8. Round the quotient, because
    # sizes are rounded up: 193 pixels become 25.
    factor = 2 ** round(math.log2(width / image.width))
    return [side / factor for side in box]


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
# Pictures in order


@dataclass
class Pictures(Dataset):
    """Read pictures. An item is pixels (3, size, size) and a label. If the picture cannot be read,
    a message names it, and the item is (None, None).

    labelled[i] is a picture, as load_image takes it, and its label. So `labelled` may be a list of
    files with their labels, a data set of torchvision, or data.Samples, whose labels are lists of
    captions. If the labels are numbers of classes, `classes` has the names.
    """

    labelled: object
    size: int
    classes: list | None = None

    def __len__(self):
        return len(self.labelled)

    def __getitem__(self, i):
        try:
            picture, label = self.labelled[i]
            return load_image(picture, self.size), label
        except BadSample as error:
            tqdm.write(f"skipped {self.name(i)}: {error}")
            return None, None

    def name(self, i):
        """Return what messages call a picture: its path, or SHARD:KEY of a sample."""
        if isinstance(self.labelled, list):
            path, _ = self.labelled[i]
            return str(path)
        if hasattr(self.labelled, "name"):
            return self.labelled.name(i)
        return f"picture {i}"


def readable_batches(pictures, batch_size, workers):
    """Yield Pictures in batches, without those that cannot be read: pixels, uint8 (B, 3, S, S), and
    a list of B labels."""
    loader = make_loader(pictures, workers, batch_size=batch_size, collate_fn=stack_readable)
    for pixels, labels in progress(loader, "encoding", unit="batch"):
        if labels:
            yield pixels, labels


def stack_readable(items):
    """Return the pixels and the labels of the items that can be read."""
    items = [(pixels, label) for pixels, label in items if pixels is not None]
    if not items:
        return None, []
    pixels, labels = zip(*items)
    # Stack in the loading process, because each tensor on its way out of it keeps a file open.
    pixels = torch.stack(pixels)
    to_shared_memory(pixels)
    return pixels, list(labels)


# -----------------------------------------------------------------------------
# Pictures with classes

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")
HIDDEN = (".", "__")  # begin what programs hide from people: .ipynb_checkpoints, __MACOSX in a zip
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


def class_pictures(name, size, training=False):
    """Return Pictures with classes. The name is that of a folder with a folder of images for each
    class, or else of one of the STANDARD_SETS, which have images for training and for tests. A
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


def images_below(folder):
    """Return a sorted list of the image files in and below a folder, without hidden ones."""

    def is_hidden(path):
        return any(part.startswith(HIDDEN) for part in path.relative_to(folder).parts)

    paths = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    return sorted(path for path in paths if path.is_file() and not is_hidden(path))


def standard_set(name, training):
    """Return one of the STANDARD_SETS, whose items are (image of Pillow, number of its class).
    Download it into the cache folder, unless it is there."""
    check(name in STANDARD_SETS, f"{name} is no folder, and none of {[*STANDARD_SETS]}")
    from torchvision import datasets  # only here, because this import is slow

    kind, for_training, for_tests = STANDARD_SETS[name]
    options = for_training if training else for_tests
    try:
        return getattr(datasets, kind)(cache_folder() / "datasets", download=True, **options)
    except Exception as error:  # the network and torchvision raise many kinds
        raise InputError(f"{name} can neither be read nor downloaded: {error}") from error
