"""The published rows: what is run for each, and its line on the pages.

    python -m study.plan                     write the lines of results.md and rates.md anew
    python -m study.plan batch8 batch32      run what is missing of these rows first

The pages are Markdown, for a person to edit. A line that begins as one of the rows does, with its
label, is replaced, and nothing else. A row that has no line on its page yet comes last.

A row is shown with the runs of the newest code that has all of them. So no row leaves the page when
the code changes, and a row that is run again replaces itself alone.

The learning rate of a command is the best one of those that seeds 0 to 4 tried, or some of them.
These runs are in runs.jsonl, or in searches.jsonl if they are of older commits. (There their "code"
is the commit.)
"""

import re
from collections import defaultdict
from contextlib import suppress
from itertools import chain, product
from pathlib import Path

import torch

from cli import check, make_parser, run_command
from study import compare

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.md"
RATES = FOLDER / "rates.md"
RUNS = FOLDER / "runs.jsonl"
SEARCHES = FOLDER / "searches.jsonl"

# Without other options these train at batch 32 on 48,000 samples, 2.4 epochs of 20,000 drawn pairs,
# as train.py does. "slow" is SuperCLIP at CLIP's rate.
COMMANDS = {
    "CLIP 8": "train.py --cls_weight 0 --batch_size 8 --epochs 2.4 --learning_rate 8.75e-5",
    "slow 8": "train.py --batch_size 8 --epochs 2.4 --learning_rate 8.75e-5",
    "SuperCLIP 8": "train.py --batch_size 8 --epochs 2.4 --learning_rate 1.75e-4",
    "CLIP 8 in 16": "train.py --cls_weight 0 --batch_size 8 --epochs 2.4 --learning_rate 1.75e-4",
    "CLIP": "train.py --cls_weight 0 --learning_rate 1.75e-4",
    "slow": "train.py --learning_rate 1.75e-4",
    "SuperCLIP": "train.py --learning_rate 3.5e-4",
    "lambda 0.3": "train.py --cls_weight 0.3 --learning_rate 3.5e-4",
    "lambda 3": "train.py --cls_weight 3 --learning_rate 3.5e-4",
    "lambda 3 slow": "train.py --cls_weight 3 --learning_rate 1.75e-4",
    "lambda 10": "train.py --cls_weight 10 --learning_rate 3.5e-4",
    "lambda 10 slow": "train.py --cls_weight 10 --learning_rate 1.75e-4",
    "no IDF": "-m study.no_idf --learning_rate 3.5e-4",
    "other words": "-m study.shuffled --learning_rate 3.5e-4",
    "other words slow": "-m study.shuffled --learning_rate 1.75e-4",
    "class token": "-m study.class_token --learning_rate 3.5e-4",
    "class token slow": "-m study.class_token --learning_rate 1.75e-4",
    "CLIP warm": "-m study.warmup --cls_weight 0 --learning_rate 3.5e-4",
    "SuperCLIP warm": "-m study.warmup --learning_rate 7e-4",
    "CLIP short warm": "-m study.warmup --cls_weight 0 --captions json.short "
    "--learning_rate 1.75e-4",
    "SuperCLIP short warm": "-m study.warmup --captions json.short --learning_rate 3.5e-4",
    "slow warm": "-m study.warmup --learning_rate 3.5e-4",
    "slow short warm": "-m study.warmup --captions json.short --learning_rate 1.75e-4",
    "CLIP 8 warm": "-m study.warmup --cls_weight 0 --batch_size 8 --epochs 2.4 "
    "--learning_rate 8.75e-5",
    "other words short": "-m study.shuffled --captions json.short --learning_rate 1.75e-4",
    "CLIP short": "train.py --cls_weight 0 --captions json.short --learning_rate 1.75e-4",
    "slow short": "train.py --captions json.short --learning_rate 1.75e-4",
    "SuperCLIP short": "train.py --captions json.short --learning_rate 3.5e-4",
    "dual": "train.py --captions json.short --label_captions json.long --learning_rate 3.5e-4",
    "CLIP long": "train.py --cls_weight 0 --epochs 7.2 --learning_rate 3.5e-4",
    "SuperCLIP long": "train.py --epochs 7.2 --learning_rate 3.5e-4",
    "CLIP short long": "train.py --cls_weight 0 --captions json.short --epochs 7.2 "
    "--learning_rate 1.75e-4",
    "SuperCLIP short long": "train.py --captions json.short --epochs 7.2 --learning_rate 3.5e-4",
    "CLIP of 4": "-m study.groups --group 4 --cls_weight 0 --batch_size 64 --epochs 2.4 "
    "--learning_rate 1.24e-4",
    "slow of 4": "-m study.groups --group 4 --batch_size 64 --epochs 2.4 --learning_rate 1.24e-4",
    "SuperCLIP of 4": "-m study.groups --group 4 --batch_size 64 --epochs 2.4 "
    "--learning_rate 4.95e-4",
    "CLIP of 64": "-m study.groups --group 64 --cls_weight 0 --batch_size 64 --epochs 2.4 "
    "--learning_rate 2.47e-4",
    "slow of 64": "-m study.groups --group 64 --batch_size 64 --epochs 2.4 --learning_rate 2.47e-4",
    "SuperCLIP of 64": "-m study.groups --group 64 --batch_size 64 --epochs 2.4 "
    "--learning_rate 4.95e-4",
}
# Photographs: each seed has a split of its own, made by study.shop.
SHOP = """--train_data 'out_study/shop/{seed}/train-*.tar' \
--val_data 'out_study/shop/{seed}/val-*.tar' --zeroshot_data out_study/shop/{seed}/type \
out_study/shop/{seed}/colour out_study/shop/{seed}/both --model tiny --batch_size 32 \
--epochs 12 --learning_rate 5e-4"""
COMMANDS["CLIP shop"] = f"train.py --cls_weight 0 {SHOP}"
COMMANDS["SuperCLIP shop"] = f"train.py {SHOP}"

