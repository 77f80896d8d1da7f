"""The published page: a list of experiments, each of which is a command line of study.compare.

    python -m study.plan                     run what is missing, and write results.md and figures
    python -m study.plan batch8 batch32      run these rows alone
    python -m study.plan --report            only write them, from the runs that are there

The runs go to study/runs.jsonl. Two rows need photographs in out_study: Flickr8k's shards,
flickr8k/train-*.tar and dev-*.tar, whose .json files have five captions in the field "captions",
and cifar10/, as objects.py wants it.
"""

import math
import shlex
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from cli import InputError, check, make_parser, optional, run_command
from study import compare

FOLDER = Path(__file__).parent
ASSETS = FOLDER.parent / "assets"
SUPERCLIP = '--a "train.py"'
PAIR = '--a "train.py --cls_weight 0" --b "train.py"'
GROUPS = '--a "-m study.groups --group {0} --cls_weight 0" --b "-m study.groups --group {0}"'
LOOKS = ("R@1", "colour_shape", "held_out")
SHORT = "--captions json.short"
AT_32 = "--batch_size 32 --epochs 2.4"
FLICKR = (
    "--train_data 'out_study/flickr8k/train-*.tar' --val_data 'out_study/flickr8k/dev-*.tar' "
    "--captions json.captions --vocab clip --model tiny --crop_area 1.0 --weight_decay 0.1 "
    "--batch_size 32 --epochs 6 --learning_rate 3.5e-4"
)


class Row(NamedTuple):
    """An experiment."""

    label: str
    sides: str
    common: str
    more: str = ""
    scores: tuple = LOOKS  # those that the page shows

    def __str__(self):
        """The options of study.compare."""
        return f'{self.sides} --common "{self.common}" {self.more}--rates'


# In the order in which they convince. 48,000 samples are 2.4 epochs of 20,000 pairs.
ROWS = {
    "batch8": Row("batch 8", PAIR, "--batch_size 8 --epochs 2.4"),
    "batch32": Row("batch 32", PAIR, AT_32),
    "batch256": Row("batch 256", PAIR, "--batch_size 256 --epochs 2.4"),
    "flickr8k": Row("Flickr8k, batch 32, 36,000 samples", PAIR, FLICKR, scores=("R@1",)),
    "batch32long": Row("batch 32, 144,000 samples", PAIR, "--batch_size 32 --epochs 7.2"),
    "batch256long": Row("batch 256, 144,000 samples", PAIR, "--batch_size 256 --epochs 7.2"),
    "groups4": Row("batch 64, groups of 4", GROUPS.format(4), "--batch_size 64 --epochs 2.4"),
    "groups64": Row("batch 64, groups of 64", GROUPS.format(64), "--batch_size 64 --epochs 2.4"),
    "no_idf": Row("SuperCLIP: IDF -> none", f'{SUPERCLIP} --b "-m study.no_idf"', AT_32),
    "lambda0.3": Row(
        "SuperCLIP: lambda 1 -> 0.3", f'{SUPERCLIP} --b "train.py --cls_weight 0.3"', AT_32
    ),
    "lambda3": Row("SuperCLIP: lambda 1 -> 3", f'{SUPERCLIP} --b "train.py --cls_weight 3"', AT_32),
    "short": Row("short captions", PAIR, f"{AT_32} {SHORT}"),
    "dual": Row(
        "SuperCLIP: short -> dual captions",
        f'{SUPERCLIP} --b "train.py --label_captions json.long"',
        f"{AT_32} {SHORT}",
    ),
    "sigmoid": Row("SigLIP -> SuperSigLIP", PAIR, f"{AT_32} --loss sigmoid"),
    "objects": Row(
        "CIFAR-10 in settings, batch 16, 96,000 samples",
        PAIR,
        "--batch_size 16 --epochs 4.8",
        "--photographs out_study/cifar10 --probe ",
        ("R@1", "object", "probe", "patch probe"),
    ),
    "settings16": Row(
        "16 settings, batch 8", PAIR, "--batch_size 8 --epochs 2.4", "--settings 16 "
    ),
}
BATCHES = ("batch8", "batch32", "batch256", "batch32long", "batch256long")
# The figure: x is the number of pairs that are compared.
PANELS = {
    "48,000 samples": {8: "batch8", 32: "batch32", 256: "batch256"},
    "144,000 samples": {32: "batch32long", 256: "batch256long"},
    "batch 64, in groups": {4: "groups4", 64: "groups64"},
}
# The table to add to: the row and the side that a variant is.
VARIANTS = {
    "CLIP": ("batch32", 0),
    "SuperCLIP": ("batch32", 1),
    "SigLIP": ("sigmoid", 0),
    "SuperSigLIP": ("sigmoid", 1),
    "no IDF": ("no_idf", 1),
    "dual captions": ("dual", 1),
}


