"""Draw assets/first.png, what a trained model says of four scenes and where it sees it:

    python -m docs.first

The scenes are the first four validation pictures of the built-in world, so nobody has chosen them.
The model is assets/tiny.pt. Nothing else is needed, neither data nor matplotlib.

Below each scene stands its caption, which the model does not get, and the five words that the word
head finds most probable. A word is red if the caption has it. Words of a colour or a shape get a
frame: the part of the picture without which the word is least probable.
"""

import textwrap
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import data
import eval as evaluation
import scenes
from cli import make_parser, run_command
from scripts import words

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SCENES = 4
WORDS = 5  # of a scene
THINGS = {*scenes.COLOURS, *scenes.SHAPES}  # words that have a place

# In pixels. The sheet is twice as wide as a README.
SIDE, GAP = 384, 32  # of a scene, and between two
TOP_OF_WORDS = GAP + SIDE + 4 * 44  # below a caption of three lines
LINE = 44
NAME = 132  # the width of a word
BAR = 1000  # the length of a bar for a probability of 1
INK, GREY, PALE, RED = "#1f2937", "#6b7280", "#cbd0d8", "#d1495b"
LARGE, SMALL = ImageFont.load_default(34), ImageFont.load_default(29)


def find_places(model, image, said):
    """image (3, S, S), said: its words as eval.top_words gives them. Returns a dict of (row,
    column) of a window of patches -> list of the colours and shapes that are seen there."""
    window = words.default_window(model)
    falls, _ = words.word_maps(model, image, [i for _, _, i in said], window)
    windows = model.visual.grid - window + 1  # along a side
    places = defaultdict(list)
    for (word, _, _), fall in zip(said, falls):
        if word in THINGS:
            place = divmod(int(fall.argmax()), windows)
            places[place].append(word)
    return places


def draw_frames(picture, places, patch, side):
    """Draw a frame for each place, with its words beside it. patch, side: pixels of a patch and of
    a frame."""
    pen = ImageDraw.Draw(picture)
    for (row, column), seen in places.items():
        x, y = column * patch, row * patch
        frame = x, y, x + side - 1, y + side - 1
        pen.rectangle(frame, outline="white", width=8)
        pen.rectangle(frame, outline=INK, width=3)
        at, anchor = x + side + 16, "lm"
        if x + side / 2 > SIDE / 2:
            at, anchor = x - 16, "rm"  # to the left of a frame in the right half
        middle = at, y + side / 2
        text = "\n".join(seen)
        pen.text(middle, text, INK, SMALL, anchor, stroke_width=6, stroke_fill="white")


def draw_words(pen, x, said, true_ids):
    """A line for each word, with a bar as long as it is probable."""
    y = TOP_OF_WORDS
    for word, p, i in said:
        start = x + NAME + 14
        is_true = i in true_ids
        pen.text((x + NAME, y), word, RED if is_true else GREY, LARGE, "rm")
        pen.rectangle((start, y - 13, start + BAR * p, y + 13), fill=RED if is_true else PALE)
        y += LINE


def draw(model, tokenizer):
    """The sheet, as a PIL image."""
    patch = SIDE // model.visual.grid
    side = patch * words.default_window(model)
    sheet = Image.new("RGB", (GAP + SCENES * (SIDE + GAP), TOP_OF_WORDS + WORDS * LINE), "white")
    pen = ImageDraw.Draw(sheet)
    x = GAP
    for _, scene, _, caption in scenes.make_samples("val", range(SCENES)):
        jpeg = scenes.jpeg(scenes.draw(scene))  # what a shard holds
        image = data.load_image(jpeg, model.config.image_size)
        [said] = evaluation.top_words(model, tokenizer, image[None], WORDS)
        picture = scenes.draw(scene, SIDE)
        draw_frames(picture, find_places(model, image, said), patch, side)
        sheet.paste(picture, (x, GAP))
        pen.multiline_text((x, GAP + SIDE + 12), textwrap.fill(caption, 27), GREY, SMALL)
        draw_words(pen, x, said, tokenizer.encode(caption))
        x += SIDE + GAP
    return sheet


def main(argv):
    make_parser(__doc__).parse_args(argv)
    model, tokenizer, _ = evaluation.load(ASSETS / "tiny.pt")
    draw(model, tokenizer).save(ASSETS / "first.png")
    print(f"wrote {ASSETS / 'first.png'}")


if __name__ == "__main__":
    run_command(main)
