"""Draw assets/found.png, what the study found, as a line from CLIP to SuperCLIP for each seed:

    python -m docs.found

The rows are rows of study/results.md, with its numbers. The file holds them as a text, too, in its
field Description.
"""

import matplotlib
from matplotlib import pyplot as plt

from cli import make_parser, run_command
from docs.figures import ASSETS, GREY, INK, PALE, RED, STYLE, save
from study import compare, plan

# A panel: its title, its score, chance in percent, and {name of a row: its label and a note}.
PANELS = (
    (
        "Drawn scenes: colour and shape named right, of 64 combinations",
        "colour_shape",
        100 / 64,
        {
            "batch32": ("batch 32", "48,000 pairs shown"),
            "long": ("batch 32, three times as long", "144,000 pairs shown"),
            "short": ("batch 32, short captions only", "48,000 pairs, as in the rows below"),
            "batch8": ("batch 8", "so four times the steps of batch 32"),
            "groups64": ("batch 64", "so half the steps of batch 32"),
            "groups4": ("batch 64, in groups of 4", "an image is compared with 4 captions"),
        },
    ),
    (
        "Photographs of a shop: type of product named right, of 10",
        "type",
        100 / 10,
        {
            "4000": ("4,000 photographs", "one split, shown 24 times"),
            "24000": ("24,000 photographs", "one split, shown 12 times, five seeds"),
        },
    ),
)
MARKS = {  # of the three sides of a row
    "CLIP at its best learning rate": dict(color=INK, mew=0),
    "SuperCLIP at CLIP's best rate": dict(color=RED, mfc="white"),
    "SuperCLIP at its own best rate": dict(color=RED, mew=0),
}
NO_GAIN = "no gain seen"


def sides_of(study, name):
    """CLIP, SuperCLIP at CLIP's rate, and SuperCLIP at its own. The second is None if it has not
    run, or if both rates are the same."""
    sides = None
    if f"{name}_head" in plan.ROWS:
        sides = plan.three_sides(study, name)
    if sides is None:
        clip, superclip = plan.sides_of(study, name)
        sides = clip, None, superclip
    return sides


def texts_of(sides, score):
    """What stands beside a row: a headline, and lines of details."""
    clip, at_clips_rate, superclip = sides
    means, gain = compare.cell((clip, superclip), score).split(", ")
    if gain.startswith("**"):  # the interval excludes 0
        texts = [gain.strip("*"), means]
    else:
        texts = [NO_GAIN, f"{means}, {gain}"]
    if at_clips_rate:
        _, gain = compare.cell((clip, at_clips_rate), score).split(", ")
        texts.append(f"at CLIP's rate {gain.strip('*')}")
    return texts


def draw_seeds(axis, y, sides, score):
    """A line for each seed, the one with the weakest CLIP on top. The next row is at y + 1."""
    runs = {name: side.runs for name, side in zip(MARKS, sides) if side}
    seeds = sorted([compare.value_of(run, score) for run in seed] for seed in zip(*runs.values()))
    n = len(seeds)
    heights = [y + 0.64 * ((i + 0.5) / n - 0.5) for i in range(n)]
    columns = [*zip(*seeds)]
    for name, values in zip(runs, columns):
        axis.plot(values, heights, "o", ms=4, clip_on=False, label=name, **MARKS[name])
    axis.hlines(heights, columns[0], columns[-1], color=PALE, lw=1.3, zorder=1, label="one seed")


def write(axis, x, y, align, upper, lower, colour=INK):
    """Two texts beside a row, the upper one in bold. x is a part of the width of the axes."""
    at = dict(transform=axis.get_yaxis_transform(), ha=align)
    axis.text(x, y - 0.02, upper, va="bottom", weight="bold", color=colour, **at)
    axis.text(x, y + 0.06, lower, va="top", color=GREY, fontsize=9, **at)


def draw(study):
    """Returns the texts of all rows."""
    texts = []
    heights = [len(rows) for *_, rows in PANELS]
    figure, axes = plt.subplots(2, 1, figsize=(8.5, 7.2), height_ratios=heights)
    figure.subplots_adjust(left=0.345, right=0.755, top=0.87, bottom=0.04, hspace=0.25)
    for axis, (title, score, chance, rows) in zip(axes, PANELS):
        axis.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.6), yticks=[])
        axis.spines["left"].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.xaxis.set_major_formatter("{x:.0f} %")
        axis.axvline(chance, color=GREY, lw=1, ls=":")
        axis.text(chance + 1.5, -0.5, f"chance {chance:.2g} %", color=GREY, fontsize=9, va="top")
        write(axis, -0.8, -0.6, "left", title, "")
        write(axis, 1.07, -0.6, "left", "gain, 95 % interval", "")
        for y, (name, (label, note)) in enumerate(rows.items()):
            sides = sides_of(study, name)
            headline, *details = texts_of(sides, score)
            draw_seeds(axis, y, sides, score)
            write(axis, -0.05, y, "right", label, note)
            colour = INK if headline == NO_GAIN else RED
            write(axis, 1.07, y, "left", headline, "\n".join(details), colour)
            texts.append(f"{label}: {headline}, {', '.join(details)}")
    # every row has named its marks: one of each name is enough
    marks, names = axes[0].get_legend_handles_labels()
    key = dict(zip(names, marks))
    figure.legend(key.values(), key.keys(), loc="upper center", ncols=2, frameon=False)
    return texts


def main(argv):
    make_parser(__doc__).parse_args(argv)
    matplotlib.use("Agg")
    plt.rcParams.update(STYLE)
    texts = draw(compare.Study(1, plan.RUNS))
    save(ASSETS / "found.png", "\n".join(texts))


if __name__ == "__main__":
    run_command(main)
