"""Draw the losses and scores of one or several runs, from their logs:

    python -m scripts.curves out/log.jsonl --out curves.png
    python -m scripts.curves out_a/log.jsonl out_b/log.jsonl --out curves.png

Each term of the loss and each score has a panel, in which every run is a line. A dotted line is the
chance level of a score. The legend has the paths of the logs.
"""

import math
from statistics import mean

from common.cli import check, make_parser, output_file, run_command
from common.run import names_of, read_log

COLUMNS = 4
# What a row of losses holds besides the terms of the loss. Every other entry of such a row has a
# panel, so a fork may give its term any name.
NOT_DRAWN = {
    "step", "loss", "logit_scale", "grad_norm", "learning_rate", "images_per_second", "data_wait",
    "bad_samples", "memory_gb",
}  # fmt: skip


def values_of(row):
    """Return what a row of a log adds to the panels, as a dict of title -> (value, chance). The
    chance of a loss is None. Scores are in percent. R@1 is the mean of both directions."""
    values = {}
    for name, x in row.items():
        is_term = "loss" in row and name not in NOT_DRAWN
        if is_term or name.endswith("_loss"):  # a validation has val_contrastive_loss
            values[name] = x, None
    zeroshot = row.get("zeroshot", {})
    for folder, name in names_of(zeroshot).items():
        score = zeroshot[folder]
        values[f"zero-shot {name} (%)"] = 100 * score["value"], 100 * score["chance"]
    if "mean_r1" in row:
        chance = mean(way["R@1"]["chance"] for way in row["validation"].values())
        values["R@1 (%)"] = 100 * row["mean_r1"], 100 * chance
    return values


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("logs", nargs="+", metavar="LOG", help="log.jsonl of a run")
    picture = output_file(".png", ".svg", ".pdf")
    parser.add_argument("--out", type=picture, required=True, help="picture: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    panels = {}  # title -> run -> list of (step, value, chance)
    for log in args.logs:
        _, rows = read_log(log)
        for row in rows:
            for title, value in values_of(row).items():
                panels.setdefault(title, {}).setdefault(log, []).append((row["step"], *value))
    check(panels, f"there is no loss and no score yet in {', '.join(args.logs)}")

    from matplotlib import pyplot as plt

    rows = math.ceil(len(panels) / COLUMNS)
    size = 2.6 * COLUMNS, 2.1 * rows + 0.5
    figure, axes = plt.subplots(rows, COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    # Losses of the training come first, then that of the validation, and then scores.
    titles = sorted(panels, key=lambda title: (title.endswith("(%)"), title.startswith("val_")))
    for axis, title in zip(axes.flat, titles):
        axis.set_title(title.replace("_", " "), fontsize="medium")
        for i, log in enumerate(args.logs):
            if log in panels[title]:  # plain CLIP has no classification loss
                steps, values, chances = zip(*panels[title][log])
                axis.plot(steps, values, color=f"C{i}")
                if chances[0] is not None:
                    axis.axhline(chances[0], color="grey", ls=":")
                    axis.set_ylim(0, 100)
    lines = [plt.Line2D([], [], color=f"C{i}") for i in range(len(args.logs))]
    figure.legend(lines, args.logs, loc="outside upper left", ncols=COLUMNS, frameon=False)
    figure.supxlabel("steps (dotted: chance)", fontsize="medium")
    figure.savefig(args.out, dpi=150)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
