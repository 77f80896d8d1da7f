"""Draw the pictures of the pages:

    python -m docs.figures

first.png shows the first four validation scenes, which nobody has chosen, and the five words that
assets/tiny.pt finds most probable in each. A word is red if the caption has it. The frame of a word
is the part of the picture without which the word is least probable. scenes.png shows the first
eight scenes of the tutorial. In found.png a bar is the mean over the seeds, and a dot is one seed.
The tutorial has the commands that draw curve.png and words.png. The SVG files are drawn by hand.
"""

import random
import textwrap
from collections import defaultdict
from pathlib import Path
from statistics import mean

from matplotlib import pyplot as plt
from matplotlib.patheffects import withStroke

import data
import eval as evaluation
from common import scenes
from common.cli import make_parser, run_command
from common.images import contact_sheet
from scripts import words
from study import plan

ASSETS = Path(__file__).resolve().parent.parent / "assets"
INK, GREY, RED, AMBER = "#1f2937", "#7d8694", "#d1495b", "#f0a500"


def draw_frames(axis, model, image, said):
    """Frame the places of colours and shapes. The frame of a word is the window of patches without
    which the word is least probable. said: what top_words returns for the image."""
    grid = model.visual.grid
    window = words.default_window(model)
    falls, _ = words.word_maps(model, image, [i for _, _, i in said], window)
    places = defaultdict(list)  # row and column of a window -> the words in its frame
    for (word, _, _), fall in zip(said, falls):
        if word in {*scenes.COLOURS, *scenes.SHAPES}:
            places[divmod(int(fall.argmax()), grid - window + 1)].append(word)
    white_edge = [withStroke(linewidth=4, foreground="white")]
    for (row, column), seen in places.items():
        look = dict(fill=False, ec=INK, lw=2, path_effects=white_edge)
        axis.add_patch(plt.Rectangle((column, row), window, window, **look))
        x, side = column - 0.2, "right"
        if column < grid / 2:
            x, side = column + window + 0.2, "left"
        look = dict(ha=side, va="center", color=INK, path_effects=white_edge)
        axis.text(x, row + window / 2, "\n".join(seen), **look)


def draw_first():
    model, tokenizer, _ = evaluation.load(ASSETS / "tiny.pt")
    grid = model.visual.grid
    _, axes = plt.subplots(2, 4, figsize=(10, 4.4), height_ratios=(2, 1), layout="constrained")
    for i, scene, _, caption in scenes.make_samples("val", range(4)):
        picture, bars = axes[:, i]
        image = data.load_image(scenes.draw(scene), model.config.image_size)
        [said] = evaluation.top_words(model, tokenizer, image[None], 5)
        picture.imshow(scenes.draw(scene, 384), extent=(0, grid, grid, 0))
        picture.set_title(textwrap.fill(caption, 26), fontsize=10, loc="left")
        picture.axis("off")
        draw_frames(picture, model, image, said)
        true = tokenizer.encode(caption)
        colours = [RED if i in true else GREY for _, _, i in said]
        bars.barh([word for word, _, _ in said], [p for _, p, _ in said], color=colours, height=0.6)
        bars.invert_yaxis()
        bars.set(xlim=(0, 0.25), xticks=[], frame_on=False)
        bars.tick_params(length=0)
    plt.savefig(ASSETS / "first.png", dpi=130)


def draw_scenes():
    """Draw the first eight of the tutorial's scenes with their long captions."""
    rng = random.Random(0)
    drawn = [scenes.make_scene(rng, scenes.SEEN) for _ in range(256)]
    captions = [scenes.describe(scene, rng)[1] for scene in drawn]
    images = [data.load_image(scenes.draw(scene, 240), 240) for scene in drawn[:8]]
    contact_sheet(images, captions[:8], ASSETS / "scenes.png")


# A model: the colour of its bars, and their place in a group
ARMS = {"CLIP": (INK, -0.29), "control": (GREY, 0), "SuperCLIP": (RED, 0.29)}
# A panel: its title, the name of its scale, chance in percent, and {group of bars: row, score}
PANELS = (
    ("Mixed captions, by length of the run", "colour + shape right (%)", 1.6, {
        "24,000\npairs": ("mixed, 24,000", "colour_shape"),
        "32,000\npairs": ("mixed, 32,000", "colour_shape"),
        "48,000\npairs": ("mixed, 48,000", "colour_shape"),
    }),
    ("After 32,000 pairs", "", 1.6, {
        "short\ncaptions": ("short, 32,000", "colour_shape"),
        "mixed\ncaptions": ("mixed, 32,000", "colour_shape"),
        "long\ncaptions": ("long, 32,000", "colour_shape"),
        "mixed,\nbatch 8": ("mixed, 32,000, batch 8", "colour_shape"),
    }),
    ("Photographs", "type of product right (%)", 10, {
        "zero-shot": ("photographs, 6 epochs, again", "type"),
        "linear\nprobe": ("photographs, 6 epochs, again", "probe, class token"),
    }),
)  # fmt: skip


def scores_of(row, score):
    """Return {model: its scores, one for each seed}."""
    return {model: [*plan.values_of(f"{model}, {row}", score).values()] for model in ARMS}


def draw_group(axis, place, row, score):
    for model, values in scores_of(row, score).items():
        colour, shift = ARMS[model]
        x = place + shift
        axis.bar(x, mean(values), 0.27, color=colour, label=model)
        axis.plot([x] * len(values), values, "o", ms=3, color="white", mec=INK, mew=0.5)
        axis.text(x, 4, f"{mean(values):.0f}", ha="center", color="white", weight="bold")
    if score.startswith("probe"):  # the untrained tower is the same for all models
        [values, *_] = scores_of(row, score.replace("probe,", "probe, untrained")).values()
        ends = (place - 0.45, place + 0.45)
        axis.hlines(mean(values), *ends, color=AMBER, lw=2, ls=":", label="untrained tower")


def draw_found():
    look = dict(figsize=(11, 4), width_ratios=(3, 4, 2), layout="constrained")
    figure, axes = plt.subplots(1, 3, sharey=True, **look)
    legend = {}  # name -> what the legend shows beside it
    for axis, (title, scale, chance, rows) in zip(axes, PANELS):
        for place, row in enumerate(rows.values()):
            draw_group(axis, place, *row)
        axis.axhline(chance, color=INK, lw=1, ls=":", label="chance")
        axis.set(title=title, ylabel=scale, ylim=(0, 102))
        axis.set_xticks(range(len(rows)), rows)
        axis.spines[["top", "right"]].set_visible(False)
        handles, names = axis.get_legend_handles_labels()
        legend.update(zip(names, handles))
    figure.legend(legend.values(), legend, loc="outside upper center", ncols=5, frameon=False)
    plt.savefig(ASSETS / "found.png", dpi=130)


def main(argv):
    make_parser(__doc__).parse_args(argv)
    draw_first()
    draw_scenes()
    draw_found()


if __name__ == "__main__":
    run_command(main)
