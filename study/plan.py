"""The published rows: what is run for each, and its line on the pages.

    python -m study.plan                     write the lines of results.md and rates.md anew
    python -m study.plan batch8 batch32      run what is missing of these rows first

The pages are Markdown, for a person to edit. A line that begins as one of the rows does, with its
label, is replaced, and nothing else. For a new row add it here, and a line with its label there.

A row is shown with the runs of the newest code that has all of them. So no row leaves the page when
the code changes, and a row that is run again replaces itself alone.

The learning rate of a command is the best one of searches.jsonl, where seeds 0 to 4 tried several.
(Those are runs of older commits, and their "code" is the commit.)
"""

import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cli import check, make_parser, run_command
from study import compare

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.md"
RATES = FOLDER / "rates.md"
RUNS = FOLDER / "runs.jsonl"
SEARCHES = FOLDER / "searches.jsonl"

# 48,000 samples are 2.4 epochs of 20,000 drawn pairs.
COMMANDS = {
    "CLIP 8": "train.py --cls_weight 0 --batch_size 8 --epochs 2.4",
    "SuperCLIP 8": "train.py --batch_size 8 --epochs 2.4",
    "CLIP": "train.py --cls_weight 0 --batch_size 32 --epochs 2.4",
    "SuperCLIP": "train.py --batch_size 32 --epochs 2.4",
    "lambda 0.3": "train.py --cls_weight 0.3 --batch_size 32 --epochs 2.4",
    "no IDF": "-m study.no_idf --batch_size 32 --epochs 2.4",
    "CLIP short": "train.py --cls_weight 0 --captions json.short --batch_size 32 --epochs 2.4",
    "SuperCLIP short": "train.py --captions json.short --batch_size 32 --epochs 2.4",
    "dual": "train.py --captions json.short --label_captions json.long --batch_size 32 "
    "--epochs 2.4",
    "CLIP long": "train.py --cls_weight 0 --batch_size 32 --epochs 7.2",
    "SuperCLIP long": "train.py --batch_size 32 --epochs 7.2",
    "CLIP of 4": "-m study.groups --group 4 --cls_weight 0 --batch_size 64 --epochs 2.4",
    "SuperCLIP of 4": "-m study.groups --group 4 --batch_size 64 --epochs 2.4",
    "CLIP of 64": "-m study.groups --group 64 --cls_weight 0 --batch_size 64 --epochs 2.4",
    "SuperCLIP of 64": "-m study.groups --group 64 --batch_size 64 --epochs 2.4",
}
SHOP = """train.py --cls_weight {} --train_data 'out_study/shop/{}/train-*.tar' \
--val_data 'out_study/shop/val/train-*.tar' \
--zeroshot_data out_study/shop/type out_study/shop/colour out_study/shop/both \
--model tiny --batch_size 32 --epochs {}"""
for weight in (0, 1, 0.3):
    COMMANDS[f"shop 4, {weight}"] = SHOP.format(weight, 4000, 24)
    COMMANDS[f"shop 24, {weight}"] = SHOP.format(weight, 24000, 12)
SCORES = ("R@1", "colour_shape", "held_out")
SHOP_SCORES = ("R@1", "R@10", "type", "colour", "both", "loss")


class Row(NamedTuple):
    """A command at its rate, and another one at its own."""

    label: str
    a: str  # a name in COMMANDS
    rate_a: float
    b: str
    rate_b: float
    settings: int = 256
    seeds: int = 10
    scores: tuple = SCORES