def sides_of(study, name):
    """Run what is missing of a row. Returns its two sides, or None if nothing is to be run."""
    args = compare.make_options().parse_args(shlex.split(str(ROWS[name])))
    return compare.run_experiment(study, args)


# -----------------------------------------------------------------------------
# The page

INTRO = """# CLIP and SuperCLIP, made small

Made by `python -m study.plan` from runs.jsonl. A cell reads: mean of the first command -> mean of
the second, and their difference with its 95 % interval, in percent. Five seeds, each with a world
of its own, are paired (Student's t). One rule for all rows: each command has the best of the rates
tried, four or more, and the rate of a seed is the one that is best for the other seeds. A row is
CLIP -> SuperCLIP and sees 48,000 samples if nothing else is said. R@1 is the mean of both ways
among 1,000 pairs that training has not seen, colour_shape and object are zero-shot scores of class
folders, and held_out is that of combinations that training never shows. Seconds are those of a run
of each, on one core.
"""
FIGURE = f"""![The colour + shape of each seed](../assets/study.png)

## A table to add a row to

Batch 32, 48,000 samples: the mean over five seeds, and the lowest and the highest of them. Your
variant gets its row by `--b`:

    python -m study.compare --a "train.py" --b "../fork/train.py" --common "{AT_32}" --rates
"""
RATES = """## All learning rates that were tried

Each with the mean of R@1 and a zero-shot score over the seeds, and in parentheses the numbers of
seeds that it was taken for, that learned the objects (colour + shape above half), and that diverged
and score 0.

![The mean of R@1 and colour_shape against the learning rate, each seed](../assets/rates.png)
"""


def markdown(heads, lines):
    rows = [heads, ["---"] * len(heads), *lines]
    return [f"| {' | '.join(row)} |" for row in rows] + [""]


def survivors(cells):
    """How many differences survive Benjamini and Hochberg's correction: of so many, 5 % are
    expected to be none."""
    survive = 0
    for rank, p in enumerate(sorted(map(p_of, cells)), 1):
        if p <= 0.05 * rank / len(cells):
            survive = rank
    return survive


def p_of(cell):
    """The probability that five seeds differ as much by chance. It is that of both tails of
    Student's distribution with four degrees of freedom, which has a closed form."""
    s = abs(cell.mean) / max(math.hypot(cell.mean, 2 * cell.error), 1e-9)
    return 1 - 1.5 * s + 0.5 * s**3


def tables(found):
    """A table for each kind of scores, as lines, and all their cells."""
    lines = []
    cells = []
    for scores in dict.fromkeys(ROWS[name].scores for name in found):
        rows = []
        for name, sides in found.items():
            if ROWS[name].scores == scores:
                row = [compare.difference(sides, score) for score in scores]
                seconds = " / ".join(side.seconds() for side in sides)
                rows.append([ROWS[name].label, *map(text_of, row), seconds])
                cells += row
        heads = [f"{score} (chance {cell.chance:.1f})" for score, cell in zip(scores, row)]
        lines += markdown(["", *heads, "seconds"], rows)
    return lines, cells


def text_of(cell):
    text = f"{cell.a:.1f} -> {cell.b:.1f}, {cell}"
    return f"**{text}**" if cell.excludes_0() else text