# name: label, commands, and options of study.compare. First those whose sides have their own rate,
# the best one of a search.
ROWS = {
    "batch8": ("batch 8", "CLIP 8", "SuperCLIP 8"),
    "batch32": ("batch 32", "CLIP", "SuperCLIP"),
    "groups4": ("batch 64, groups of 4", "CLIP of 4", "SuperCLIP of 4"),
    "groups64": ("batch 64, groups of 64", "CLIP of 64", "SuperCLIP of 64"),
    "short": ("batch 32, short captions", "CLIP short", "SuperCLIP short"),
    "dual": ("SuperCLIP: short -> dual captions", "SuperCLIP short", "dual"),
    "no_idf": ("SuperCLIP: IDF -> none", "SuperCLIP", "no IDF"),
    "lambda0.3": ("SuperCLIP: lambda 1 -> 0.3", "SuperCLIP", "lambda 0.3"),
    "settings16": ("batch 8, 16 settings", "CLIP 8 in 16", "SuperCLIP 8", "--settings=16"),
    "long": ("batch 32, 144,000 samples", "CLIP long", "SuperCLIP long"),
    "short_long": ("short captions, 144,000 samples", "CLIP short long", "SuperCLIP short long"),
    "shop": ("24,000 pairs, CLIP -> SuperCLIP", "CLIP shop", "SuperCLIP shop"),
    # the same sides, compared with each other
    "clip_lambda0.3": ("CLIP -> SuperCLIP, lambda 0.3", "CLIP", "lambda 0.3"),
    "clip_no_idf": ("CLIP -> SuperCLIP without IDF", "CLIP", "no IDF"),
    "clip8": ("CLIP: batch 32 -> 8", "CLIP", "CLIP 8"),
    "superclip8": ("SuperCLIP: batch 32 -> 8", "SuperCLIP", "SuperCLIP 8"),
    "clip_groups": ("CLIP: groups of 64 -> 4", "CLIP of 64", "CLIP of 4"),
    "superclip_groups": ("SuperCLIP: groups of 64 -> 4", "SuperCLIP of 64", "SuperCLIP of 4"),
    "clip_short": ("CLIP: mixed -> short captions", "CLIP", "CLIP short"),
    "clip_short_warm": ("CLIP: the same, longer warm-up", "CLIP warm", "CLIP short warm"),
    "superclip_short": ("SuperCLIP: mixed -> short captions", "SuperCLIP", "SuperCLIP short"),
    "superclip_dual": ("SuperCLIP: mixed -> dual captions", "SuperCLIP", "dual"),
    # first the head, at CLIP's rate, and then the rate that is best with it
    "batch8_head": ("batch 8: the head, at CLIP's rate", "CLIP 8", "slow 8"),
    "batch8_rate": ("batch 8: then its own rate", "slow 8", "SuperCLIP 8"),
    "batch32_head": ("batch 32: the head, at CLIP's rate", "CLIP", "slow"),
    "batch32_rate": ("batch 32: then its own rate", "slow", "SuperCLIP"),
    "groups4_head": ("groups of 4: the head, at CLIP's rate", "CLIP of 4", "slow of 4"),
    "groups4_rate": ("groups of 4: then its own rate", "slow of 4", "SuperCLIP of 4"),
    "groups64_head": ("groups of 64: the head, at CLIP's rate", "CLIP of 64", "slow of 64"),
    "groups64_rate": ("groups of 64: then its own rate", "slow of 64", "SuperCLIP of 64"),
    "short_head": ("short captions: the head, at CLIP's rate", "CLIP short", "slow short"),
    "short_rate": ("short captions: then its own rate", "slow short", "SuperCLIP short"),
    # first a longer warm-up for CLIP, at batch 8 at the same rate, and then the head
    "batch8_warm": ("batch 8: a longer warm-up", "CLIP 8", "CLIP 8 warm"),
    "batch8_usual": ("batch 8: the head instead", "CLIP 8 warm", "SuperCLIP 8"),
    "batch32_warm": ("batch 32: a longer warm-up", "CLIP", "CLIP warm"),
    "batch32_usual": ("batch 32: the head instead", "CLIP warm", "SuperCLIP"),
    "batch32_both": ("batch 32: the head, too", "CLIP warm", "SuperCLIP warm"),
    "batch32_slow": ("batch 32: the head, too, at CLIP's rate", "CLIP warm", "slow warm"),
    "short_warm": ("short captions: a longer warm-up", "CLIP short", "CLIP short warm"),
    "short_usual": ("short captions: the head instead", "CLIP short warm", "SuperCLIP short"),
    "short_both": ("short captions: the head, too", "CLIP short warm", "SuperCLIP short warm"),
    "short_slow": (
        "short captions: the head, too, at CLIP's rate",
        "CLIP short warm",
        "slow short warm",
    ),
    # controls, at rates that no search has chosen
    "other_words_slow": ("another pair's words, at CLIP's rate", "CLIP", "other words slow"),
    "other_words": ("another pair's words, at SuperCLIP's rate", "CLIP", "other words"),
    "other_words_short": (
        "short captions: another pair's words, at CLIP's rate",
        "CLIP short",
        "other words short",
    ),
    "own_words_short": (
        "short captions: another pair's words -> its own, at CLIP's rate",
        "other words short",
        "slow short",
    ),
    "own_words_slow": (
        "another pair's words -> its own, at CLIP's rate",
        "other words slow",
        "slow",
    ),
    "own_words": (
        "another pair's words -> its own, at SuperCLIP's rate",
        "other words",
        "SuperCLIP",
    ),
    "class_token_slow": ("class token, at CLIP's rate", "CLIP", "class token slow"),
    "class_token": ("class token, at SuperCLIP's rate", "CLIP", "class token"),
    "lambda3_slow": ("lambda 1 -> 3, at half the rate", "SuperCLIP", "lambda 3 slow"),
    "lambda3": ("lambda 1 -> 3", "SuperCLIP", "lambda 3"),
    "lambda10_slow": ("lambda 1 -> 10, at half the rate", "SuperCLIP", "lambda 10 slow"),
    "lambda10": ("lambda 1 -> 10", "SuperCLIP", "lambda 10"),
}
SCORES = ("R@1", "colour_shape", "held_out")
SHOP_SCORES = ("R@1", "R@10", "type", "colour", "both", "loss")
# Rows whose gains are compared.
GAINS = (("batch32", "batch8"), ("batch32", "short"), ("batch32_both", "short_both"))


