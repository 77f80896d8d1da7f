"""Draw how runs went, from their logs:

    python -m scripts.curves out/log.jsonl --out curves.png
    python -m scripts.curves out_a/log.jsonl out_b/log.jsonl --out curves.png

There is a panel for each term of the loss, and for each score of the validations, and in it a line
for each run.
"""

import math
from collections import defaultdict

from cli import make_parser, optional, output_file, run_command
from runtime import read_log, short_names

COLUMNS = 4


def curves_of(log):
    """A log.jsonl -> {title: [(step, value) ...]}. Scores are in percent."""
    _, rows = read_log(log)
    curves = defaultdict(list)
    for row in rows:
        step = row["step"]
        for name, value in row.items():
            if name.endswith("_loss"):  # that of a fork, too
                curves[name].append((step, value))
        if "mean_r1" in row:
            curves["R@1 (%)"].append((step, 100 * row["mean_r1"]))
        scores = row.get("zeroshot", {})
        for folder, name in short_names(scores).items():
            curves[f"{name} (%)"].append((step, 100 * scores[folder]["value"]))
    return curves


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log.jsonl of each run")
    parser.add_argument("--out", type=output_file(".png"), required=True, help="picture to draw")
    args = parser.parse_args(argv)
    curves = {name: curves_of(log) for log, name in short_names(args.logs).items()}
    plt = optional("matplotlib.pyplot", "matplotlib")
    titles = list(dict.fromkeys(title for run in curves.values() for title in run))
    rows = math.ceil(len(titles) / COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(3 * COLUMNS, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    for axis, title in zip(axes.flat, titles):
        for name, run in curves.items():
            if title in run:  # plain CLIP has no word loss
                axis.plot(*zip(*run[title]), label=name)
        axis.set_title(title.replace("_", " "))
    axes.flat[0].legend()
    figure.supxlabel("steps")
    figure.tight_layout()
    figure.savefig(args.out, dpi=150)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