ROWS = {
    "batch8": Row("batch 8", "CLIP 8", 8.75e-5, "SuperCLIP 8", 1.75e-4),
    "batch32": Row("batch 32", "CLIP", 1.75e-4, "SuperCLIP", 3.5e-4),
    "groups4": Row("batch 64, groups of 4", "CLIP of 4", 1.24e-4, "SuperCLIP of 4", 4.95e-4),
    "groups64": Row("batch 64, groups of 64", "CLIP of 64", 2.47e-4, "SuperCLIP of 64", 4.95e-4),
    "short": Row("batch 32, short captions", "CLIP short", 1.75e-4, "SuperCLIP short", 3.5e-4),
    "dual": Row("SuperCLIP: short -> dual captions", "SuperCLIP short", 3.5e-4, "dual", 3.5e-4),
    "no_idf": Row("SuperCLIP: IDF -> none", "SuperCLIP", 3.5e-4, "no IDF", 3.5e-4),
    "lambda0.3": Row("SuperCLIP: lambda 1 -> 0.3", "SuperCLIP", 3.5e-4, "lambda 0.3", 3.5e-4),
    "settings16": Row("batch 8, 16 settings", "CLIP 8", 1.75e-4, "SuperCLIP 8", 1.75e-4, 16),
    "batch32long": Row("batch 32, 144,000 samples", "CLIP long", 3.5e-4, "SuperCLIP long", 3.5e-4),
    # sides of these rows, compared with each other
    "clip_lambda0.3": Row("CLIP -> SuperCLIP, lambda 0.3", "CLIP", 1.75e-4, "lambda 0.3", 3.5e-4),
    "clip_no_idf": Row("CLIP -> SuperCLIP without IDF", "CLIP", 1.75e-4, "no IDF", 3.5e-4),
    "clip8": Row("CLIP: batch 32 -> 8", "CLIP", 1.75e-4, "CLIP 8", 8.75e-5),
    "superclip8": Row("SuperCLIP: batch 32 -> 8", "SuperCLIP", 3.5e-4, "SuperCLIP 8", 1.75e-4),
    "clip_groups": Row("CLIP: groups of 64 -> 4", "CLIP of 64", 2.47e-4, "CLIP of 4", 1.24e-4),
    "superclip_groups": Row(
        "SuperCLIP: groups of 64 -> 4", "SuperCLIP of 64", 4.95e-4, "SuperCLIP of 4", 4.95e-4
    ),
    "clip_short": Row("CLIP: mixed -> short captions", "CLIP", 1.75e-4, "CLIP short", 1.75e-4),
    "superclip_short": Row(
        "SuperCLIP: mixed -> short captions", "SuperCLIP", 3.5e-4, "SuperCLIP short", 3.5e-4
    ),
    "superclip_dual": Row("SuperCLIP: mixed -> dual captions", "SuperCLIP", 3.5e-4, "dual", 3.5e-4),
}
# Photographs: with 4,000 and 24,000 pairs, two of three weights of the head.
for pairs, rate, seeds in ((4, 1e-3, 10), (24, 5e-4, 5)):
    for suffix, step, a, b in (
        ("", "CLIP -> lambda 1", 0, 1),
        ("_0.3", "CLIP -> lambda 0.3", 0, 0.3),
        ("_weights", "lambda 1 -> 0.3", 1, 0.3),
    ):
        ROWS[f"shop{pairs}{suffix}"] = Row(
            f"{pairs},000 pairs, {step}",
            f"shop {pairs}, {a}",
            rate,
            f"shop {pairs}, {b}",
            rate,
            seeds=seeds,
            scores=SHOP_SCORES,
        )
# Rows whose gains are compared.
GAINS = (
    ("batch32", "batch8"),
    ("groups64", "groups4"),
    ("batch8", "settings16"),
    ("batch32", "short"),
    ("batch32", "batch32long"),
)


def options_of(name):
    """The options of a row for study.compare."""
    row = ROWS[name]
    a = f"{COMMANDS[row.a]} --learning_rate {row.rate_a:.3g}"
    b = f"{COMMANDS[row.b]} --learning_rate {row.rate_b:.3g}"
    options = ["--a", a, "--b", b, "--seeds", str(row.seeds), "--settings", str(row.settings)]
    return compare.make_options().parse_args(options)


def side_of(study, command, args, codes):
    """A side of a row, from the first of these codes that has all its runs, or None."""
    for code in codes:
        with suppress(compare.Missing):
            return study.side(command, args, code)
    return None


def sides_of(study, name):
    """Both sides of a row, from runs of one core (the first part of their code), the newest that
    has all of them. None if there is no such."""
    args = options_of(name)
    cores = defaultdict(dict)
    for run in reversed(study.runs.values()):
        core, _, _ = run["code"].partition("-")
        cores[core][run["code"]] = True
    for codes in cores.values():
        sides = [side_of(study, command, args, codes) for command in compare.pair_of(args)]
        if None not in sides:
            return sides
    return None


# -----------------------------------------------------------------------------
# Searches


def key_of(line, world):
    """What a search is known by: a command line at any rate, and its world."""
    return re.sub(r" --learning_rate \S+", "", line), world


