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

RESULTS = Path(__file__).with_name("results.md")
ASSETS = RESULTS.parent.parent / "assets"
PAIR = '--a "train.py --cls_weight 0" --b "train.py"'
GROUPS = '--a "-m study.groups --group {0} --cls_weight 0" --b "-m study.groups --group {0}"'
LOOKS = ("R@1", "colour_shape", "held_out")
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
    "no_idf": Row("SuperCLIP: IDF -> none", '--a "train.py" --b "-m study.no_idf"', AT_32),
    "lambda0.3": Row(
        "SuperCLIP: lambda 1 -> 0.3", '--a "train.py" --b "train.py --cls_weight 0.3"', AT_32
    ),
    "lambda3": Row(
        "SuperCLIP: lambda 1 -> 3", '--a "train.py" --b "train.py --cls_weight 3"', AT_32
    ),
    "short": Row("short captions", PAIR, "--batch_size 32 --epochs 2.4 --captions json.short"),
    "dual": Row(
        "SuperCLIP: short -> dual captions",
        '--a "train.py" --b "train.py --label_captions json.long"',
        "--batch_size 32 --epochs 2.4 --captions json.short",
    ),
    "sigmoid": Row("SigLIP -> SuperSigLIP", PAIR, "--batch_size 32 --epochs 2.4 --loss sigmoid"),
    "objects": Row(
        "CIFAR-10 in settings, batch 16, 96,000 samples",
        PAIR,
        "--batch_size 16 --epochs 4.8",
        "--photographs out_study/cifar10 --probe ",
        ("R@1", "object", "probe"),
    ),
    "settings16": Row(
        "16 settings, batch 8", PAIR, "--batch_size 8 --epochs 2.4", "--settings 16 "
    ),
}
BATCHES = ("batch8", "batch32", "batch256", "batch32long", "batch256long")
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


def complete_rows(study):
    """{name: its two sides} of the rows all of whose runs are there. study: one that reads only."""
    found = {name: sides_of(study, name) for name in ROWS}
    return {name: sides for name, sides in found.items() if sides is not None}


# -----------------------------------------------------------------------------
# The page

TITLE = "# CLIP and SuperCLIP, made small\n"
INTRO = """
Made by `python -m study.plan` from runs.jsonl, which names the commit, a hash of the code and the
machine of each run. A cell reads: mean of the first command -> mean of the second, and their
difference with its 95 % interval, in percent. Five seeds are paired (Student's t), each with a
world of its own (those of Flickr8k share its pairs). One rule for all rows: each command has the
best of the rates tried, four or more, and the rate of a seed is the one that is best for the other
seeds. A row is CLIP -> SuperCLIP and sees 48,000 samples if nothing else is said.

R@1 is the mean of both ways among 1,000 pairs that training has not seen (chance 0.1), colour_shape
and object are zero-shot scores of class folders (1.6 and 10), held_out is that of combinations that
training never shows (1.6), and probe that of a linear classifier on the frozen class token (10).
Seconds are those of a run of each, on one core.

## What the runs say

A gap that lasts is there in the longer runs, too.
"""
OPEN = f"""
![The colour + shape of each seed at each learning rate](../assets/study.png)

## A table to add a row to

Batch 32, 48,000 samples: the mean over five seeds, and the lowest and the highest of them. Your
variant gets its row by `--b`:

    python -m study.compare --a "train.py" --b "../fork/train.py" --common "{AT_32}" --rates

| | R@1 | colour_shape | held_out | command |
| --- | --- | --- | --- | --- |"""
RATES = """
## All learning rates that were tried

Each with the mean of R@1 and a zero-shot score over the seeds, and in parentheses the numbers of
seeds that it was taken for, that learned the objects (colour + shape above half), and that diverged
and score 0.

![R@1 of each seed at each learning rate](../assets/rates.png)
"""


def p_of(cell):
    """The probability that five seeds differ as much by chance: both tails of Student's
    distribution with four degrees of freedom, which has a closed form."""
    error = cell.half / compare.QUANTILES[3]
    s = abs(cell.mean) / max(math.hypot(cell.mean, 2 * error), 1e-9)
    return 1 - 1.5 * s + 0.5 * s**3


def survivors(cells):
    """How many differences survive Benjamini and Hochberg's correction: of so many, 5 % are
    expected to be none."""
    survive = 0
    for rank, p in enumerate(sorted(map(p_of, cells)), 1):
        if p <= 0.05 * rank / len(cells):
            survive = rank
    return survive


def text_of(cell):
    """A difference with both means, in bold if it excludes 0."""
    text = f"{cell.a:.1f} -> {cell.b:.1f}, {cell}"
    return f"**{text}**" if cell.excludes_0() else text


