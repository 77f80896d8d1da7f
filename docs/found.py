"""Draw assets/found.png, what the study found:

    python -m docs.found

Scores against the pairs, or epochs, that a model was shown. A dot is a seed, a bar is a mean, and
lines go through means. With photographs the control was not run.
"""

from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib import pyplot as plt
from PIL import Image

from cli import make_parser, run_command
from study import compare, plan

PICTURE = Path(__file__).resolve().parent.parent / "assets" / "found.png"
INK, GREY, RED = "#1f2937", "#9aa1ac", "#d1495b"
SAMPLES = {"24": 24_000, "32": 32_000, "48": 48_000}
# A panel: its title, its score, chance in percent, the name of its axis, and {row: where it is}.
PANELS = (
    ("Drawn scenes, mixed captions", "colour_shape", 1.6, "pairs in a run",
     {f"A{key}": n for key, n in SAMPLES.items()}),
    ("Drawn scenes, short captions", "colour_shape", 1.6, "pairs in a run",
     {f"B{key}": n for key, n in SAMPLES.items()}),
    ("Photographs of a shop", "type", 10, "epochs of 24,000 pairs in a run", {"D3": 3, "D6": 6}),
)  # fmt: skip
DOTS = dict(ms=4, mew=0, alpha=0.5)
ARMS = {
    "C": ("CLIP", INK),
    "W": ("control: another pair's words", GREY),
    "S": ("SuperCLIP", RED),
}


def draw_panel(axis, study, score, rows):
    width = (max(rows.values()) - min(rows.values())) / 30
    for shift, (arm, (label, colour)) in zip((-1, 0, 1), ARMS.items()):
        means = {}
        for row, x in rows.items():
            name = f"{row}/{arm}"
            if name in plan.ARMS:
                values = plan.values_of(study, name, score).values()
                place = x + shift * width
                means[place] = mean(values)
                axis.plot([place] * len(values), values, "o", **DOTS, color=colour)
        axis.plot([*means], [*means.values()], "_-", ms=16, mew=2, color=colour, lw=2, label=label)
    axis.set_xlim(min(rows.values()) - 5 * width, max(rows.values()) + 5 * width)


def draw(study):
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), sharey=True)
    for axis, (title, score, chance, name, rows) in zip(axes, PANELS):
        axis.set(title=title, ylim=(0, 102), xlabel=name, xticks=[*rows.values()])
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:.0f} %")
        axis.spines[["top", "right"]].set_visible(False)
        axis.axhline(chance, color=GREY, lw=1, ls=":")
        draw_panel(axis, study, score, rows)
    axes[0].set_ylabel("colour and shape named right, of 64")
    axes[2].set_ylabel("type named right, of 10")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))


def main(argv):
    make_parser(__doc__).parse_args(argv)
    matplotlib.use("Agg")
    plt.rcParams.update({"font.size": 11, "text.color": INK, "xtick.color": INK})
    draw(compare.Study(plan.RUNS, any_code=True))
    plt.savefig(PICTURE, dpi=200)
    # 64 colours are enough, and make the file a third as large
    image = Image.open(PICTURE).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    image.save(PICTURE, optimize=True)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    run_command(main)