def read_searches(study):
    """What seeds 0 to 4 have scored, in searches.jsonl and in the runs of a study: {key of a
    search: {rate: the run of each seed}}."""
    runs = [*compare.Study(1, SEARCHES).runs.values(), *study.runs.values()]
    # a run at newer code takes the place of an older one
    newest = {(run["command"], run["world"], run["seed"]): run for run in runs}
    found = defaultdict(lambda: defaultdict(list))
    for run in sorted(newest.values(), key=lambda run: run["seed"]):
        if run["seed"] < compare.FIRST_SCORED:
            found[key_of(run["command"], run["world"])][run["rate"]].append(run)
    return found


def gain(searches, line, world):
    """What the head adds in colour + shape, at the rate that is best for CLIP, whose line this is,
    and at its own. As a text, which is empty if there is no such."""
    clip = searches[line, world]
    superclip = searches.get((line.replace(" --cls_weight 0 ", " "), world), {})
    rate = compare.best_rate(compare.goals_of(clip))
    if " --cls_weight 0 " not in line or rate not in superclip:
        return ""
    texts = []
    for other in (rate, compare.best_rate(compare.goals_of(superclip))):
        sides = compare.Side(None, {}, clip[rate]), compare.Side(None, {}, superclip[other])
        texts.append(compare.interval(compare.gaps(sides, "colour_shape")).text())
    return "; ".join(texts)


# -----------------------------------------------------------------------------
# Lines of the pages


def commit_of(run):
    """The commit of a run, without "-dirty", which it is as soon as runs.jsonl has grown. What the
    code was, its hash tells."""
    return run["commit"].removesuffix("-dirty")


def line_of(*texts):
    """A line of a table."""
    return f"| {' | '.join(texts)} |"


def row_line(name, sides):
    """The line of a row in a table of results.md."""
    row = ROWS[name]
    runs = sides[0].runs
    n = str(len(runs))
    rates = " / ".join(f"{side.command.rate():.2e}" for side in sides)
    seconds = " / ".join(side.seconds() for side in sides)
    cells = [compare.cell(sides, score) for score in row.scores]
    return line_of(row.label, n, rates, seconds, commit_of(runs[0]), *cells)


def gain_line(rows, found):
    """How what the head adds changes from one row to another."""
    changes = []
    for score in SCORES:
        before, after = [compare.gaps(found[name], score) for name in rows]
        changes.append(compare.interval([b - a for a, b in zip(before, after)]).text())
    step = " -> ".join(ROWS[name].label for name in rows)
    return f"- {step}: the gains change by {', '.join(changes)}."


def rates_line(searches, line, world):
    """The line of a search in the table of rates.md."""
    tried = searches[line, world]
    run = next(iter(tried.values()))[0]
    rates = compare.rates_text(tried)
    gained = gain(searches, line, world)
    return line_of(f"`{run['text']}`", world, rates, gained, commit_of(run))


# What tells a line from the others of its page: a command and its world, or the first cell of a
# table, or the text of a list before its colon.
START = re.compile(r"\| `.*?` \|.*?\||\|.*?\||- .*?: ")


def start_of(line):
    found = START.match(line)
    return found[0] if found else line


def replace(path, lines):
    """Put these lines in the places of those that begin alike on a page. Says which have none."""
    new = {start_of(line): line for line in lines}
    page = []
    for line in path.read_text("utf-8").splitlines():
        page.append(new.pop(start_of(line), line))
    for start in new:
        print(f"{path.name} has no line that begins with {start}")
    text = "\n".join(page) + "\n"
    intervals = text.count("±")
    bold = text.count("**") // 2  # nothing else is bold
    count = f"Of the {intervals} intervals on this page {bold} exclude"
    text = re.sub(r"Of the \d+ intervals on this page \d+ exclude", count, text)
    path.write_text(text, "utf-8")


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="to run, such as batch8")
    args = parser.parse_args(argv)
    check(ROWS.keys() >= {*args.rows}, f"rows are {' '.join(ROWS)}")
    study = compare.open_study(None, RUNS)
    for name in args.rows:
        study.experiment(options_of(name))
    found = {}
    for name in ROWS:
        sides = sides_of(study, name)
        if sides is not None:
            found[name] = sides
    lines = [row_line(name, sides) for name, sides in found.items()]
    for rows in GAINS:
        if found.keys() >= {*rows}:
            lines.append(gain_line(rows, found))
    replace(RESULTS, lines)
    searches = read_searches(study)
    replace(RATES, [rates_line(searches, *key) for key in searches])


if __name__ == "__main__":
    run_command(main)