def easy_rates(side):
    """At how many of the rates that were tried most seeds learned the objects."""
    most = [sum(map(compare.has_learned, runs)) > 2 for runs in side.tried.values()]
    return f"{sum(most)} of {len(most)}"


def row_of(label, *texts):
    return f"| {' | '.join([label, *texts])} |"


def open_table(found):
    lines = []
    for label, (name, number) in VARIANTS.items():
        if name in found:
            side = found[name][number]
            texts = []
            for score in LOOKS:
                values = [compare.value_of(run, score) for run in side.runs()]
                texts.append(f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
            lines.append(row_of(label, *texts, f"`{side.command.text}`"))
    return lines


def page(found):
    """results.md as a text."""
    missing = [row.label for name, row in ROWS.items() if name not in found]
    if not found:
        return f"{TITLE}\nNo row is complete yet. Not run: {'; '.join(missing)}.\n"
    findings = []
    table = []
    cells = []
    rates = []
    for name, sides in found.items():
        row = ROWS[name]
        differences = [compare.difference(sides, score) for score in row.scores]
        cells += differences
        seconds = " / ".join(map(compare.Side.seconds, sides))
        table.append(row_of(row.label, seconds, *map(text_of, differences)))
        rates.append(f"- {row.label}: `python -m study.compare {row}`")
        for side in sides:
            rates.append(f"  - `{side.command.text}`: {'; '.join(compare.rate_texts(side))}")
        if name in BATCHES:
            easy = " rates with CLIP, and at ".join(map(easy_rates, sides))
            findings.append(
                f"- {row.label}: colour + shape {text_of(differences[1])}.\n  Most seeds learn the "
                f"objects at {easy} with SuperCLIP."
            )
    outside = sum(cell.excludes_0() for cell in cells)
    summary = f"""
## All rows

{len(cells)} differences are shown. In bold: the interval excludes 0 (uncorrected), as {outside} do.
{survivors(cells)} survive the correction of Benjamini and Hochberg at 5 %. Not run yet, and not on
this page: {"; ".join(missing) or "nothing"}.

| | seconds | R@1 | colour_shape (object) | held_out (probe) |
| --- | --- | --- | --- | --- |"""
    return "\n".join(
        [TITLE + INTRO, *findings, summary, *table, OPEN, *open_table(found), RATES, *rates, ""]
    )


# -----------------------------------------------------------------------------
# The figures

METHODS = {"CLIP": "#4b5563", "SuperCLIP": "#d1495b"}


def draw(path, found, score):
    """A score of both methods against the learning rate: a dot for each seed, and a line through
    the means."""
    names = [name for name in BATCHES if name in found]
    if not names:
        return
    optional("matplotlib").use("Agg")
    plt = optional("matplotlib.pyplot")
    _, axes = plt.subplots(1, len(names), figsize=(14, 3), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names):
        for side, (method, colour) in zip(found[name], METHODS.items()):
            rates = [*side.tried]
            rows = [[compare.value_of(run, score) for run in side.tried[rate]] for rate in rates]
            axis.plot(rates, rows, "o", color=colour, alpha=0.4, markersize=4)
            axis.plot(rates, [*map(mean, rows)], color=colour, label=method)
        axis.set(
            title=ROWS[name].label.replace(", ", "\n"),
            xlabel="learning rate",
            ylim=(-3, 103),
            xscale="log",
            xticks=[1e-4, 3e-4, 1e-3],
            xticklabels=["0.0001", "0.0003", "0.001"],
        )
        axis.minorticks_off()
    axes[0, 0].set_ylabel(f"{score} (%)")
    axes[0, 0].legend()
    plt.savefig(path, dpi=150, bbox_inches="tight")


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="such as batch8 (default: all)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    compare.add_shared(parser)
    args = parser.parse_args(argv)
    unknown = {*args.rows} - ROWS.keys()
    check(not unknown, f"rows are {' '.join(ROWS)}")
    if not args.report:
        compare.open_out(args.out)
        study = compare.Study(args.out, args.jobs, compare.PUBLISHED)
        for name in args.rows or ROWS:
            try:
                sides_of(study, name)
            except InputError as error:
                print(f"{name} is not finished: {error}", flush=True)
    found = complete_rows(compare.Study(args.out, 0, compare.PUBLISHED))
    RESULTS.write_text(page(found))
    draw(ASSETS / "study.png", found, "colour_shape")
    draw(ASSETS / "rates.png", found, "R@1")


if __name__ == "__main__":
    run_command(main)
