"""The published pages: a list of experiments, each of which is a command line of study.compare.

    python -m study.plan                     write results.md, rates.md and study.png
    python -m study.plan batch8 batch32      run what is missing of these rows first

Runs are added to study/runs.jsonl. A row is shown with the runs of the newest code that has all of
them, so that a change of the code takes no row off the page, and a row that is run again replaces
only itself.

Most rows name the learning rate of each side. It is the best one of searches.jsonl, where seeds 0
to 4 tried several. (They ran at older commits. A line holds the scores of one rate.) The rows of a
shop's photographs need what `python -m study.shop` makes.
"""

import json
import re
import shlex
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from cli import check, make_parser, number, run_command
from data import cores
from study import compare
from study.compare import FIRST_SCORED, read_command

FOLDER = Path(__file__).parent
RUNS = FOLDER / "runs.jsonl"
RESULTS = FOLDER / "results.md"
SEARCHES = FOLDER / "searches.jsonl"
OUT = Path("out_study")  # worlds, and what study.shop makes
DRAWN = ("R@1", "colour_shape", "held_out")
PHOTOGRAPHS = ("R@1", "R@10", "type", "colour", "both", "loss")


class Row(NamedTuple):
    """An experiment."""

    label: str
    sides: str
    common: str
    more: str = "--seeds 10"
    scores: tuple = DRAWN  # those that the page shows
    tried_too: str = ""  # a command whose rate joins those of searches.jsonl

    def __str__(self):
        """The options of study.compare."""
        return f'{self.sides} --common "{self.common}" {self.more}'


PAIR = '--a "train.py --cls_weight 0{}" --b "train.py{}"'
GROUPS = (
    '--a "-m study.groups --group {0} --cls_weight 0 --learning_rate {1}" '
    '--b "-m study.groups --group {0} --learning_rate {2}"'
)
SEARCHED = PAIR.format("", "")  # where no search was made before
AT_8 = "--batch_size 8 --epochs 2.4"  # 48,000 samples are 2.4 epochs of 20,000 pairs
AT_32 = "--batch_size 32 --epochs 2.4"
AT_64 = "--batch_size 64 --epochs 2.4"
SHORT = f"{AT_32} --captions json.short"
SHOP = (
    "--train_data 'out_study/shop/{0}/train-*.tar' --val_data 'out_study/shop/val/train-*.tar' "
    "--zeroshot_data out_study/shop/type out_study/shop/colour out_study/shop/both "
    "--model tiny --batch_size 32 --epochs {1}"
)


def at_rates(clip, superclip):
    """The options of CLIP and SuperCLIP, each with its learning rate."""
    return PAIR.format(f" --learning_rate {clip}", f" --learning_rate {superclip}")


def variants(a, b):
    """The options of a comparison of two commands at 3.5e-4."""
    return f'--a "{a} --learning_rate 3.5e-4" --b "{b} --learning_rate 3.5e-4"'


def shop_row(label, weight, pairs, epochs, more):
    """CLIP against a head with this weight, on so many pairs of a shop."""
    sides = f'--a "train.py --cls_weight 0" --b "train.py --cls_weight {weight}"'
    return Row(label, sides, SHOP.format(pairs, epochs), more, PHOTOGRAPHS)


