"""Draw how runs went, from their logs:

    python -m scripts.curves out/log.jsonl --out curves.png
    python -m scripts.curves out_a/log.jsonl out_b/log.jsonl --out curves.png

There is a panel for each term of the loss, in training and in validation, and then one for each
score, with its chance as a dotted line. In each of them a run has a line, which is named by the
folder of its log, or by the file if that is not called log.jsonl.
"""

import math
from collections import defaultdict
from itertools import cycle, product
from statistics import mean

from cli import make_parser, optional, output_file, run_command
from log import read_log, short_names

COLUMNS = 4
INK, RED, GREY = "#1f2937", "#d1495b", "#6b7280"
STYLES = list(product(("-", "--", "-."), (INK, RED, GREY)))  # of one run after the other


def curves_of(log):
    """A log.jsonl -> curves {title: [(step, value) ...]}, and the chance of those that are scores
    {title: chance}. Scores are in percent."""
    _, rows = read_log(log)
    curves = defaultdict(list)
    chances = {}
    for row in rows:
        values = {name: x for name, x in row.items() if name.endswith("_loss")}  # of forks, too
        if "mean_r1" in row:
            values["R@1"] = 100 * row["mean_r1"]
            chance = mean(way["R@1"]["chance"] for way in row["validation"].values())
            chances["R@1"] = 100 * chance
        scores = row.get("zeroshot", {})
        for folder, name in short_names(scores).items():
            title = f"zero-shot {name}"
            values[title] = 100 * scores[folder]["value"]
            chances[title] = 100 * scores[folder]["chance"]
        for title, value in values.items():
            curves[title].append((row["step"], value))
    return curves, chances


def order_of(title):
    """Losses of training come first, then those of validation, and then scores."""
    return not title.endswith("_loss"), title.startswith("val_")


def draw(axis, title, runs):
    """A panel. runs: {name: what curves_of returns}."""
    for (name, (curves, chances)), (line, colour) in zip(runs.items(), cycle(STYLES)):
        if title in curves:  # plain CLIP has no word loss
            marker = "." if len(curves[title]) < 20 else None
            style = dict(color=colour, ls=line, marker=marker, clip_on=False)
            axis.plot(*zip(*curves[title]), label=name, **style)
        if title in chances:
            axis.axhline(chances[title], color=GREY, ls=":", lw=1)
            axis.set_ylim(0, 100)
            axis.yaxis.set_major_formatter("{x:.0f} %")
    axis.set_title(title.replace("_", " "), fontsize="medium")
    axis.spines[["top", "right"]].set_visible(False)


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log.jsonl of each run")
    parser.add_argument("--out", type=output_file(".png"), required=True, help="picture to draw")
    args = parser.parse_args(argv)
    found = {log.removesuffix("/log.jsonl"): curves_of(log) for log in args.logs}
    runs = {name: found[place] for place, name in short_names(found).items()}
    titles = dict.fromkeys(title for curves, _ in runs.values() for title in curves)
    titles = sorted(titles, key=order_of)

    plt = optional("matplotlib.pyplot", "matplotlib")
    rows = math.ceil(len(titles) / COLUMNS)
    size = 2.6 * COLUMNS, 2.1 * rows + 0.5
    figure, axes = plt.subplots(rows, COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axis, title in zip(axes.flat, titles):
        draw(axis, title, runs)
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    legend = axes.flat[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper left", ncols=COLUMNS, frameon=False)
    figure.supxlabel("steps (dotted: chance)", fontsize="medium")
    figure.savefig(args.out, dpi=150)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
