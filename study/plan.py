"""The published page: a list of experiments, each of which is a command line of study.compare.

    python -m study.plan                     run what is missing, and write results.md and study.png
    python -m study.plan batch8 batch32      run these rows alone
    python -m study.plan --report            only write them, from the runs that are there

The runs go to study/runs.jsonl, and the page shows those of the code that has run last. Two rows
need photographs in out_study: Flickr8k as shards, flickr8k/train-*.tar and dev-*.tar, whose .json
has five captions in the field "captions", and cifar10/, as objects.py wants it. (Our Flickr8k is
squashed to 224 x 224 pixels.)
"""

import math
import shlex
import textwrap
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from cli import InputError, check, make_parser, optional, run_command
from data import cores
from study import compare

RESULTS = Path(__file__).with_name("results.md")
RUNS = RESULTS.with_name("runs.jsonl")
FIGURE = RESULTS.parent.parent / "assets/study.png"
PAIR = '--a "train.py --cls_weight 0" --b "train.py"'
GROUPS = '--a "-m study.groups --group {0} --cls_weight 0" --b "-m study.groups --group {0}"'
OUT = Path("out_study")  # worlds, and photographs
SCORES = ("R@1", "colour_shape", "held_out")
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
    scores: tuple = SCORES  # those that the page shows

    def __str__(self):
        """The options of study.compare."""
        return f'{self.sides} --common "{self.common}" --rates {self.more}'.strip()


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
    "short": Row("short captions", PAIR, f"{AT_32} --captions json.short"),
    "dual": Row(
        "SuperCLIP: short -> dual captions",
        '--a "train.py" --b "train.py --label_captions json.long"',
        f"{AT_32} --captions json.short",
    ),
    "sigmoid": Row("SigLIP -> SuperSigLIP", PAIR, f"{AT_32} --loss sigmoid"),
    "objects": Row(
        "CIFAR-10 in settings, batch 16, 96,000 samples",
        PAIR,
        "--batch_size 16 --epochs 4.8",
        "--photographs out_study/cifar10 --probe",
        ("R@1", "object", "probe"),
    ),
    "settings16": Row("16 settings, batch 8", PAIR, "--batch_size 8 --epochs 2.4", "--settings 16"),
}
BATCHES = ("batch8", "batch32", "batch256", "batch32long", "batch256long")
# The table to add to: the row and the side that a variant is.
VARIANTS = {
    "CLIP": ("batch32", 0),
    "SuperCLIP": ("batch32", 1),
    "SigLIP": ("sigmoid", 0),
    "SuperSigLIP": ("sigmoid", 1),
    "no IDF": ("no_idf", 1),
    "SuperCLIP, short captions": ("dual", 0),
    "SuperCLIP, short captions, words of the long": ("dual", 1),
}


def sides_of(study, name):
    """Run what is missing of a row. Returns its two sides, or None if the study only reads and runs
    are missing."""
    args = compare.make_options().parse_args(shlex.split(str(ROWS[name])))
    return compare.run_experiment(study, args)


def complete_rows(study):
    """{name: its two sides} of the rows all of whose runs are there. study: one that reads only."""
    found = {name: sides_of(study, name) for name in ROWS}
    return {name: sides for name, sides in found.items() if sides is not None}


# -----------------------------------------------------------------------------
# The page

INTRO = """# CLIP and SuperCLIP, made small

Made by `python -m study.plan` from the runs in [runs.jsonl](runs.jsonl), all of one code, that of
commit {commit}. A cell reads: mean of the first command -> mean of the second, and their difference
with its 95 % interval (Student's t), in percent. Bold: the interval excludes 0 (uncorrected). Five
seeds are paired, each with a world of its own: a data set drawn for it. (Those of Flickr8k share
its pairs, so its intervals leave out the draw of the data.) One rule for all rows: both commands
are tried at four to eight learning rates, and a seed takes the rate that is best for the other
four. These choices depend on each other, so intervals are approximate. A row is CLIP -> SuperCLIP
and sees 48,000 samples if nothing else is said: 6,000 steps at batch 8, 1,500 at 32, and 187 at
256.

R@1 is the mean of both ways among 1,000 pairs that training has not seen (Flickr8k has five
captions for each image; chance 0.1), colour_shape and object are zero-shot scores of class folders
(1.6 and 10), held_out is that of combinations that training never shows (1.6), and probe that of a
linear classifier on the frozen class token (10). Seconds are those of the fastest run of each on
one core: others shared the machine.

## What the runs say

The *gap* is SuperCLIP's colour_shape minus CLIP's. Does it shrink with more samples? Does it grow
when fewer pairs are compared? In parentheses: at how many of the learning rates that were tried
most seeds learn the objects.
"""
HEADINGS = """
| | seconds | R@1 | colour_shape (object) | held_out (probe) |
| --- | --- | --- | --- | --- |"""
OPEN = f"""
![colour_shape of each seed at each learning rate](../assets/study.png)

## A table to add a row to

Batch 32, 48,000 samples, means over five seeds, at rates chosen as above. Yours gets its row by
`--b`:

    python -m study.compare --a "train.py" --b "../fork/train.py" --common "{AT_32}" --rates

| | R@1 | colour_shape | held_out | command |
| --- | --- | --- | --- | --- |"""
RATES = """
## All learning rates that were tried

Each rate has its score (the mean of R@1 and the zero-shot score over the seeds), then how many
seeds learned the objects (colour_shape above half), diverged, or took this rate.
"""
# (row, row): how does the gap change from one to the other?
CHANGES = (
    ("batch32", "batch8"),
    ("batch256", "batch8"),
    ("groups64", "groups4"),
    ("batch32", "batch32long"),
    ("batch256", "batch256long"),
)


