"""The published pages: a list of experiments, each of which is a command line of study.compare.

    python -m study.plan                     write results.md and rates.md
    python -m study.plan batch8 batch32      run what is missing of these rows first

Runs are added to study/runs.jsonl. A row is shown with the runs of the newest code that has all of
them, so no row leaves the page when the code changes, and a row that is run again replaces itself
alone.

Most rows name the learning rate of each side. It is the best one of searches.jsonl, where seeds 0
to 4 tried several. (Those are runs of older commits, and their "code" is the commit.) The rows of a
shop's photographs need what `python -m study.shop` makes.
"""

import itertools
import re
import shlex
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from cli import check, make_parser, run_command
from study import compare

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.md"
RATES = FOLDER / "rates.md"
RUNS = FOLDER / "runs.jsonl"
SEARCHES = FOLDER / "searches.jsonl"

# name: label, options of study.compare. 48,000 samples are 2.4 epochs of 20,000 drawn pairs.
ROWS = {
    "batch8": (
        "batch 8",
        '--a "train.py --cls_weight 0 --learning_rate 8.75e-5" '
        '--b "train.py --learning_rate 1.75e-4" --common "--batch_size 8 --epochs 2.4" --seeds 10',
    ),
    "batch32": (
        "batch 32",
        '--a "train.py --cls_weight 0 --learning_rate 1.75e-4" '
        '--b "train.py --learning_rate 3.5e-4" --common "--batch_size 32 --epochs 2.4" --seeds 10',
    ),
    "groups4": (
        "batch 64, groups of 4",
        '--a "-m study.groups --group 4 --cls_weight 0 --learning_rate 1.24e-4" '
        '--b "-m study.groups --group 4 --learning_rate 4.95e-4" '
        '--common "--batch_size 64 --epochs 2.4" --seeds 10',
    ),
    "groups64": (
        "batch 64, groups of 64",
        '--a "-m study.groups --group 64 --cls_weight 0 --learning_rate 2.47e-4" '
        '--b "-m study.groups --group 64 --learning_rate 4.95e-4" '
        '--common "--batch_size 64 --epochs 2.4" --seeds 10',
    ),
    "short": (
        "batch 32, short captions",
        '--a "train.py --cls_weight 0 --learning_rate 1.75e-4" '
        '--b "train.py --learning_rate 3.5e-4" '
        '--common "--batch_size 32 --epochs 2.4 --captions json.short" --seeds 10',
    ),
    "dual": (
        "SuperCLIP: short -> dual captions",
        '--a "train.py --learning_rate 3.5e-4" '
        '--b "train.py --label_captions json.long --learning_rate 3.5e-4" '
        '--common "--batch_size 32 --epochs 2.4 --captions json.short" --seeds 10',
    ),
    "no_idf": (
        "SuperCLIP: IDF -> none",
        '--a "train.py --learning_rate 3.5e-4" --b "-m study.no_idf --learning_rate 3.5e-4" '
        '--common "--batch_size 32 --epochs 2.4" --seeds 10',
    ),
    "lambda0.3": (
        "SuperCLIP: lambda 1 -> 0.3",
        '--a "train.py --learning_rate 3.5e-4" '
        '--b "train.py --cls_weight 0.3 --learning_rate 3.5e-4" '
        '--common "--batch_size 32 --epochs 2.4" --seeds 10',
    ),
    "settings16": (
        "batch 8, 16 settings",
        '--a "train.py --cls_weight 0" --b "train.py" --common "--batch_size 8 --epochs 2.4" '
        "--settings 16 --rates 0.5 1 --search_seeds 3 --seeds 10",
    ),
    "batch32long": (
        "batch 32, 144,000 samples",
        '--a "train.py --cls_weight 0 --learning_rate 3.5e-4" '
        '--b "train.py --learning_rate 3.5e-4" --common "--batch_size 32 --epochs 7.2" --seeds 10',
    ),
}
# Sides of these rows, compared with each other.
BETWEEN = {
    "clip_lambda0.3": (
        "CLIP -> SuperCLIP, lambda 0.3",
        '--a "train.py --cls_weight 0 --learning_rate 1.75e-4" '
        '--b "train.py --cls_weight 0.3 --learning_rate 3.5e-4" '
        '--common "--batch_size 32 --epochs 2.4" --seeds 10',
    ),
    "clip_no_idf": (
        "CLIP -> SuperCLIP without IDF",
        '--a "train.py --cls_weight 0 --learning_rate 1.75e-4" '
        '--b "-m study.no_idf --learning_rate 3.5e-4" '
        '--common "--batch_size 32 --epochs 2.4" --seeds 10',
    ),
    "clip8": (
        "CLIP: batch 32 -> 8",
        '--a "train.py --batch_size 32 --learning_rate 1.75e-4" '
        '--b "train.py --batch_size 8 --learning_rate 8.75e-5" '
        '--common "--cls_weight 0 --epochs 2.4" --seeds 10',
    ),
    "superclip8": (
        "SuperCLIP: batch 32 -> 8",
        '--a "train.py --batch_size 32 --learning_rate 3.5e-4" '
        '--b "train.py --batch_size 8 --learning_rate 1.75e-4" --common "--epochs 2.4" --seeds 10',
    ),
    "clip_groups": (
        "CLIP: groups of 64 -> 4",
        '--a "-m study.groups --group 64 --learning_rate 2.47e-4" '
        '--b "-m study.groups --group 4 --learning_rate 1.24e-4" '
        '--common "--cls_weight 0 --batch_size 64 --epochs 2.4" --seeds 10',
    ),
    "superclip_groups": (
        "SuperCLIP: groups of 64 -> 4",
        '--a "-m study.groups --group 64" --b "-m study.groups --group 4" '
        '--common "--learning_rate 4.95e-4 --batch_size 64 --epochs 2.4" --seeds 10',
    ),
    "clip_short": (
        "CLIP: mixed -> short captions",
        '--a "train.py" --b "train.py --captions json.short" '
        '--common "--cls_weight 0 --learning_rate 1.75e-4 --batch_size 32 --epochs 2.4" --seeds 10',
    ),
    "superclip_short": (
        "SuperCLIP: mixed -> short captions",
        '--a "train.py" --b "train.py --captions json.short" '
        '--common "--learning_rate 3.5e-4 --batch_size 32 --epochs 2.4" --seeds 10',
    ),
    "superclip_dual": (
        "SuperCLIP: mixed -> dual captions",
        '--a "train.py" --b "train.py --captions json.short --label_captions json.long" '
        '--common "--learning_rate 3.5e-4 --batch_size 32 --epochs 2.4" --seeds 10',
    ),
}
# Three weights of the head (0 is CLIP), each compared with the others. Rows of one size share runs.
SHOP = """--a "train.py --cls_weight {a}" --b "train.py --cls_weight {b}" \
--common "--train_data 'out_study/shop/{pairs}/train-*.tar' \
--val_data 'out_study/shop/val/train-*.tar' \
--zeroshot_data out_study/shop/type out_study/shop/colour out_study/shop/both \
--model tiny --batch_size 32 --epochs {epochs}" {search}"""
SOME = {"pairs": 4000, "epochs": 24, "search": "--rates 0.5 1 2 --search_seeds 3 --seeds 10"}
MANY = {"pairs": 24000, "epochs": 12, "search": "--rates 0.5 1 --search_seeds 2"}
PHOTOGRAPHS = {
    "shop4": ("4,000 pairs, CLIP -> lambda 1", SHOP.format(a=0, b=1, **SOME)),
    "shop4_0.3": ("4,000 pairs, CLIP -> lambda 0.3", SHOP.format(a=0, b=0.3, **SOME)),
    "shop4_weights": ("4,000 pairs, lambda 1 -> 0.3", SHOP.format(a=1, b=0.3, **SOME)),
    "shop24": ("24,000 pairs, CLIP -> lambda 1", SHOP.format(a=0, b=1, **MANY)),
    "shop24_0.3": ("24,000 pairs, CLIP -> lambda 0.3", SHOP.format(a=0, b=0.3, **MANY)),
    "shop24_weights": ("24,000 pairs, lambda 1 -> 0.3", SHOP.format(a=1, b=0.3, **MANY)),
}
ALL_ROWS = ROWS | BETWEEN | PHOTOGRAPHS


