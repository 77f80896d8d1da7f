"""Draw assets/study.png, each learning rate that the study has tried:

python -m docs.study_figure
"""

from statistics import mean

import matplotlib
from matplotlib import pyplot as plt

from cli import make_parser, run_command
from docs.figures import ASSETS, GREY, INK, RED, STYLE, save
from study import compare, plan

METHODS = {"CLIP": ("--cls_weight 0 ", INK), "SuperCLIP": ("", RED)}
PANELS = {
    "batch 8\n48,000 samples": "--batch_size 8 --epochs 2.4",
    "batch 32\n48,000 samples": "--batch_size 32 --epochs 2.4",
    "short captions, batch 32\n48,000 samples": "--batch_size 32 --epochs 2.4 "
    "--captions json.short",
    "batch 256\n48,000 samples": "--batch_size 256 --epochs 2.4",
    "batch 32\n144,000 samples": "--batch_size 32 --epochs 7.2",
    "batch 256\n144,000 samples": "--batch_size 256 --epochs 7.2",
}


def draw_side(axis, tried, name, colour):
    """A dot for each seed at each rate, a line through the means, and a ring at the best rate."""
    best = compare.best_rate(compare.goals_of(tried))
    points = []
    for rate, runs in sorted(tried.items()):
        scores = [compare.value_of(run, "colour_shape") for run in runs]
        axis.plot([rate] * len(scores), scores, "o", color=colour, alpha=0.35, ms=4, mew=0)
        points.append((rate, mean(scores)))
        if rate == best:
            axis.plot(rate, mean(scores), "o", color=colour, ms=12, mfc="none", mew=1.6)
    axis.plot(*zip(*points), color=colour, lw=2, label=name)


def draw(searches):
    figure, axes = plt.subplots(2, 3, figsize=(8.5, 6), sharex=True, sharey=True)
    for axis, (title, options) in zip(axes.flat, PANELS.items()):
        for name, (weight, colour) in METHODS.items():
            command = compare.read_command(f"train.py {weight}{options}", "", 256)
            tried = searches[plan.key_of(command.line(), command.world())]
            draw_side(axis, tried, name, colour)
        axis.set(title=title, xscale="log", xlim=(1.7e-5, 2.6e-3), ylim=(-4, 106))
        axis.set(xticks=[1e-4, 1e-3], xticklabels=["1e-4", "1e-3"], yticks=range(0, 101, 25))
        axis.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel("learning rate", fontsize=11)
    figure.supylabel("colour + shape (%)", fontsize=11)
    lines, names = axes[0, 0].get_legend_handles_labels()
    lines += axes[0, 0].plot([], [], "o", color=GREY, alpha=0.5, ms=4, mew=0)
    lines += axes[0, 0].plot([], [], "o", color=GREY, ms=12, mfc="none", mew=1.6)
    names += ["one seed", "the chosen rate"]
    figure.legend(lines, names, loc="upper center", ncols=4, frameon=False)
    plt.tight_layout(rect=(0, 0, 1, 0.95))


def main(argv):
    make_parser(__doc__).parse_args(argv)
    matplotlib.use("Agg")
    plt.rcParams.update(STYLE)
    draw(plan.read_searches(compare.Study(1, plan.RUNS)))
    save(ASSETS / "study.png")


if __name__ == "__main__":
    run_command(main)
