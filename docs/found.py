"""Draw what the study found, into assets/:

    python -m docs.found

found.png has a line from CLIP to SuperCLIP for each seed. Its rows are rows of study/results.md,
with their numbers, and the file holds them as a text, too, in its field Description. study.png has
each learning rate that the study has tried.
"""

from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib import pyplot as plt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cli import make_parser, run_command
from study import compare, plan

ASSETS = Path(__file__).resolve().parent.parent / "assets"
INK, GREY, PALE, RED = "#1f2937", "#6b7280", "#cbd0d8", "#d1495b"
STYLE = {
    "font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "axes.titlelocation": "left", "figure.facecolor": "white",
}  # fmt: skip
matplotlib.use("Agg")
plt.rcParams.update(STYLE)


def save(path, text=""):
    """Writes the figure that was drawn last, with a text in its field Description. 64 colours are
    enough, and make the file a third as large."""
    plt.savefig(path, dpi=200)
    plt.close()
    description = PngInfo()
    description.add_text("Description", text)
    image = Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    image.save(path, optimize=True, pnginfo=description)
    print(f"wrote {path}")


# -----------------------------------------------------------------------------
# What was found

# A panel: its title, its score, chance in percent, and {name of a row: its label and a note}.
PANELS = (
    (
        "Drawn scenes: colour and shape named right, of 64 combinations",
        "colour_shape",
        1.6,
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
        10,
        {
            "shop": ("24,000 photographs", "shown 12 times, a split for each seed"),
        },
    ),
)
MARKS = {  # of the sides of a row
    "CLIP": ("CLIP at its best learning rate", dict(color=INK, mew=0)),
    "SuperCLIP": ("SuperCLIP at its own best rate", dict(color=RED, mew=0)),
    "head": ("SuperCLIP at CLIP's best rate", dict(color=RED, mfc="white")),
    "warm": ("CLIP with a longer warm-up", dict(color=INK, mfc="white")),
}
DETAILS = {"head": "at CLIP's rate", "warm": "CLIP, longer warm-up"}
NO_GAIN = "no gain seen"


def sides_of(study, name):
    """{key of MARKS: side} of a row, with what has run beside the same CLIP."""
    clip, superclip = plan.sides_of(study, name)
    sides = {"CLIP": clip, "SuperCLIP": superclip}
    for mark in DETAILS:
        row = f"{name}_{mark}"
        found = plan.sides_of(study, row) if row in plan.ROWS else None
        if found and found[0] == clip:
            sides[mark] = found[1]
    return sides


def texts_of(sides, score):
    """What stands beside a row: a headline, and lines of details."""
    clip = sides["CLIP"]
    means, gain = compare.cell((clip, sides["SuperCLIP"]), score).split(", ")
    texts = [NO_GAIN, f"{means}, {gain}"]
    if gain.startswith("**"):  # the interval excludes 0
        texts = [gain.strip("*"), means]
    for mark, detail in DETAILS.items():
        if mark in sides:
            _, gain = compare.cell((clip, sides[mark]), score).split(", ")
            texts.append(f"{detail} {gain.strip('*')}")
    return texts


def draw_seeds(axis, y, sides, score):
    """A line for each seed, the one with the weakest CLIP on top. The next row is at y + 1."""
    columns = [[compare.value_of(run, score) for run in side.runs] for side in sides.values()]
    columns = [*zip(*sorted(zip(*columns)))]
    n = len(columns[0])
    heights = [y - 0.3 + 0.6 * i / n for i in range(n)]
    axis.hlines(heights, columns[0], columns[1], color=PALE, lw=1.3)
    for mark, values in zip(sides, columns):
        _, style = MARKS[mark]
        axis.plot(values, heights, "o", ms=4, clip_on=False, **style)


def write(axis, x, y, align, upper, lower="", colour=INK):
    """Two texts beside a row, the upper one in bold. x is a part of the width of the axes."""
    at = dict(transform=axis.get_yaxis_transform(), ha=align)
    axis.text(x, y - 0.02, upper, va="bottom", weight="bold", color=colour, **at)
    axis.text(x, y + 0.06, lower, va="top", color=GREY, fontsize=9, **at)