def p_of(found):
    """The probability that five seeds differ as much by chance: both tails of Student's
    distribution with four degrees of freedom, which has a closed form."""
    error = found.half / compare.QUANTILES[3]
    s = abs(found.mean) / max(math.hypot(found.mean, 2 * error), 1e-9)
    return 1 - 1.5 * s + 0.5 * s**3


def survivors(intervals):
    """How many differences survive Benjamini and Hochberg's correction: at most 5 % of them are
    expected to be chance."""
    survive = 0
    for rank, p in enumerate(sorted(map(p_of, intervals)), 1):
        if p <= 0.05 * rank / len(intervals):
            survive = rank
    return survive


def bold(found):
    """An interval, in bold if it excludes 0."""
    return f"**{found}**" if found.excludes_0() else str(found)


def cell(sides, score):
    """Both means and their difference."""
    a, b = compare.means(sides, score)
    return f"{a:.1f} -> {b:.1f}, {bold(compare.difference(sides, score))}"


def tolerated(side):
    """At how many of its learning rates do most seeds learn the objects? As a text."""
    learned = [*side.values(compare.has_learned).values()]
    return f"{sum(mean(seeds) > 0.5 for seeds in learned)} of {len(learned)}"


def findings(found):
    """What the rows of batches and groups say, as lines."""
    lines = []
    for name in BATCHES:
        if name in found:
            gap = bold(compare.difference(found[name], "colour_shape"))
            clip, superclip = map(tolerated, found[name])
            lines.append(f"- {ROWS[name].label}: {gap} (CLIP {clip} rates, SuperCLIP {superclip})")
    for first, second in CHANGES:
        if first in found and second in found:
            pairs = zip(*[compare.gaps(found[name], "colour_shape") for name in (first, second)])
            change = bold(compare.interval([after - before for before, after in pairs]))
            step = f"From {ROWS[first].label} to {ROWS[second].label}"
            lines.append(f"- {step} the gap changes by {change}.")
    return lines


def row_of(*texts):
    return f"| {' | '.join(texts)} |"


def open_table(found):
    lines = []
    for label, (name, number) in VARIANTS.items():
        if name in found:
            texts = [f"{compare.means(found[name], score)[number]:.1f}" for score in SCORES]
            lines.append(row_of(label, *texts, f"`{found[name][number].command.text}`"))
    return lines


def page(found):
    """results.md as a text."""
    table = []
    intervals = []
    rates = []
    for name, sides in found.items():
        row = ROWS[name]
        intervals += [compare.difference(sides, score) for score in row.scores]
        cells = [cell(sides, score) for score in row.scores]
        table.append(row_of(row.label, " / ".join(map(compare.Side.seconds, sides)), *cells))
        rates.append(f"- {row.label}: `python -m study.compare {row}`")
        for letter, side in zip("ab", sides):
            rates.append(f"  - {letter}: {'; '.join(compare.rate_texts(side))}")
    outside = sum(map(compare.Interval.excludes_0, intervals))
    missing = [row.label for name, row in ROWS.items() if name not in found]
    summary = textwrap.fill(
        f"{outside} of {len(intervals)} intervals exclude 0 (uncorrected). {survivors(intervals)} "
        "survive the correction of Benjamini and Hochberg at 5 %, a rough count, because rows "
        "share runs. Not run yet, and not on this page: " + ("; ".join(missing) or "nothing") + ".",
        width=100,
        break_on_hyphens=False,
    )
    first = next(iter(found.values()))[0].runs()[0]
    lines = [
        INTRO.format(commit=first["commit"].removesuffix("-dirty")),  # runs.jsonl had grown
        *findings(found),
        "\n## All rows\n",
        summary,
        HEADINGS,
        *table,
        OPEN,
        *open_table(found),
        RATES,
        *rates,
        "",
    ]
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# The figure

METHODS = {"CLIP": "#4b5563", "SuperCLIP": "#d1495b"}


def draw(found):
    """colour_shape of both methods against the learning rate: a dot for each seed, and a line
    through the means. Without a row of a batch there is nothing to draw."""
    names = [name for name in BATCHES if name in found]
    if not names:
        return
    plt = optional("matplotlib.pyplot", "matplotlib")
    figure, axes = plt.subplots(
        ncols=len(names),
        squeeze=False,
        sharex=True,
        sharey=True,
        figsize=(2 + 2.4 * len(names), 3),
    )
    for axis, name in zip(axes[0], names):
        for side, (method, colour) in zip(found[name], METHODS.items()):
            values = side.values(lambda run: compare.value_of(run, "colour_shape"))
            axis.plot([*values], [*values.values()], "o", color=colour, alpha=0.4, markersize=4)
            axis.plot([*values], [*map(mean, values.values())], color=colour, label=method)
        axis.set(
            title=ROWS[name].label.replace(", ", "\n"),
            xlabel="learning rate",
            xscale="log",
            xticks=[1e-4, 3e-4, 1e-3],
            xticklabels=["1e-4", "3e-4", "1e-3"],
        )
        axis.minorticks_off()
    axes[0, 0].set_ylabel("colour_shape (%)")
    axes[0, -1].legend()
    figure.savefig(FIGURE, dpi=150, bbox_inches="tight")


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="such as batch8 (default: all)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    check(ROWS.keys() >= {*args.rows}, f"rows are {' '.join(ROWS)}")
    if not args.report:
        compare.open_out(OUT)
        study = compare.Study(OUT, cores(), RUNS)
        for name in args.rows or ROWS:
            try:
                sides_of(study, name)
            except InputError as error:
                print(f"{name} is not finished: {error}")
    found = complete_rows(compare.Study(OUT, 0, RUNS))
    check(found, "no row is complete yet")
    RESULTS.write_text(page(found))
    draw(found)


if __name__ == "__main__":
    run_command(main)
