"""Draw assets/found.png, what the study found:

    python -m docs.found

It has a line from CLIP to SuperCLIP for each seed. Its rows are rows of study/results.md, with
their numbers.
"""

from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from PIL import Image

from cli import make_parser, run_command
from study import compare, plan

PICTURE = Path(__file__).resolve().parent.parent / "assets" / "found.png"
INK, GREY, PALE, RED = "#1f2937", "#6b7280", "#cbd0d8", "#d1495b"
# A panel: its title, its score, chance in percent, and {name of a row: a note}.
PANELS = (
    (
        "Drawn scenes: colour and shape named right, of 64 combinations",
        "colour_shape",
        1.6,
        {
            "batch32": "48,000 pairs shown",
            "long": "batch 32, three times as long",
            "short": "batch 32, 48,000 pairs, as below",
            "batch8": "so four times the steps of batch 32",
        },
    ),
    (
        "Photographs of a shop: type of product named right, of 10",
        "type",
        10,
        {"shop": "shown 12 times, a split for each seed"},
    ),
)
STYLES = {  # of the sides of a row
    "CLIP at its best learning rate": dict(color=INK, mew=0),
    "SuperCLIP at its own best rate": dict(color=RED, mew=0),
    "SuperCLIP at CLIP's best rate": dict(color=RED, mfc="white"),
}


def sides_of(study, name):
    """The sides of a row, as many as have styles."""
    sides = plan.sides_of(study, name)
    if f"{name}_head" in plan.ROWS:
        sides.append(plan.sides_of(study, f"{name}_head")[1])
    return sides


def texts_of(sides, score):
    """What stands beside a row: its gain, or that none was seen, and details."""
    means, gain = compare.cell(sides[:2], score).split(", ")
    if not gain.startswith("**"):  # the interval includes 0
        return "no gain seen", f"{means}, {gain}"
    texts = [means]
    for side in sides[2:]:
        _, at_clips_rate = compare.cell([sides[0], side], score).split(", ")
        texts.append(f"at CLIP's rate {at_clips_rate.strip('*')}")
    return gain.strip("*"), "\n".join(texts)


def draw_seeds(axis, y, sides, score):
    """A line for each seed, the one with the weakest CLIP on top. The next row is at y + 1."""
    columns = [[compare.value_of(run, score) for run in side.runs] for side in sides]
    columns = [*zip(*sorted(zip(*columns)))]
    n = len(columns[0])
    heights = [y - 0.3 + 0.6 * i / n for i in range(n)]
    axis.hlines(heights, columns[0], columns[1], color=PALE, lw=1.3)
    for style, values in zip(STYLES.values(), columns):
        axis.plot(values, heights, "o", ms=4, clip_on=False, **style)


def write(axis, x, y, align, upper, lower="", colour=INK):
    """Two texts beside a row, the upper one in bold. x is a part of the width of the axes."""
    at = dict(transform=axis.get_yaxis_transform(), ha=align)
    axis.text(x, y - 0.02, upper, va="bottom", weight="bold", color=colour, **at)
    axis.text(x, y + 0.06, lower, va="top", color=GREY, fontsize=9, **at)


def draw(study):
    heights = [len(rows) for *_, rows in PANELS]
    figure, axes = plt.subplots(2, 1, figsize=(8.9, 6.8), height_ratios=heights)
    figure.subplots_adjust(left=0.33, right=0.725, top=0.87, bottom=0.04, hspace=0.25)
    for axis, (title, score, chance, rows) in zip(axes, PANELS):
        axis.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.6), yticks=[])
        axis.spines[["left", "top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter("{x:.0f} %")
        axis.axvline(chance, color=GREY, lw=1, ls=":")
        axis.text(chance + 1.5, -0.5, f"chance {chance} %", color=GREY, fontsize=9, va="top")
        write(axis, -0.8, -0.6, "left", title)
        write(axis, 1.07, -0.6, "left", "gain, 95 % interval", "rounded last")
        for y, (name, note) in enumerate(rows.items()):
            sides = sides_of(study, name)
            gain, details = texts_of(sides, score)
            draw_seeds(axis, y, sides, score)
            write(axis, -0.05, y, "right", plan.ROWS[name][0], note)
            colour = INK if gain == "no gain seen" else RED
            write(axis, 1.07, y - 0.05, "left", gain, details, colour)
    for label, style in STYLES.items():
        axis.plot([], [], "o", ms=4, label=label, **style)
    axis.plot([], [], color=PALE, label="one seed")
    figure.legend(loc="upper center", ncols=2, frameon=False)


def main(argv):
    make_parser(__doc__).parse_args(argv)
    matplotlib.use("Agg")
    plt.rcParams.update({"font.size": 11, "text.color": INK, "xtick.color": INK})
    draw(compare.Study(1, plan.RUNS))
    plt.savefig(PICTURE, dpi=200)
    # 64 colours are enough, and make the file a third as large
    image = Image.open(PICTURE).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    image.save(PICTURE, optimize=True)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    run_command(main)
