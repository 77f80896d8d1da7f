"""The published rows: what is run for each, and their lines in results.md and rates.md.

    python -m study.plan                      write these lines anew, from study/runs.jsonl
    python -m study.plan --run A32 B32        run what is missing of these rows, or arms, in turn

An arm is a command at a learning rate of its own, and a row holds arms to compare: C is CLIP, W is
SuperCLIP whose head gets the words of another pair, and S is SuperCLIP.

No rate is typed here. Seeds that are not scored try some rates. While the best of them is the
lowest or the highest one, they try a rate beyond it, too. The default is taken if its score is
within a point of the best one, else the lowest rate that is. A rate is judged by the score that the
row reports, or by R@1 if no rate gets 5 % there.

Runs go to out_study/runs.jsonl. What is published is its copy in study/, whose runs must be of one
commit. So rows that are missing are run in a worktree of that commit, which gets a copy back. The
pages are Markdown, for a person to edit. Only rows of tables whose first cell is a key of LINES, or
of ARMS, are replaced. A row that the page lacks comes last.
"""

from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from cli import check, make_parser, run_command
from study import compare

RESULTS = Path(__file__).with_name("results.md")
RATES = Path(__file__).with_name("rates.md")
RUNS = Path(__file__).with_name("runs.jsonl")

DEFAULT_RATE = 5e-4
RATE_BOUNDS = 3e-5, 4e-3
# Splits of the photographs share pairs, so their variance is larger (Nadeau and Bengio), by the
# pairs validated on over those trained on.
SHOP_OVERLAP = 2_000 / 24_000
# The primary questions. Their intervals are Bonferroni's for six, 99.17 %.
PRIMARY = {
    "A32/S - A32/C", "B32/S - B32/C", "A32/S - A32/W", "B32/S - B32/W", "type: D6/S - D6/C",
    "colour - shape: heads/colours - heads/shapes",
}  # fmt: skip
PRIMARY_QUANTILES = {10: 3.36, 15: 3.07}  # Student's t of so many differences

# -----------------------------------------------------------------------------
# Arms and rows


class Arm(NamedTuple):
    command: str  # without its learning rate
    scored: range = range(15, 25)  # seeds
    choosing: range = range(3)  # seeds that choose its rate
    factors: tuple = (0.5, 1, 2)  # of the default rate, tried first
    score: str = "colour_shape"  # what a rate is judged by
    rate_of: str | None = None  # the arm whose rate this one takes


CLIP, OTHER_WORDS, SUPERCLIP = "train.py --cls_weight 0", "-m study.shuffled", "train.py"
SHORT = "--captions json.short"
SHOP = """--train_data 'out_study/shop/{seed}/train-*.tar' \
--val_data 'out_study/shop/{seed}/val-*.tar' --zeroshot_data out_study/shop/{seed}/type \
--model tiny --batch_size 32 --epochs"""
BOTH_CAPTIONS = "--captions json.short --label_captions json.long"


def three_arms(name, options="", **facts):
    """The arms C, W and S of a row."""
    programs = {"C": CLIP, "W": OTHER_WORDS, "S": SUPERCLIP}
    return {f"{name}/{x}": Arm(f"{text} {options}", **facts) for x, text in programs.items()}


MANY = dict(scored=range(15, 30), choosing=range(5))
# A bare run trains on 32,000 samples, 1.6 epochs.
ARMS = {
    **three_arms("A32", **MANY),
    **three_arms("A24", "--epochs 1.2"),
    **three_arms("A48", "--epochs 2.4"),
    **three_arms("B32", SHORT, **MANY),
    **three_arms("B24", f"{SHORT} --epochs 1.2"),
    **three_arms("B48", f"{SHORT} --epochs 2.4"),
    **three_arms("C8", "--batch_size 8 --epochs 1.6", factors=(0.125, 0.25, 0.5)),
    "D6/C": Arm(f"{CLIP} {SHOP} 6", score="type"),
    "D6/S": Arm(f"{SUPERCLIP} {SHOP} 6", score="type"),
    "D3/C": Arm(f"{CLIP} {SHOP} 3", score="type", rate_of="D6/C"),
    "D3/S": Arm(f"{SUPERCLIP} {SHOP} 3", score="type", rate_of="D6/S"),
    "heads/colours": Arm("-m study.some_words --hears colours --epochs 1.2",
                         scored=range(15, 30), rate_of="A32/S"),
    "heads/shapes": Arm("-m study.some_words --hears shapes --epochs 1.2",
                        scored=range(15, 30), rate_of="A32/S"),
    "parts/idf": Arm("-m study.no_idf"),
    "parts/0.3": Arm("train.py --cls_weight 0.3"),
    "parts/3": Arm("train.py --cls_weight 3"),
    "parts/dual": Arm(f"train.py {BOTH_CAPTIONS}"),
    "others/mean": Arm("-m study.mean_patches --cls_weight 0"),
    "others/tower": Arm("-m study.fast_tower --cls_weight 0"),
}  # fmt: skip


