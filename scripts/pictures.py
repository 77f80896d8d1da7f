"""Drawing that commands share: text that fits, a sheet of captioned images, a picture's file."""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import data
from superclip import check

GAP, LINE = 16, 19  # pixels between images, and from one line of text to the next
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def fit(text, font, width):
    """The text, or as much of its beginning as fits into `width` pixels, with "…" at the end."""
    if font.getlength(text) <= width:
        return text
    text = text[: int(width)]  # a character is at least a pixel wide: no need to measure more
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text, font, width, lines):
    """text -> list of at most `lines` lines of `width` pixels. The last one may end in "…"."""
    words, wrapped = text.split(), []
    while words and len(wrapped) < lines - 1:
        n = 1  # words in this line; a single word that is too wide is shortened
        while n < len(words) and font.getlength(" ".join(words[: n + 1])) <= width:
            n += 1
        wrapped.append(fit(" ".join(words[:n]), font, width))
        words = words[n:]
    return wrapped + [fit(" ".join(words), font, width)] * bool(words)


def contact_sheet(images, captions, path, columns=4):
    """Draw images with a caption of up to four lines below each, and write the picture to `path`.

    images: list of uint8 tensors (3, S, S); captions: as many strings. Raises InputError.
    """
    side, font = images[0].shape[-1], ImageFont.load_default(size=15)
    captions = [wrap(caption, font, side, 4) for caption in captions]
    columns = min(columns, len(images))
    width, height = side + GAP, side + GAP + LINE * max(map(len, captions))
    size = GAP + columns * width, GAP + math.ceil(len(images) / columns) * height
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, captions)):
        x, y = GAP + i % columns * width, GAP + i // columns * height
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), (x, y))
        pen.multiline_text((x, y + side + 4), "\n".join(lines), "black", font)
    save_picture(sheet, path)


def picture_format(path):
    """The image format that a path's suffix stands for. Raises InputError if no picture can be
    written there. A command calls it early, before the work that leads to the picture."""
    path = Path(path)
    check(path.suffix.lower() in FORMATS, f"{path} must end in {', '.join(FORMATS)}")
    check(path.parent.is_dir(), f"there is no folder {path.parent}")
    return FORMATS[path.suffix.lower()]


def save_picture(picture, path):
    """Write a PIL image. Raises InputError."""
    format = picture_format(path)
    data.write_file(path, lambda file: picture.save(file, format))