def options_of(name):
    """The options of a row for study.compare."""
    return compare.make_options().parse_args(shlex.split(ALL_ROWS[name][1]))


def sides_of(study, name):
    """Both sides of a row, from runs of one train.py, the newest that has all of them. None if
    there is no such."""
    args = options_of(name)
    a, b = compare.pair_of(args)
    codes = dict.fromkeys(run["code"] for run in reversed(study.runs.values()))
    for code, other in itertools.product(codes, repeat=2):
        if code[:8] == other[:8]:  # the hash of train.py
            with suppress(compare.Missing):
                return study.side(a, args, code), study.side(b, args, other)
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
# results.md

OPENING = """# Does the word head help?

- *When?* Where captions leave much unsaid: in drawn scenes, made to show what the head is for, it
  adds most with short captions. And perhaps where pairs are many: with 24,000 photographs of a shop
  and their titles it names types better by three points (five seeds), and with 4,000 we see no gain
  but in the validation loss (ten seeds).
- *At which weight?* Leave it (lambda, `--cls_weight`) at 1: 0.3 names six points less in drawn
  scenes at batch 32, photographs cannot tell the two apart, and no larger one was tried.
- *At which learning rate?* Search it again with the head, and upwards: in six of the eleven
  searches at lambda 1 its best rate is two to four times CLIP's, and in the others the same, as far
  as they went ([all rates](rates.md)).

In drawn scenes a model with the head learns sooner what an object is called: at batch 32 it names
9 points more than CLIP after 48,000 samples, and after 144,000 both name more than 99 %. And it
tolerates a higher learning rate: at CLIP's best rate the head adds 33 points at batch 8 (43 at its
own best rate), 29 with short captions (43), and 3 at batch 32 (13), which cannot be told from 0.
(These last numbers are of the five seeds that chose the rates.)"""
HEADINGS = """
| | seeds | rates | seconds | commit | R@1 | colour + shape | held out |
| --- | --- | --- | --- | --- | --- | --- | --- |"""
DRAWN = f"""
## Drawn scenes

A cell reads: mean of the first command -> mean of the second in percent, and their difference in
points with its 95 % interval (Student's t), rounded last. Bold: the interval excludes 0. Seeds 0 to
4 have chosen one learning rate for each command ([all rates](rates.md)), and other seeds, which had
no say, are scored. They are paired, and each has a world of its own, a data set drawn for it. All
are drawn alike, and hold out the same eight combinations. A row is CLIP -> SuperCLIP and sees
48,000 samples if nothing else is said: 6,000 steps at batch 8, 1,500 at 32, 750 at 64. In *groups
of 4* an image is compared with the captions of its own four alone ([groups.py](groups.py)). Half of
the captions are short ones, which say a thing or two. In *short captions* all of them are. Scenes
have one of 256 settings (backgrounds). In *16 settings* they have one of 16, so in a batch of 8 a
scene meets others with its own more often, and the contrastive loss asks for objects. (There three
seeds chose between two rates, too few to know the best.)

R@1 is the mean of both ways among 1,000 pairs that training has not seen (chance 0.1). Their
captions are long ones, which a model of short or dual captions has never read. Colour + shape names
one of 64 combinations (chance 1.6). Held out does so for the eight that training never shows (1.6),
which are also an eighth of colour + shape. Seconds are those of the fastest run of each, on one
core of a shared machine.
{HEADINGS}"""
TO_ADD = f"""
This is a table to add a row to. Compare with one that is there: give that side its rate, let the
rate of yours be searched, and take the same ten seeds:

    python -m study.compare --a "train.py --learning_rate 3.5e-4" --b "../fork/train.py" \\
        --common "--batch_size 32 --epochs 2.4" --rates --seeds 10

The commands of all rows stand in [plan.py](plan.py). Add yours there, and `python -m study.plan
NAME` runs what is missing and writes the line.

![Colour + shape of the five seeds that chose, at each rate; rings: chosen](../assets/study.png)

## From one row to another

The same seeds again: what a change of the data or of the batch does to each method, and what the
head adds to CLIP with a smaller weight or without IDF. *Gains* are what it adds in the three
scores, in the order of the columns. At batch 8 it adds more to all three than at 32, but that takes
four times the steps. At equal steps, where a batch asks for objects more often (*16 settings*), it
adds less to naming and more to R@1. With fewer pairs to compare (*groups of 4*) it adds more to
R@1, but we cannot say that of naming.
{HEADINGS}"""
SHOP_TEXT = """
## Photographs

With 24,000 pairs five seeds see the head help: at lambda 1 types by name gain three points, and
R@10 two. At 0.3 only R@10 gains, by one. With 4,000 pairs ten seeds see a gain in the validation
loss alone, at both weights, and types may still gain up to four points. (There, at lambda 1, the
first five seeds gained 4.3 in types, and the other five lost 1.0. So five seeds may mislead, those
of 24,000 pairs, too.) At neither size can we tell the two weights apart, so nothing here speaks
for a smaller one.

Products of a shop with their titles ([how they are made](shop.py)), tiny model, batch 32. 4,000
pairs are shown 24 times, at the best of three rates, chosen by three seeds. 24,000 pairs, with them
the 4,000, are shown 12 times, which is three times the steps, at the better of two rates, chosen by
two seeds. For all sides it is the highest rate, so a better one may lie above. With 4,000 pairs
only types favour it: R@1 hardly changes with the rate, and the validation loss is lower at 2.5e-4
(3.03 -> 2.93 for the three seeds, at lambda 1). These models make no good search: with so few pairs
start from [published weights](../docs/data.md#weights-in-and-out).

The pairs are the same for all seeds, so the intervals leave out the draw of the data: they say what
another random start would change, and not what another shop would.

R@k is the mean of both ways among 2,000 titles that are unique and unseen (chance 0.05 and 0.5).
Types and colours are named from their words (ten each, chance 10), and both at once (43, chance
2.3). The validation loss compares 32 pairs (a guess: 3.466), and less is better. Lambda 0.3 with
24,000 pairs ran hours after the others, so do not compare its seconds with theirs.

| | seeds | rates | seconds | commit | R@1 | R@10 | type | colour | both | validation loss |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
END = """

