"""The published rows: what is run for each, and their lines in results.md and rates.md.

    python -m study.plan                      write these lines anew, from study/runs.jsonl
    python -m study.plan --run A32 B32        run what is missing of these rows, or arms, in turn
    python -m study.plan --run C8 --rates     only what chooses their learning rates

An arm is a command at a learning rate of its own, and a row holds arms to compare: C is CLIP, W is
SuperCLIP whose head gets the words of another pair, and S is SuperCLIP.

No rate is typed here. Seeds that are not scored try some rates, and as long as the best of them is
the lowest or the highest one, a rate beyond it. The default is taken if its score is within a point
of the best one, else the lowest rate that is. A rate is judged by the score that the row reports,
or by R@1 if no rate gets 5 % there.

Runs go to out_study/runs.jsonl. What is published is its copy in study/, whose runs must be of one
commit. The pages are Markdown, for a person to edit: a line that begins as one of the lines here
does, with its first cell, is replaced, and nothing else. A line without a place comes last.
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
# The primary questions, as b, a and a score. Their intervals are Bonferroni's for six, 99.17 %.
PRIMARY = {
    ("A32/S", "A32/C", "colour_shape"),
    ("B32/S", "B32/C", "colour_shape"),
    ("A32/S", "A32/W", "colour_shape"),
    ("B32/S", "B32/W", "colour_shape"),
    ("D6/S", "D6/C", "type"),
    ("heads/colours", "heads/shapes", "colour - shape"),
}
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
    **three_arms("D6", f"{SHOP} 6", score="type"),
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
    """{rate: its runs} -> {rate: its score, or R@1 if that is below 5 % at all rates}."""
    for name in (score, "R@1"):
        goals = compare.goals_of(tried, lambda run, name=name: compare.value_of(run, name))
        if max(goals.values()) >= 5:
            break
    return goals


def search(study, name):
    """The learning rates that were tried for an arm -> {rate: what it is judged by}."""
    arm = ARMS[name]
    command = compare.read_command(arm.command)
    rates = [DEFAULT_RATE * factor for factor in arm.factors]
    while True:
        goals = goals_of(study.search(command, rates, arm.choosing), arm.score)
        best = max(goals, key=goals.get)
        beyond = best / 2 if best == min(goals) else best * 2
        if not compare.is_end(goals) or not RATE_BOUNDS[0] <= beyond <= RATE_BOUNDS[1]:
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
# Cells of a line


def values_of(study, name, score):
    """A score of an arm in percent, for each seed. score: its name, or "colour - shape"."""
    first, _, second = score.partition(" - ")
    values = {}
    for run in runs_of(study, name):
        values[run["seed"]] = compare.value_of(run, first)
        if second:
            values[run["seed"]] -= compare.value_of(run, second)
    return values


def rates(study, *names):
    return " / ".join(f"{rate_of(study, name):.3g}" for name in names)


def level(study, name, score):
    return f"{mean(values_of(study, name, score).values()):.1f}"


def gain(study, b, a, score):
    """b - a: the mean of the seeds that both have, and half of its interval. Only that of a primary
    question may be bold, which says that it excludes 0."""
    is_primary = (b, a, score) in PRIMARY
    left, right = values_of(study, b, score), values_of(study, a, score)
    differences = [left[seed] - right[seed] for seed in left if seed in right]
    quantile = PRIMARY_QUANTILES[len(differences)] if is_primary else None
    overlap = SHOP_OVERLAP if b.startswith("D") else 0.0
    middle, half = compare.interval(differences, quantile, overlap)
    text = f"{middle:+.1f} ± {half:.1f}"
    return f"**{text}**" if is_primary and abs(middle) > half else text


# -----------------------------------------------------------------------------
# Lines of the pages


def sooner(study, row):
    C, W, S = [f"{row}/{arm}" for arm in "CWS"]
    levels = [level(study, name, "colour_shape") for name in (C, W, S)]
    gains = [gain(study, S, name, "colour_shape") for name in (C, W)]
    others = [gain(study, S, C, score) for score in ("R@1", "held_out")]
    return [rates(study, C, W, S), *levels, *gains, *others]


def gains(study, b, a, *scores):
    return [gain(study, b, a, score) for score in scores]


def head(study, name):
    return [level(study, name, score) for score in ("colour", "shape", "colour - shape")]


def change(study, name, *pairs):
    cells = [rates(study, name), level(study, name, "colour_shape")]
    for b, a in pairs:
        cells += gains(study, b, a, "colour_shape", "R@1")
    return cells


def photographs(study, row, arms):
    names = [f"{row}/{arm}" for arm in arms]
    cells = [rates(study, *names)]
    for score in ("type", "R@1", "R@10"):
        means = " -> ".join(level(study, name, score) for name in names)
        cells.append(f"{means}, {gain(study, names[1], names[0], score)}")
    return cells


def tried(study, name):
    goals = search(study, name)
    texts = [f"{rate:.3g}: {value:.1f}" for rate, value in goals.items()]
    return [rates(study, name), ", ".join(texts)]


# Of each line its first cell, what makes the others, and its arguments
LINES = [
    ("mixed, 24,000", sooner, "A24"),
    ("mixed, 32,000", sooner, "A32"),
    ("mixed, 48,000", sooner, "A48"),
    ("short, 24,000", sooner, "B24"),
    ("short, 32,000", sooner, "B32"),
    ("short, 48,000", sooner, "B48"),
    ("mixed, 32,000, batch 8", sooner, "C8"),
    ("mixed: S at 24,000 - C at 32,000", gains, "A24/S", "A32/C", "colour_shape", "R@1"),
    ("mixed: S at 24,000 - C at 48,000", gains, "A24/S", "A48/C", "colour_shape", "R@1"),
    ("short: S at 24,000 - C at 32,000", gains, "B24/S", "B32/C", "colour_shape", "R@1"),
    ("short: S at 24,000 - C at 48,000", gains, "B24/S", "B48/C", "colour_shape", "R@1"),
    ("colours", head, "heads/colours"),
    ("shapes", head, "heads/shapes"),
    ("the first - the second", gains, "heads/colours", "heads/shapes",
     "colour", "shape", "colour - shape"),
    ("another pair's words", change, "A32/W", ("A32/W", "A32/C"), ("A32/S", "A32/W")),
    ("CLIP, mean of patches", change, "others/mean", ("others/mean", "A32/C"),
     ("A32/S", "others/mean")),
    ("CLIP, faster image tower", change, "others/tower", ("others/tower", "A32/C"),
     ("A32/S", "others/tower")),
    ("no IDF", change, "parts/idf", ("parts/idf", "A32/S")),
    ("lambda 0.3", change, "parts/0.3", ("parts/0.3", "A32/S")),
    ("lambda 3", change, "parts/3", ("parts/3", "A32/S")),
    ("dual captions", change, "parts/dual", ("parts/dual", "B32/S")),
    ("3 epochs", photographs, "D3", "CS"),
    ("6 epochs", photographs, "D6", "CS"),
    ("6 epochs, another pair's words", photographs, "D6", "WS"),
]  # fmt: skip


def write_lines(study, path, lines):
    """Put lines of tables in the places of those that have the same first cell, or at the end of
    the page. A line whose runs are missing says so."""
    new = {}
    for label, make, *args in lines:
        try:
            cells = make(study, *args)
        except compare.NotRun:
            cells = ["not run"]
        new[label] = f"| {' | '.join([label, *cells])} |"
    page = []
    for line in path.read_text("utf-8").splitlines():
        label = line.split("|")[1].strip() if line.startswith("|") else None
        page.append(new.pop(label, line))
    path.write_text("\n".join([*page, *new.values(), ""]), "utf-8")


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--run", nargs="+", metavar="ROW", help="run a row such as A32, or an arm such as A32/S")
    add("--rates", action="store_true", help="run only what chooses the rates")
    args = parser.parse_args(argv)
    for row in args.run or []:
        names = [name for name in ARMS if row in (name, name.partition("/")[0])]
        check(names, f"there is no row {row}")
        ask = rate_of if args.rates else runs_of
        study = compare.open_study()
        study.answer([partial(ask, study, name) for name in names], compare.default_jobs())
    if not args.run:
        study = compare.Study(RUNS, any_code=True)  # which has changed since then
        commits = {run["commit"] for run in study.runs.values()}
        check(len(commits) <= 1, f"{RUNS} has runs of several commits: {commits}")
        write_lines(study, RESULTS, LINES)
        searched = [name for name in ARMS if ARMS[name].rate_of is None]
        write_lines(study, RATES, [(name, tried, name) for name in searched])


if __name__ == "__main__":
    run_command(main)