def options_of(name):
    """The options of a row for study.compare."""
    _, a, b, *more = ROWS[name]
    options = [f"--a={COMMANDS[a]}", f"--b={COMMANDS[b]}", "--seeds=10", *more]
    return compare.make_options().parse_args(options)


def core_of(code):
    """The first part of a run's code, the hash of train.py and of the files beside it."""
    return code.partition("-")[0]


def sides_of(study, name):
    """Both sides of a row, from the newest runs of one core that are all there, or None. A fork
    has a core of its own."""
    args = options_of(name)
    a, b = compare.pair_of(args)
    codes = dict.fromkeys(run["code"] for run in reversed(study.runs.values()))
    for code_a, code_b in product(codes, codes):
        if a.train != b.train or core_of(code_a) == core_of(code_b):
            with suppress(compare.Missing):
                side_a = study.side(a, args, code_a)
                side_b = study.side(b, args, code_b)
                return [side_a, side_b]
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
    label = ROWS[name][0]
    runs = sides[0].runs
    n = str(len(runs))
    rates = " / ".join(f"{side.command.rate():.2e}" for side in sides)
    seconds = " / ".join(side.seconds() for side in sides)
    scores = SCORES if sides[0].command.settings else SHOP_SCORES
    cells = [compare.cell(sides, score) for score in scores]
    return line_of(label, n, rates, seconds, commit_of(runs[0]), *cells)