# -----------------------------------------------------------------------------
# Learning rates, and runs at them. All of this raises compare.NotRun


def goals_of(tried, score):
    """{rate: its runs} -> {rate: its score, or its R@1 if no rate gets 5 % of that score}."""
    goals = compare.goals_of(tried, partial(compare.value_of, name=score))
    is_low = max(goals.values()) < 5
    return goals_of(tried, "R@1") if is_low and score != "R@1" else goals


def search(study, name):
    """The learning rates that were tried for an arm -> {rate: what it is judged by}."""
    arm = ARMS[name]
    command = compare.read_command(arm.command)
    rates = [DEFAULT_RATE * factor for factor in arm.factors]
    while True:
        goals = goals_of(study.search(command, rates, arm.choosing), arm.score)
        best = max(goals, key=goals.get)
        if min(goals) < best < max(goals):
            return goals
        beyond = best / 2 if best == min(goals) else best * 2
        if not RATE_BOUNDS[0] <= beyond <= RATE_BOUNDS[1]:
            return goals
        rates.append(beyond)


def rate_of(study, name):
    """The learning rate of an arm."""
    if ARMS[name].rate_of is not None:
        return rate_of(study, ARMS[name].rate_of)
    return compare.choose(search(study, name), DEFAULT_RATE)


def runs_of(study, name):
    """The runs of an arm that are scored, one for each seed."""
    rate = rate_of(study, name)
    command = compare.read_command(ARMS[name].command)
    return study.find([command.at(rate, seed) for seed in ARMS[name].scored])


# -----------------------------------------------------------------------------
# The pages. A cell is a formula: "rate A32/S" (the one taken), "rates A32/S" (those tried, and what
# they scored), "R@1: A32/S" or "R@1: A32/S - A32/C". One without a score is about colour + shape.


def values_of(study, name, score):
    """A score of an arm in percent, for each seed. score: its name, or "colour - shape"."""
    first, _, second = score.partition(" - ")
    values = {}
    for run in runs_of(study, name):
        values[run["seed"]] = compare.value_of(run, first)
        if second:
            values[run["seed"]] -= compare.value_of(run, second)
    return values


def cell(study, formula):
    """What a formula says, as a text. Raises compare.NotRun.

    A difference is the mean over the seeds that both arms have, and half of its interval. Only one
    that answers a primary question may be bold, which says that its interval excludes 0.
    """
    if formula.startswith("rate "):
        return f"{rate_of(study, formula.removeprefix('rate ')):.3g}"
    if formula.startswith("rates "):
        return compare.text_of(search(study, formula.removeprefix("rates ")))
    score, _, arms = formula.rpartition(": ")
    b, _, a = arms.partition(" - ")
    score = score or "colour_shape"
    left = values_of(study, b, score)
    if not a:
        return f"{mean(left.values()):.1f}"
    right = values_of(study, a, score)
    differences = [left[seed] - right[seed] for seed in left if seed in right]
    quantile = PRIMARY_QUANTILES[len(differences)] if formula in PRIMARY else None
    overlap = SHOP_OVERLAP if b.startswith("D") else 0.0
    middle, half = compare.interval(differences, quantile, overlap)
    text = f"{middle:+.1f} ± {half:.1f}"
    return f"**{text}**" if formula in PRIMARY and abs(middle) > half else text