## What this page leaves out

Of batch 256 there are only searches: with 48,000 samples CLIP names 8 % and SuperCLIP 9, which is
too few to compare, and with 144,000 they name 98 and 99. No length between the two was tried.

Of the {intervals} intervals on this page {bold} exclude 0, and one in twenty would if nothing made
a difference. They share runs, are not corrected for their number, and take the chosen rates as
given. Commit 6999723 has the rows of an older rule, by which a seed took the rate that was best for
the others, and two that are not repeated: Flickr8k and SigLIP. `python -m study.plan` makes
this page of [runs.jsonl](runs.jsonl).
"""
SCORES = ("R@1", "colour_shape", "held_out")
SHOP_SCORES = ("R@1", "R@10", "type", "colour", "both", "loss")
# Rows whose gains are compared.
GAINS = (
    ("batch32", "batch8"),
    ("groups64", "groups4"),
    ("batch8", "settings16"),
    ("batch32", "short"),
    ("batch32", "batch32long"),
)


def commit_of(run):
    """The commit of a run, without "-dirty", which it is as soon as runs.jsonl has grown. What the
    code was, its hash tells."""
    return run["commit"].removesuffix("-dirty")


def line_of(*texts):
    """A line of a table."""
    return f"| {' | '.join(texts)} |"


def table(found, rows, scores):
    """The lines of some rows, as far as they are found."""
    lines = []
    for name, (label, _) in rows.items():
        if name in found:
            sides = found[name]
            runs = sides[0].runs
            rates = " / ".join(f"{side.command.rate():.2e}" for side in sides)
            seconds = " / ".join(map(compare.Side.seconds, sides))
            cells = [compare.cell(sides, score) for score in scores]
            n = str(len(runs))
            lines.append(line_of(label, n, rates, seconds, commit_of(runs[0]), *cells))
    return lines


def gains(found):
    """Yield how what the head adds changes from one row to another, as lines."""
    for rows in GAINS:
        if found.keys() >= {*rows}:
            changes = []
            for score in SCORES:
                before, after = [compare.gaps(found[name], score) for name in rows]
                changes.append(compare.interval([b - a for a, b in zip(before, after)]).text())
            step = " -> ".join(ROWS[name][0] for name in rows)
            yield f"- {step}: the gains change by {', '.join(changes)}."


def page(found):
    """results.md as a text. found: {name of a row: its sides}."""
    parts = [
        OPENING,
        DRAWN,
        *table(found, ROWS, SCORES),
        TO_ADD,
        *table(found, BETWEEN, SCORES),
        "",
        *gains(found),
        SHOP_TEXT,
        *table(found, PHOTOGRAPHS, SHOP_SCORES),
    ]
    text = "\n".join(parts)
    # bold is for intervals alone
    return text + END.format(intervals=text.count("±"), bold=text.count("**") // 2)


# -----------------------------------------------------------------------------
# rates.md

RATES_TEXT = """# All learning rates that were tried

