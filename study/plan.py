"""The published rows: what is run for each, and its line in results.md.

    python -m study.plan                     write the lines of results.md anew
    python -m study.plan batch8 batch32      run what is missing of these rows first

results.md is Markdown, for a person to edit. A line that begins as one of the rows does, with its
label, is replaced, and nothing else. A row that has no line there yet comes last. Of runs of the
same command, rate and seed the newest counts, and the line says of which commits they are.

Each rate is the best one of a search. Such runs, of seeds 0 to 4, are in runs.jsonl, too:

    python -m study.compare --rates --a "train.py" --b "train.py --cls_weight 0"
"""

from pathlib import Path

from cli import check, make_parser, run_command
from study import compare

RESULTS = Path(__file__).with_name("results.md")
RUNS = Path(__file__).with_name("runs.jsonl")

# Without other options both sides train at batch 32 on 48,000 samples, 2.4 epochs of 20,000 drawn
# pairs, as train.py does.
BATCH_8 = "--batch_size 8 --epochs 2.4"
SHORT = "--captions json.short"
LONG = "--epochs 7.2"
# Photographs: each seed has a split of its own, made by study.shop.
SHOP = """--train_data 'out_study/shop/{seed}/train-*.tar' \
--val_data 'out_study/shop/{seed}/val-*.tar' --zeroshot_data out_study/shop/{seed}/type \
--model tiny --batch_size 32 --epochs 12"""
CLIP = "--cls_weight 0"

# name: label, and both sides as a command and its learning rate. The sides of a row that ends in
# _head have the same rate, the best one of CLIP: so it shows what the head adds by itself.
ROWS = {
    "batch8": ("batch 8", f"train.py {CLIP} {BATCH_8}", 8.75e-5, f"train.py {BATCH_8}", 1.75e-4),
    "batch32": ("batch 32", f"train.py {CLIP}", 1.75e-4, "train.py", 3.5e-4),
    "short": ("short captions", f"train.py {CLIP} {SHORT}", 1.75e-4, f"train.py {SHORT}", 3.5e-4),
    "long": ("144,000 samples", f"train.py {CLIP} {LONG}", 3.5e-4, f"train.py {LONG}", 3.5e-4),
    "shop": ("24,000 photographs", f"train.py {CLIP} {SHOP}", 5e-4, f"train.py {SHOP}", 5e-4),
    "batch8_head": ("batch 8: the head", f"train.py {CLIP} {BATCH_8}", 8.75e-5,
                    f"train.py {BATCH_8}", 8.75e-5),
    "batch32_head": ("batch 32: the head", f"train.py {CLIP}", 1.75e-4, "train.py", 1.75e-4),
    "short_head": ("short captions: the head", f"train.py {CLIP} {SHORT}", 1.75e-4,
                   f"train.py {SHORT}", 1.75e-4),
    "dual": ("short -> dual captions", f"train.py {SHORT}", 3.5e-4,
             f"train.py {SHORT} --label_captions json.long", 3.5e-4),
    "no_idf": ("IDF -> none", "train.py", 3.5e-4, "-m study.no_idf", 3.5e-4),
    "lambda": ("lambda 1 -> 0.3", "train.py", 3.5e-4, "train.py --cls_weight 0.3", 3.5e-4),
    "shuffled": ("another pair's words -> its own", "-m study.shuffled", 3.5e-4,
                 "train.py", 3.5e-4),
}  # fmt: skip
SEEDS = range(compare.FIRST_SCORED, compare.FIRST_SCORED + 10)
SCORES = ("R@1", "colour_shape", "held_out")
SHOP_SCORES = ("R@1", "R@10", "type", "loss")


def commands_of(name):
    """For both sides of a row, a command for each seed."""
    _, a, rate_a, b, rate_b = ROWS[name]
    sides = (compare.read_command(a), rate_a), (compare.read_command(b), rate_b)
    return [[command.at(rate, seed) for seed in SEEDS] for command, rate in sides]


def sides_of(study, name):
    """Both sides of a row, or None if not all of it has run."""
    # the newest come last
    newest = {(run["command"], run["rate"], run["seed"]): run for run in study.runs.values()}
    sides = []
    for commands in commands_of(name):
        keys = [(command.text(), command.rate, command.seed) for command in commands]
        if not newest.keys() >= {*keys}:
            return None
        sides.append(compare.Side(commands[0], {}, [newest[key] for key in keys]))
    return sides


def searches_of(study, name):
    """For both sides of a row, {rate: runs of the seeds that chose}."""
    searches = []
    for command, *_ in commands_of(name):
        tried = {}
        for run in study.runs.values():
            if run["command"] == command.text() and run["seed"] < compare.FIRST_SCORED:
                tried.setdefault(run["rate"], []).append(run)
        searches.append(tried)
    return searches


def line_of(name, sides):
    """The line of a row in a table of results.md."""
    rates = " / ".join(f"{side.command.rate:.2e}" for side in sides)
    seconds = " / ".join(side.seconds() for side in sides)
    # without "-dirty", which a commit is as soon as runs.jsonl has grown
    commits = {run["commit"].removesuffix("-dirty") for side in sides for run in side.runs}
    scores = SHOP_SCORES if name == "shop" else SCORES
    cells = [compare.cell(sides, score) for score in scores]
    texts = [ROWS[name][0], rates, seconds, ", ".join(sorted(commits)), *cells]
    return f"| {' | '.join(texts)} |"


def replace(path, lines):
    """Put these lines of tables in the places of those that have the same first cell, or at the end
    of the page."""
    new = {line.split("|")[1]: line for line in lines}
    page = []
    for line in path.read_text("utf-8").splitlines():
        label = line.split("|")[1] if line.startswith("|") else None
        page.append(new.pop(label, line))
    path.write_text("\n".join([*page, *new.values(), ""]), "utf-8")


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="to run, such as batch8")
    args = parser.parse_args(argv)
    check(ROWS.keys() >= {*args.rows}, f"rows are {' '.join(ROWS)}")
    study = compare.open_study(None, RUNS)
    for name in args.rows:
        a, b = commands_of(name)
        study.work([*a, *b])
    found = {name: sides_of(study, name) for name in ROWS}
    replace(RESULTS, [line_of(name, sides) for name, sides in found.items() if sides])


if __name__ == "__main__":
    run_command(main)
