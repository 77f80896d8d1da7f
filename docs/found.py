"""Draw assets/found.png, what the study found: python -m docs.found

Scores against the pairs, or epochs, that a model was shown. A dot is a seed, a bar is a mean, and
lines go through means. With photographs the control was not run.
"""

from pathlib import Path
from statistics import mean

from matplotlib import pyplot as plt

from cli import make_parser, run_command
from study import plan

PICTURE = Path(__file__).resolve().parent.parent / "assets" / "found.png"
INK, GREY, RED = "#1f2937", "#9aa1ac", "#d1495b"
# A panel: its title, its score, chance in percent, the name of its axis, and {row: where it is}.
PAIRS = {"24,000": 24_000, "32,000": 32_000, "48,000": 48_000}
PANELS = (
    ("Drawn scenes, mixed captions", "colour_shape", 1.6, "pairs in a run",
     {f"mixed, {text}": n for text, n in PAIRS.items()}),
    ("Drawn scenes, short captions", "colour_shape", 1.6, "pairs in a run",
     {f"short, {text}": n for text, n in PAIRS.items()}),
    ("Photographs of a shop", "type", 10, "epochs of 24,000 pairs in a run",
     {"photographs, 3 epochs": 3, "photographs, 6 epochs": 6}),
)  # fmt: skip
ARMS = {"CLIP": INK, "control": GREY, "SuperCLIP": RED}


def draw_panel(axis, score, rows):
    width = (max(rows.values()) - min(rows.values())) / 30
    for shift, (arm, colour) in zip((-1, 0, 1), ARMS.items()):
        means = {}
        for row, x in rows.items():
            if f"{arm}, {row}" in plan.ARMS:
                values = plan.values_of(f"{arm}, {row}", score).values()
                place = x + shift * width
                means[place] = mean(values)
                axis.plot([place] * len(values), values, "o", ms=4, mew=0, alpha=0.5, color=colour)
        axis.plot([*means], [*means.values()], "_-", ms=16, mew=2, color=colour, label=arm)


def main(argv):
    make_parser(__doc__).parse_args(argv)
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, (title, score, chance, name, rows) in zip(axes, PANELS):
        axis.set(title=title, ylim=(0, 102), xlabel=name, xticks=[*rows.values()])
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:.0f} %")
        axis.spines[["top", "right"]].set_visible(False)
        axis.axhline(chance, color=GREY, lw=1, ls=":")
        draw_panel(axis, score, rows)
    axes[0].set_ylabel("colour and shape named right, of 64")
    axes[2].set_ylabel("type named right, of 10")
    legend = axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=3, frameon=False)
    plt.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    run_command(main)