After each rate stands its score in percent, a mean over the seeds that chose: of R@1 and colour +
shape for drawn scenes, and of R@1 and type for photographs. The gain is what the head adds in
colour + shape with the same seeds: first at the rate that is best for CLIP, then at its own.

The searches ran at several commits, most of them before the rows of [results.md](results.md). A
line names that of its first runs: CLIP at batch 8 was run at 2.19e-5 later. Since then a search
also goes on beyond an end that two seeds like best. SuperCLIP's with 144,000 samples would have
tried 1.40e-3 at batch 32 and 3.96e-3 at batch 256.

| command | world | rates | gain at CLIP's rate; at its own | commit |
| --- | --- | --- | --- | --- |"""


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


def rates_page(searches):
    """rates.md as a text."""
    lines = [RATES_TEXT]
    for (line, world), tried in searches.items():
        run = next(iter(tried.values()))[0]
        rates = compare.rates_text(tried)
        gained = gain(searches, line, world)
        lines.append(line_of(f"`{run['text']}`", world, rates, gained, commit_of(run)))
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# The command


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="to run, such as batch8")
    args = parser.parse_args(argv)
    check(ALL_ROWS.keys() >= {*args.rows}, f"rows are {' '.join(ALL_ROWS)}")
    study = compare.open_study(None, RUNS)
    for name in args.rows:
        study.experiment(options_of(name))
    found = {name: sides for name in ALL_ROWS if (sides := sides_of(study, name))}
    RESULTS.write_text(page(found), "utf-8")
    RATES.write_text(rates_page(read_searches(study)) + "\n", "utf-8")


if __name__ == "__main__":
    run_command(main)
