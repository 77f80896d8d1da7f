"""What commands about pictures share: finding image files, and drawing a sheet of images."""

import math
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cli import check, output_file, write_file
from eval import images_in

GAP, LINE = 16, 19  # pixels between images, and from one line of text to the next
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
picture_file = output_file(*FORMATS)  # a type for argparse


def image_files(paths, out=None):
    """Image files, and folders with all images in them -> list of files, each real file once. out:
    the picture to draw, which must not be one of them."""
    files = {}
    for path in map(Path, paths):
        found = images_in(path) or [path] * path.is_file()
        check(found, f"there is no image file or folder of images {path}")
        for file in found:
            files.setdefault(file.resolve(), file)
    check(not out or out.resolve() not in files, f"--out would overwrite the image {out}")
    return [*files.values()]


def load_font(size):
    """Pillow's own font, in pixels. Before Pillow 10.1 it has one size only."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def wrap(text, font, width, lines):
    """text -> at most `lines` lines of at most `width` pixels, as a list. The last one may end in
    "…"."""
    text = " ".join(text.split())[: lines * width]  # a character is at least a pixel wide
    for characters in range(width // 3, 0, -1):
        wrapped = textwrap.wrap(text, characters, max_lines=lines, placeholder="…")
        if all(font.getlength(line) <= width for line in wrapped):
            break
    return wrapped


def contact_sheet(images, captions, path, columns=4, legend=""):
    """Draw images with a caption of up to four lines below each, and a legend below all of them.

    images: list of uint8 tensors (3, S, S); captions: as many strings; path: the picture to write,
    whose suffix tells its format.
    """
    side, font = images[0].shape[-1], load_font(15)
    captions = [wrap(caption, font, side, lines=4) for caption in captions]
    columns = min(columns, len(images))
    width, height = side + GAP, side + GAP + LINE * max(map(len, captions))
    bottom = GAP + math.ceil(len(images) / columns) * height
    legend = wrap(legend, font, columns * width, lines=12)
    size = GAP + columns * width, bottom + LINE * len(legend)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, captions)):
        x, y = GAP + i % columns * width, GAP + i // columns * height
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), (x, y))
        pen.multiline_text((x, y + side + 4), "\n".join(lines), "black", font)
    pen.multiline_text((GAP, bottom - GAP // 2), "\n".join(legend), "black", font)
    format = FORMATS[Path(path).suffix.lower()]
    write_file(path, lambda file: sheet.save(file, format))
