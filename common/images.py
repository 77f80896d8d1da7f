"""Pictures: which files are read, how to find them, and how to turn them upright."""

from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Pillow refuses an image with more than twice this number of pixels. It may be a bomb, a small file
# that fills the memory.
Image.MAX_IMAGE_PIXELS = 50_000_000
# These formats are those of web images. Pillow reads more, and for some it starts other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")


def is_hidden(name):
    """Return whether this is the name of a file or folder that programs hide from people. Examples
    are .ipynb_checkpoints, and __MACOSX in a zip that was made on a Mac."""
    return name.startswith((".", "__"))


def images_below(folder):
    """Return a sorted list of the image files in and below a folder, without hidden ones."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in SUFFIXES]
    return [file for file in files if not any(map(is_hidden, file.relative_to(folder).parts))]


def upright_rgb(image, box=None):
    """Return an image of Pillow as RGB, turned as its EXIF data says, with transparent parts white.
    box (x0, y0, x1, y1): the part of it to return, by default all."""
    image = image.crop(box)
    with suppress(Exception):  # keep a picture whose EXIF data is damaged
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8 and not scale
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