# In the order in which they are run.
ROWS = {
    "batch8": Row(
        "batch 8",
        at_rates("8.75e-5", "1.75e-4"),
        AT_8,
        tried_too="train.py --cls_weight 0 --learning_rate 2.19e-5",
    ),
    "batch32": Row("batch 32", at_rates("1.75e-4", "3.5e-4"), AT_32),
    "groups4": Row("batch 64, groups of 4", GROUPS.format(4, "1.24e-4", "4.95e-4"), AT_64),
    "groups64": Row("batch 64, groups of 64", GROUPS.format(64, "2.47e-4", "4.95e-4"), AT_64),
    "short": Row("batch 32, short captions", at_rates("1.75e-4", "3.5e-4"), SHORT),
    "dual": Row(
        "SuperCLIP: short -> dual captions",
        variants("train.py", "train.py --label_captions json.long"),
        SHORT,
    ),
    "no_idf": Row("SuperCLIP: IDF -> none", variants("train.py", "-m study.no_idf"), AT_32),
    "lambda0.3": Row(
        "SuperCLIP: lambda 1 -> 0.3", variants("train.py", "train.py --cls_weight 0.3"), AT_32
    ),
    "settings16": Row(
        "batch 8, 16 settings",
        SEARCHED,
        AT_8,
        "--settings 16 --rates 0.5 1 --search_seeds 3 --seeds 10",
    ),
    "batch32long": Row(
        "batch 32, 144,000 samples", at_rates("3.5e-4", "3.5e-4"), "--batch_size 32 --epochs 7.2"
    ),
    "shop4": shop_row("4,000 pairs, lambda 1", 1, 4000, 24, "--rates 0.5 1 2 --search_seeds 3"),
    "shop4_0.3": shop_row(
        "4,000 pairs, lambda 0.3", 0.3, 4000, 24, "--rates 0.5 1 2 --search_seeds 3"
    ),
    "shop24": shop_row("24,000 pairs, lambda 1", 1, 24000, 12, "--rates 0.5 1 --search_seeds 2"),
    "shop24_0.3": shop_row(
        "24,000 pairs, lambda 0.3", 0.3, 24000, 12, "--rates 0.5 1 --search_seeds 2"
    ),
    "batch256": Row(
        "batch 256, 96,000 samples",
        SEARCHED,
        "--batch_size 256 --epochs 4.8",
        "--rates 0.25 0.5 1 --search_seeds 2",
    ),
    "batch256long": Row(
        "batch 256, 144,000 samples",
        at_rates("4.95e-4", "9.9e-4"),
        "--batch_size 256 --epochs 7.2",
    ),
}


def experiment_of(row):
    """The two commands of a row, and the rule for their rates."""
    return compare.read_experiment(compare.make_options().parse_args(shlex.split(str(row))))


# -----------------------------------------------------------------------------
# Searches


def without_rate(line):
    """The line of a command at any rate."""
    return re.sub(r" --learning_rate \S+", "", line)


def read_searches(study):
    """What seeds 0 to 4 have scored, in searches.jsonl and in the runs of a study: {(a line without
    its rate, its world): {rate: {seed: run}}}."""
    found = defaultdict(lambda: defaultdict(dict))
    for line in open(SEARCHES):
        row = json.loads(line)
        tried = found[row["command"], row["world"]]
        for seed in range(FIRST_SCORED):
            scores = {name: {"value": values[seed]} for name, values in row["scores"].items()}
            tried[row["rate"]][seed] = {**row, "scores": scores}
    for run in study.runs.values():
        if run["seed"] < FIRST_SCORED:
            tried = found[without_rate(run["command"]), run["world"]]
            tried[run["rate"]][run["seed"]] = run
    return found


def complete_rates(tried):
    """{rate: {seed: run}} -> {rate: the run of each seed}, without rates that lack a seed."""
    n = max(map(len, tried.values()), default=0)
    found = {}
    for rate, runs in sorted(tried.items()):
        if len(runs) == n:
            found[rate] = [runs[seed] for seed in sorted(runs)]
    return found


def tried_rates(searches, command):
    """{rate: the run of each seed} of a command at any rate."""
    return complete_rates(searches[without_rate(command.line()), str(command.world or "")])


def check_rates(row, study):
    """A row that names rates has the best ones."""
    searches = read_searches(study)
    for command in experiment_of(row)[0]:
        if command.names_rate:
            best = compare.best_rate(compare.goals_of(tried_rates(searches, command)))
            check(best == command.rate(), f"{row.label}: {best:.3g} is better than {command}")