SOONER = (
    "rate {0}/C | rate {0}/W | rate {0}/S | {0}/C | {0}/W | {0}/S | {0}/S - {0}/C | "
    "{0}/S - {0}/W | R@1: {0}/S - {0}/C | held_out: {0}/S - {0}/C"
)
EARLIER = "{0} - {1} | R@1: {0} - {1}"
HEARD = "colour: {0} | shape: {0} | colour - shape: {0}"
OTHER = "rate {0} | {0} | {0} - A32/C | R@1: {0} - A32/C | A32/S - {0} | R@1: A32/S - {0}"
PART = "rate {0} | {0} | {0} - {1} | R@1: {0} - {1}"
PHOTOGRAPHS = (
    "rate {0} | rate {1} | type: {0} | type: {1} | type: {1} - {0} | R@1: {1} - {0} | "
    "R@10: {1} - {0}"
)
# The first cell of a line -> the formulas of the others, and the arms to put into them
LINES = {
    "mixed, 24,000": (SOONER, "A24"),
    "mixed, 32,000": (SOONER, "A32"),
    "mixed, 48,000": (SOONER, "A48"),
    "short, 24,000": (SOONER, "B24"),
    "short, 32,000": (SOONER, "B32"),
    "short, 48,000": (SOONER, "B48"),
    "mixed, 32,000, batch 8": (SOONER, "C8"),
    "mixed: S at 24,000 - C at 32,000": (EARLIER, "A24/S", "A32/C"),
    "mixed: S at 24,000 - C at 48,000": (EARLIER, "A24/S", "A48/C"),
    "short: S at 24,000 - C at 32,000": (EARLIER, "B24/S", "B32/C"),
    "short: S at 24,000 - C at 48,000": (EARLIER, "B24/S", "B48/C"),
    "colours": (HEARD, "heads/colours"),
    "shapes": (HEARD, "heads/shapes"),
    "the first - the second": (HEARD, "heads/colours - heads/shapes"),
    "another pair's words": (OTHER, "A32/W"),
    "CLIP, mean of patches": (OTHER, "others/mean"),
    "CLIP, faster image tower": (OTHER, "others/tower"),
    "no IDF": (PART, "parts/idf", "A32/S"),
    "lambda 0.3": (PART, "parts/0.3", "A32/S"),
    "lambda 3": (PART, "parts/3", "A32/S"),
    "dual captions, S: short": (PART, "parts/dual", "B32/S"),
    "3 epochs": (PHOTOGRAPHS, "D3/C", "D3/S"),
    "6 epochs": (PHOTOGRAPHS, "D6/C", "D6/S"),
}


def write_lines(study, path, lines):
    """Put lines of tables, such as LINES, in the places of those that have the same first cell, or
    at the end of the page."""
    new = {}
    for label, (formulas, *arms) in lines.items():
        cells = [cell(study, formula) for formula in formulas.format(*arms).split(" | ")]
        new[label] = f"| {label} | {' | '.join(cells)} |"
    page = []
    for line in path.read_text("utf-8").splitlines():
        label = line.split("|")[1].strip() if line.startswith("|") else None
        page.append(new.pop(label, line))
    path.write_text("\n".join([*page, *new.values(), ""]), "utf-8")


def main(argv):
    parser = make_parser(__doc__)
    text = "run a row such as A32, or an arm such as A32/S"
    parser.add_argument("--run", nargs="+", default=[], metavar="ROW", help=text)
    args = parser.parse_args(argv)
    for row in args.run:
        names = [name for name in ARMS if row in (name, name.partition("/")[0])]
        check(names, f"there is no row {row}")
        study = compare.Study(compare.OUT / "runs.jsonl")
        study.answer([partial(runs_of, study, name) for name in names], compare.default_jobs())
    if not args.run:
        study = compare.Study(RUNS, any_code=True)  # which has changed since then
        commits = {run["commit"] for run in study.runs.values()}
        check(len(commits) <= 1, f"{RUNS} has runs of several commits: {commits}")
        write_lines(study, RESULTS, LINES)
        searched = [name for name in ARMS if ARMS[name].rate_of is None]
        write_lines(study, RATES, {name: ("rate {0} | rates {0}", name) for name in searched})


if __name__ == "__main__":
    run_command(main)
