"""Pictures: which files are read, how to find them and turn them upright, how to draw a sheet."""

import math
import textwrap
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.cli import check, output_file
from common.machine import write_file

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


def image_files(paths):
    """Return a list of image files. paths: files, and folders that are searched to the bottom."""
    files = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else images_below(path)
        check(found, f"there is no image file or folder of images {path}")
        files += found
    return files


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


GAP, LINE = 16, 19  # pixels between images, and from one line of text to the next
LETTER = 8  # pixels: about the width of a letter in Pillow's own font, which is 15 pixels high
picture_file = output_file(".png")  # a type for argparse


def contact_sheet(images, captions, path, columns=4):
    """Draw images into a PNG file, with a caption of up to five lines below each. images: list of
    uint8 tensors (3, S, S); captions: list of as many strings."""
    side = images[0].shape[-1]
    font = ImageFont.load_default(15)
    wrapped = [textwrap.wrap(text, side // LETTER, max_lines=5) for text in captions]
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width = side + GAP
    height = side + GAP + LINE * max(map(len, wrapped))
    sheet = Image.new("RGB", (GAP + columns * width, GAP + rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped)):
        row, column = divmod(i, columns)
        x = GAP + column * width
        y = GAP + row * height
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (x, y))
        pen.multiline_text((x, y + side + 4), "\n".join(lines), "black", font)
    write_file(path, lambda file: sheet.save(file, "PNG"))