# -----------------------------------------------------------------------------
# Runs


def run_row(study, row):
    """Run what is missing of a row."""
    if row.tried_too:
        command = read_command(row.tried_too, row.common, compare.World())
        tasks = [command.at(command.rate(), seed) for seed in range(FIRST_SCORED)]
        study.work([task for task in tasks if task.key(task.code()) not in study.runs])
    check_rates(row, study)
    study.experiment(*experiment_of(row))


def complete_sides(study, command, rule):
    """{code of train.py: the side of a command} for each code that has all runs of it, the newest
    first."""
    codes = dict.fromkeys(run["code"] for run in reversed(study.runs.values()))
    sides = {}
    for code in codes:
        try:
            sides.setdefault(code.partition("-")[0], study.side(command, rule, code))
        except compare.Missing:
            continue
    return sides


def sides_of(study, row):
    """Both sides of a row, from runs of the same train.py, or None if there is no code that has all
    of them."""
    pair, rule = experiment_of(row)
    a, b = [complete_sides(study, command, rule) for command in pair]
    for code in a:
        if code in b:
            return a[code], b[code]
    return None


# -----------------------------------------------------------------------------
# results.md

OPENING = """# Does the word head help?

Made by `python -m study.plan` from [runs.jsonl](runs.jsonl).
"""
HOW_TO_READ = """
A cell reads: mean of the first command -> mean of the second, and their difference with its 95 %
interval (Student's t), in percent. Bold: the interval excludes 0.
"""
DRAWN_HEADINGS = """
| | seeds | rates | seconds | R@1 | colour + shape | held out |
| --- | --- | --- | --- | --- | --- | --- |"""
SHOP_HEADINGS = """
## Photographs

| | seeds | rates | seconds | R@1 | R@10 | type | colour | both | validation loss |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def bold(found, text):
    return f"**{text}**" if found.excludes_0() else text


def cell(sides, score):
    """Both means and their difference."""
    digits = 3 if score == "loss" else 1
    a, b = compare.means(sides, score)
    found = compare.difference(sides, score)
    return f"{a:.{digits}f} -> {b:.{digits}f}, {bold(found, found.text(digits))}"


def line_of(*texts):
    """A line of a table."""
    return f"| {' | '.join(texts)} |"


def row_line(row, sides):
    """The line of a row in its table."""
    seeds = str(len(sides[0].runs))
    rates = " / ".join(f"{side.command.rate():.2e}" for side in sides)
    seconds = " / ".join(map(compare.Side.seconds, sides))
    cells = [cell(sides, score) for score in row.scores]
    return line_of(row.label, seeds, rates, seconds, *cells)


def page(found):
    """results.md as a text. found: {name of a row: its sides}."""
    lines = {DRAWN: [], PHOTOGRAPHS: []}
    for name, sides in found.items():
        row = ROWS[name]
        lines[row.scores].append(row_line(row, sides))
    return "\n".join(
        [
            OPENING,
            HOW_TO_READ,
            DRAWN_HEADINGS,
            *lines[DRAWN],
            SHOP_HEADINGS,
            *lines[PHOTOGRAPHS],
            "",
        ]
    )


# -----------------------------------------------------------------------------
# The command


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="to run, such as batch8")
    text = "runs at a time (default: the cores)"
    parser.add_argument("--jobs", type=number(int, 1), default=cores(), help=text)
    args = parser.parse_args(argv)
    check(ROWS.keys() >= {*args.rows}, f"rows are {' '.join(ROWS)}")
    compare.open_out(OUT)
    study = compare.Study(OUT, args.jobs, RUNS)
    for name in args.rows:
        run_row(study, ROWS[name])
    found = {name: sides_of(study, row) for name, row in ROWS.items()}
    RESULTS.write_text(page({name: sides for name, sides in found.items() if sides}))


if __name__ == "__main__":
    run_command(main)