def open_table(found):
    lines = []
    for label, (name, number) in VARIANTS.items():
        if name in found:
            side = found[name][number]
            line = [label]
            for score in LOOKS:
                values = [compare.value_of(run, score) for run in side.runs()]
                line.append(f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
            lines.append([*line, f"`{side.command.text}`"])
    return markdown(["", *LOOKS, "command"], lines)


def easy_rates(side):
    """At how many of the rates that were tried most seeds learned the objects."""
    most = [sum(map(compare.has_learned, runs)) > 2 for runs in side.tried.values()]
    return f"{sum(most)} of {len(most)}"


def findings(found):
    """What the runs say, as lines: is it a lasting gap, or are the objects learned sooner, and
    higher rates borne?"""
    lines = ["## What the runs say", "", "A gap that lasts is there in the longer runs, too.", ""]
    for name in BATCHES:
        if name in found:
            cell = compare.difference(found[name], "colour_shape")
            clip, superclip = map(easy_rates, found[name])
            lines.append(
                f"- {ROWS[name].label}: colour + shape {text_of(cell)}. Most seeds learn the "
                f"objects at {clip} rates with CLIP, and at {superclip} with SuperCLIP."
            )
    return [*lines, ""]


def page(found):
    """results.md as a text."""
    table, cells = tables(found)
    missing = [row.label for name, row in ROWS.items() if name not in found]
    runs = [run for sides in found.values() for side in sides for run in side.all_runs()]
    made = {f"{run['device']}, {run['dtype']}, commit {run['commit']}": None for run in runs}
    outside = sum(cell.excludes_0() for cell in cells)
    lines = [
        INTRO,
        *findings(found),
        "## All rows",
        "",
        f"{len(cells)} differences are shown. **Bold**: the interval excludes 0 (uncorrected), as "
        f"{outside} do. {survivors(cells)} survive the correction of Benjamini and Hochberg at "
        f"5 %. Made on: {'; '.join(made)}. Not run yet: {'; '.join(missing) or 'nothing'}.",
        "",
        *table,
        FIGURE,
        *open_table(found),
        RATES,
    ]
    for name, sides in found.items():
        lines.append(f"- {ROWS[name].label}: `python -m study.compare {ROWS[name]}`")
        for side in sides:
            lines.append(f"  - `{side.command.text}`: {'; '.join(compare.rate_texts(side))}")
    return "\n".join([*lines, ""])


# -----------------------------------------------------------------------------
# The figures

METHODS = {"CLIP": "#4b5563", "SuperCLIP": "#d1495b"}


def draw(path, panels, **labels):
    """Scores of two sides, a dot for each seed, and a line through the means. panels: {title: a
    dict {x: scores} of each side}; labels: of the axes."""
    optional("matplotlib").use("Agg")
    plt = optional("matplotlib.pyplot")
    n = len(panels)
    _, axes = plt.subplots(1, n, figsize=(3 * n, 3), sharey=True, squeeze=False)
    for axis, (title, pair) in zip(axes[0], panels.items()):
        for scores, (method, colour) in zip(pair, METHODS.items()):
            for x, values in scores.items():
                axis.scatter([x] * len(values), values, color=colour, s=14, alpha=0.5)
            axis.plot([*scores], [*map(mean, scores.values())], color=colour, label=method)
        axis.set(title=title, xscale="log", **labels)
    axes[0, 0].legend()
    plt.savefig(path, dpi=150, bbox_inches="tight")


def draw_figures(found):
    panels = {}
    for title, names in PANELS.items():
        pair = ({}, {})
        for x, name in names.items():
            for scores, side in zip(pair, found.get(name, ())):
                scores[x] = [compare.value_of(run, "colour_shape") for run in side.runs()]
        panels[title] = pair
    labels = {"xlabel": "pairs compared", "ylabel": "zero-shot, colour + shape (%)"}
    draw(ASSETS / "study.png", panels, **labels)
    panels = {}
    for name in BATCHES:
        panels[ROWS[name].label] = [side.goals() for side in found.get(name, ())]
    labels = {"xlabel": "learning rate", "ylabel": "mean of R@1 and colour_shape (%)"}
    draw(ASSETS / "rates.png", panels, **labels)


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--report", action="store_true", help="run nothing")
    compare.add_shared(parser)
    args = parser.parse_args(argv)
    unknown = {*args.rows} - ROWS.keys()
    check(not unknown, f"there is no row {' or '.join(unknown)}")
    if not args.report:
        compare.open_out(args.out)
        study = compare.Study(args.out, args.jobs, compare.PUBLISHED)
        for name in args.rows or ROWS:
            try:
                sides_of(study, name)
            except InputError as error:
                print(f"{name} is not finished: {error}", flush=True)
    study = compare.Study(args.out, 0, compare.PUBLISHED)
    looks = {name: sides_of(study, name) for name in ROWS}
    found = {name: sides for name, sides in looks.items() if sides is not None}
    (FOLDER / "results.md").write_text(page(found))
    draw_figures(found)


if __name__ == "__main__":
    run_command(main)