def draw_found(study):
    """Returns the texts of all rows."""
    texts = []
    heights = [len(rows) for *_, rows in PANELS]
    figure, axes = plt.subplots(2, 1, figsize=(8.9, 8.8), height_ratios=heights)
    figure.subplots_adjust(left=0.33, right=0.725, top=0.87, bottom=0.04, hspace=0.25)
    for axis, (title, score, chance, rows) in zip(axes, PANELS):
        axis.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.6), yticks=[])
        axis.spines["left"].set_visible(False)
        axis.xaxis.set_major_formatter("{x:.0f} %")
        axis.axvline(chance, color=GREY, lw=1, ls=":")
        axis.text(chance + 1.5, -0.5, f"chance {chance} %", color=GREY, fontsize=9, va="top")
        write(axis, -0.8, -0.6, "left", title)
        write(axis, 1.07, -0.6, "left", "gain, 95 % interval", "rounded last")
        for y, (name, (label, note)) in enumerate(rows.items()):
            sides = sides_of(study, name)
            headline, *details = texts_of(sides, score)
            draw_seeds(axis, y, sides, score)
            write(axis, -0.05, y, "right", label, note)
            colour = INK if headline == NO_GAIN else RED
            write(axis, 1.07, y - 0.05, "left", headline, "\n".join(details), colour)
            texts.append(f"{label}: {headline}, {', '.join(details)}")
    for label, style in MARKS.values():
        axis.plot([], [], "o", ms=4, label=label, **style)
    axis.plot([], [], color=PALE, label="one seed")
    figure.legend(loc="upper center", ncols=2, frameon=False)
    return texts


# -----------------------------------------------------------------------------
# Learning rates

METHODS = {"CLIP": ("--cls_weight 0 ", INK), "SuperCLIP": ("", RED)}
SEARCHES = {
    "batch 8\n48,000 samples": "--batch_size 8 --epochs 2.4",
    "batch 32\n48,000 samples": "--batch_size 32 --epochs 2.4",
    "short captions, batch 32\n48,000 samples": "--captions json.short",
    "batch 256\n48,000 samples": "--batch_size 256 --epochs 2.4",
    "batch 32\n144,000 samples": "--batch_size 32 --epochs 7.2",
    "batch 256\n144,000 samples": "--batch_size 256 --epochs 7.2",
}
DOT = dict(marker="o", ls="", alpha=0.35, ms=4, mew=0)
RING = dict(marker="o", ls="", mfc="none", ms=12, mew=1.6)


def draw_side(axis, tried, colour):
    """A dot for each seed at each rate, a line through the means, and a ring at the best rate."""
    means = {}
    for rate, runs in sorted(tried.items()):
        scores = [compare.value_of(run, "colour_shape") for run in runs]
        axis.plot([rate] * len(scores), scores, color=colour, **DOT)
        means[rate] = mean(scores)
    axis.plot(*zip(*means.items()), color=colour, lw=2)
    best = compare.best_rate(compare.goals_of(tried))
    axis.plot(best, means[best], color=colour, **RING)


def draw_rates(searches):
    figure, axes = plt.subplots(2, 3, figsize=(8.5, 6), sharey=True)
    for axis, (title, options) in zip(axes.flat, SEARCHES.items()):
        for weight, colour in METHODS.values():
            command = compare.read_command(f"train.py {weight}{options}", "", 256)
            draw_side(axis, searches[plan.key_of(command.line(), command.world())], colour)
        axis.set(title=title, xscale="log", xlim=(1.7e-5, 2.6e-3), ylim=(-4, 106))
        axis.set(xticks=[1e-4, 1e-3], xticklabels=["1e-4", "1e-3"])
    figure.supxlabel("learning rate", fontsize=11)
    figure.supylabel("colour + shape (%)", fontsize=11)
    for name, (_, colour) in METHODS.items():
        axis.plot([], [], color=colour, lw=2, label=name)
    axis.plot([], [], color=GREY, label="one seed", **DOT)
    axis.plot([], [], color=GREY, label="the chosen rate", **RING)
    figure.legend(loc="upper center", ncols=4, frameon=False)
    plt.tight_layout(rect=(0, 0, 1, 0.95))


def main(argv):
    make_parser(__doc__).parse_args(argv)
    study = compare.Study(1, plan.RUNS)
    texts = draw_found(study)
    save(ASSETS / "found.png", "\n".join(texts))
    draw_rates(plan.read_searches(study))
    save(ASSETS / "study.png")


if __name__ == "__main__":
    run_command(main)
