"""Draw the results of the study: python -m docs.figures

found.png has the scores of the models. A bar is the mean over the seeds, and a dot is one seed.
recipes.png has the score of each model at each warm-up and learning rate.

`git show e516899:docs/figures.py` prints the code that drew first.png and scenes.png, from
assets/tiny.pt and the scenes of the tutorial. The tutorial has the commands that draw curve.png and
words.png. The SVG files are drawn by hand.
"""

from pathlib import Path
from statistics import mean

from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from common.cli import make_parser, run_command
from study import plan

ASSETS = Path(__file__).resolve().parent.parent / "assets"
INK, GREY, RED, AMBER = "#1f2937", "#7d8694", "#d1495b", "#f0a500"
# A model: the colour of its bars, and their place in a group
ARMS = {"CLIP": (INK, -0.29), "control": (GREY, 0), "SuperCLIP": (RED, 0.29)}
# A panel: its title, the name of its scale, chance in percent, and {group of bars: row, score}
PANELS = (
    ("Mixed captions, by length of the run", "colour + shape right (%)", 1.6, {
        "24,000\nsamples": ("mixed, 24,000", "colour_shape"),
        "32,000\nsamples": ("mixed, 32,000", "colour_shape"),
        "48,000\nsamples": ("mixed, 48,000", "colour_shape"),
    }),
    ("After 32,000 samples", "", 1.6, {
        "short\ncaptions": ("short, 32,000", "colour_shape"),
        "mixed\ncaptions": ("mixed, 32,000", "colour_shape"),
        "mixed, own\nrecipes": (plan.TUNED, "colour_shape"),
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


def draw_recipes(axis, model):
    """Draw a heat map. A row is a warm-up, a column is a rate, and a frame marks the recipe."""
    cells = plan.grid_of(model)
    grid = [[cells[share, rate] for rate in plan.RATES] for share in plan.SHARES]
    image = axis.imshow(grid, "viridis", vmin=0, vmax=100, aspect="auto")
    for row, scores in enumerate(grid):
        for column, score in enumerate(scores):
            ink = "white" if score < 60 else INK
            axis.text(column, row, f"{score:.0f}", ha="center", va="center", color=ink, size=13)
    share, rate = plan.RECIPES[model]
    corner = plan.RATES.index(rate) - 0.47, plan.SHARES.index(share) - 0.47
    axis.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, ec=RED, lw=4))
    axis.set_title(model)
    axis.set_xticks(range(len(plan.RATES)), plan.RATES)
    axis.set_yticks(range(len(plan.SHARES)), [f"{share:.0%}" for share in plan.SHARES])
    return image


def draw_all_recipes():
    figure, axes = plt.subplots(1, 3, sharey=True, figsize=(11, 4), layout="constrained")
    for axis, model in zip(axes, ARMS):
        image = draw_recipes(axis, model)
    axes[0].set_ylabel("warm-up, share of the steps")
    axes[1].set_xlabel("learning rate")
    figure.colorbar(image, ax=axes, label="colour + shape right (%)")
    plt.savefig(ASSETS / "recipes.png", dpi=130)


def draw_scores():
    look = dict(figsize=(12, 4), width_ratios=(3, 5, 2), layout="constrained")
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
    draw_all_recipes()
    draw_scores()


if __name__ == "__main__":
    run_command(main)
