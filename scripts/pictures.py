"""Pictures of the commands in this folder: those that they read, and the sheet that they draw."""

import math
import textwrap
from contextlib import suppress

from PIL import Image, ImageDraw, ImageFont

import data
from common.cli import check, write_file
from common.images import Pictures, images_below


class NumberedPictures(Pictures):
    """Pictures whose labels are their numbers, also of those that cannot be read."""

    def __getitem__(self, i):
        pixels, _ = super().__getitem__(i)
        return pixels, i

    def title(self, i):
        """Return the path of a file, or the first caption of a sample."""
        _, titles = self.labelled[i]
        return titles[0]


def find_pictures(path, options, size):
    """Return the NumberedPictures at a path, which is a file, or a folder that is searched to the
    bottom. If path is None, return the validation pictures of the run with these options."""
    if path is None:
        shards = options.get("val_shards")
        check(shards, "the checkpoint names no validation shards. Name pictures with --images.")
        return NumberedPictures(data.open_samples(shards, options["val_captions"]), size)
    files = [path] if path.is_file() else images_below(path)
    check(files, f"there is no image file or folder of images {path}")
    return NumberedPictures([(file, [str(file)]) for file in files], size)


SIDE = 240  # pixels of an image on a sheet
GAP, LINE = 16, 19  # pixels between images, and from one line of text to the next
LETTER = 8  # pixels: about the width of a letter


def find_font():
    """Return a font that has the letters of most alphabets, or else Pillow's."""
    for name in ("DejaVuSans.ttf", "Arial.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, 13)
    return ImageFont.load_default(13)


def contact_sheet(images, captions, path, columns=4):
    """Draw images into a PNG file, with a caption of up to five lines below each. images: list of
    uint8 tensors (3, S, S); captions: list of as many strings."""
    side = images[0].shape[-1]
    font = find_font()
    wrapped = [textwrap.wrap(text, side // LETTER, max_lines=5) for text in captions]
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
