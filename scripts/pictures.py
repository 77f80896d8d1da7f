"""Pictures of the commands in this folder: those that a user names, and those that they draw."""

import math
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from common.cli import check, output_file
from common.images import images_below
from common.machine import write_file


def image_files(paths):
    """Return a list of image files. paths: files, and folders that are searched to the bottom."""
    files = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else images_below(path)
        check(found, f"there is no image file or folder of images {path}")
        files += found
    return files


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
