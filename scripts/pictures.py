"""Pictures of the commands in this folder: those that they read, and the sheet that they draw."""

import math
import textwrap
import unicodedata
from contextlib import suppress

from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

import data
import eval as evaluation
from common.cli import check, write_file
from common.run import validation_of
from common.shards import find_shards


class Pictures(Dataset):
    """Read pictures. An item is (uint8 tensor (3, S, S), its number), with None in place of the
    tensor if the picture cannot be read. files: list of paths; samples: data.Samples, or None, in
    place of files; size: S, pixels a side."""

    def __init__(self, files, samples, size):
        self.files = files
        self.samples = samples
        self.size = size

    def __len__(self):
        return len(self.files if self.samples is None else self.samples)

    def __getitem__(self, i):
        if self.samples is None:
            return evaluation.read_image(self.files[i], self.size), i
        image, _ = evaluation.SampleImages(self.samples, self.size)[i]
        return image, i

    def title(self, i):
        """Return the path of a file, or the first caption of a sample."""
        return str(self.files[i]) if self.samples is None else self.samples.captions(i)[0]


def find_pictures(path, checkpoint, size):
    """Return the Pictures at a path, which is a file, or a folder that is searched to the bottom.
    If path is None, return the validation pictures of the run that wrote the checkpoint."""
    if path is None:
        shards, captions = validation_of(checkpoint, option="--images")
        return Pictures([], data.Samples(find_shards(shards), captions), size)
    files = [path] if path.is_file() else evaluation.images_below(path)
    check(files, f"there is no image file or folder of images {path}")
    return Pictures(files, None, size)


GAP, LINE = 16, 19  # pixels between images, and from one line of text to the next
LETTER = 8  # pixels: about the width of a letter


def find_font():
    """Return a font of Linux, macOS or Windows that has the letters of most alphabets, or None if
    the system has neither."""
    for name in ("DejaVuSans.ttf", "Arial.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, 13)


def without_accents(text):
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def contact_sheet(images, captions, path, columns=4):
    """Draw images into a PNG file, with a caption of up to five lines below each. images: list of
    uint8 tensors (3, S, S); captions: list of as many strings."""
    side = images[0].shape[-1]
    font = find_font()
    if font is None:  # Pillow's own font has no letters beyond ASCII
        font = ImageFont.load_default(15)
        captions = map(without_accents, captions)
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