def odds_gained(sides, name):
    """What the second side has more than the first in the log-odds of a score, for each seed. The
    best odds are those of half a mistake in a thousand."""
    a, b = [
        torch.tensor([compare.value_of(run, name) / 100 for run in side.runs]).logit(eps=0.0005)
        for side in sides
    ]
    return b - a


def gain_line(before, after, found):
    """How what the head adds changes from one row to another, in log-odds. (In points it cannot be
    more than what CLIP lacks.)"""
    changes = []
    for score in SCORES:
        change = odds_gained(found[after], score) - odds_gained(found[before], score)
        changes.append(compare.interval(change.tolist(), digits=2))
    step = f"{ROWS[before][0]} -> {ROWS[after][0]}"
    return f"- {step}: in log-odds the gains change by {', '.join(changes)}."


def rates_line(tried, world):
    """The line of a search in the table of rates.md."""
    runs = [*chain.from_iterable(tried.values())]
    commits = dict.fromkeys(commit_of(run) for run in runs)
    return line_of(f"`{runs[0]['text']}`", world, compare.rates_text(tried), ", ".join(commits))


# What tells a line from the others of its page: a command and its world, or the first cell of a
# table, or the text of a list before its colon.
START = re.compile(r"\| `.*?` \|.*?\||\|.*?\||- .*?: ")


def start_of(line):
    found = START.match(line)
    return found[0] if found else line


def replace(path, lines):
    """Put these lines in the places of those that begin alike on a page, or at its end."""
    new = {start_of(line): line for line in lines}
    page = []
    for line in path.read_text("utf-8").splitlines():
        page.append(new.pop(start_of(line), line))
    path.write_text("\n".join([*page, *new.values(), ""]), "utf-8")


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="to run, such as batch8")
    args = parser.parse_args(argv)
    check(ROWS.keys() >= {*args.rows}, f"rows are {' '.join(ROWS)}")
    study = compare.open_study(None, RUNS)
    for name in args.rows:
        study.experiment(options_of(name))
    found = {name: sides_of(study, name) for name in ROWS}
    lines = [row_line(name, sides) for name, sides in found.items() if sides is not None]
    for before, after in GAINS:
        if found[before] and found[after]:
            lines.append(gain_line(before, after, found))
    replace(RESULTS, lines)
    searches = read_searches(study)
    lines = [rates_line(tried, world) for (_, world), tried in searches.items()]
    replace(RATES, lines)


if __name__ == "__main__":
    run_command(main)
