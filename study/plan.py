"""The published study: what was run, and every number in the tables of results.md.

    python -m study.plan

An arm is a command at a learning rate that was chosen for it. Seeds 0 to 4 (or 0 to 2) choose the
rate. They try half, once and twice the default rate (at batch 8 a quarter of each). While the best
rate is the lowest or the highest one, they try one rate beyond it. The default rate is taken if its
score is within a point of the best one, else the lowest rate that is. Colour + shape is the score
that chooses, or with photographs the type. Seeds 15 and up are scored. No seed is left out, and
none is added.

There are two rounds of runs. The first round has commit a9a4f28, and answers questions 1 to 6. The
second round has one later commit, and answers questions 7 to 10. Numbers of two rounds differ
although the commands are equal, because rounding differs. So no row has runs of both. What follows
was written down before the first run of the second round:

- Questions 7 to 10 are corrected for four questions. Each holds if its 98.75 % interval excludes 0.
- The arms with long captions choose their rates by seeds 0 to 4, and seeds 15 to 29 are scored.
- The arms with mixed captions and with photographs are trained again at the rates of the first
  round, because a linear probe needs their weights. Their scored seeds are those of the first
  round. These runs answer no question of the first round. If an answer differs between the two
  rounds, the first round counts, and the other answer is shown beside it.
- The control with photographs is new. Seeds 0 to 2 choose its rate.
- A linear probe is fitted on drawn pictures of single objects (zeroshot/colour_shape) and tested on
  the eight combinations that training never shows (zeroshot/held_out). With photographs it is
  fitted on `fit` and tested on `type`, as study/shop.py makes them. The class token counts. The
  patch mean is exploratory, because the word head is trained on it.
- The head that says yes or no is exploratory. Seeds 0 to 2 choose its --cls_weight from 0.01, 0.1
  and 1 at the default rate, and one beyond while the best is at an edge. Then they choose its rate.
  Seeds 15 to 24 are scored.

The table of claims gives one answer for each claim of the paper. A claim that a planned question
asks has the answer *yes* if SuperCLIP is better and the difference holds after the correction. It
has the answer *no* if the 95 % interval lies below 0, and else *not clear*. A claim that no planned
question asks is exploratory. It has the answer *seen*, and never *yes*, if the 95 % interval lies
above 0, *no* if it lies below 0, and else *not clear*.
"""

import json
from pathlib import Path
from statistics import mean

from cli import make_parser, run_command
from study import compare

RUNS = [json.loads(line) for line in open(Path(__file__).with_name("runs.jsonl"))]
FIRST_SCORED = 15  # the seeds before it have chosen rates
# Splits of the photographs share pairs, so their variance is larger (Nadeau and Bengio), by the
# pairs validated on over those trained on.
SHOP_OVERLAP = 2_000 / 24_000

CLIP, CONTROL, SUPERCLIP = "train.py --cls_weight 0", "-m study.shuffled", "train.py"
SHORT = "--captions json.short"
SHOP = """--train_data 'out_study/shop/{seed}/train-*.tar' \
--val_data 'out_study/shop/{seed}/val-*.tar' --zeroshot_data out_study/shop/{seed}/type \
--model tiny --batch_size 32 --epochs"""


def three_arms(name, options):
    programs = {"CLIP": CLIP, "control": CONTROL, "SuperCLIP": SUPERCLIP}
    return {f"{x}, {name}": f"{text} {options}" for x, text in programs.items()}


# A bare run trains on 32,000 samples, 1.6 epochs.
ARMS = {
    **three_arms("mixed, 24,000", "--epochs 1.2"),
    **three_arms("mixed, 32,000", ""),
    **three_arms("mixed, 48,000", "--epochs 2.4"),
    **three_arms("short, 24,000", f"{SHORT} --epochs 1.2"),
    **three_arms("short, 32,000", SHORT),
    **three_arms("short, 48,000", f"{SHORT} --epochs 2.4"),
    **three_arms("batch 8", "--batch_size 8 --epochs 1.6"),
    "CLIP, photographs, 6 epochs": f"{CLIP} {SHOP} 6",
    "SuperCLIP, photographs, 6 epochs": f"{SUPERCLIP} {SHOP} 6",
    "CLIP, photographs, 3 epochs": f"{CLIP} {SHOP} 3",  # at the rates of 6 epochs
    "SuperCLIP, photographs, 3 epochs": f"{SUPERCLIP} {SHOP} 3",
    # at the rate of SuperCLIP, mixed, 32,000
    "a head for colours": "-m study.some_words --hears colours --epochs 1.2",
    "a head for shapes": "-m study.some_words --hears shapes --epochs 1.2",
    "no IDF": "-m study.no_idf",
    "lambda 0.3": "train.py --cls_weight 0.3",
    "lambda 3": "train.py --cls_weight 3",
    "dual captions": "train.py --captions json.short --label_captions json.long",
    "CLIP, mean of patches": "-m study.mean_patches --cls_weight 0",
    "CLIP, faster image tower": "-m study.fast_tower --cls_weight 0",
}

# The second round. Its runs have another commit than those of the first round.
SECOND_ARMS = {
    **three_arms("long, 32,000", "--captions json.long"),
    **three_arms("mixed, 32,000, again", ""),
    **three_arms("photographs, 6 epochs, again", f"{SHOP} 6"),
    "yes or no, lambda 0.01": "-m study.yes_no --cls_weight 0.01",
    "yes or no, lambda 0.1": "-m study.yes_no --cls_weight 0.1",
    "yes or no, lambda 1": "-m study.yes_no --cls_weight 1",
}
# Questions 7 to 10: a baseline, a model, and a score of the model minus that of the baseline
SECOND_QUESTIONS = (
    ("CLIP, long, 32,000", "SuperCLIP, long, 32,000", "colour_shape"),
    ("control, long, 32,000", "SuperCLIP, long, 32,000", "colour_shape"),
    ("CLIP, mixed, 32,000, again", "SuperCLIP, mixed, 32,000, again", "probe, class token"),
    (
        "CLIP, photographs, 6 epochs, again",
        "SuperCLIP, photographs, 6 epochs, again",
        "probe, class token",
    ),
)
SECOND_QUANTILES = {10: 3.111, 15: 2.864}  # Student's t of so many differences, at 98.75 %

# The six questions that were written down before the runs: two arms, and a score of the second
# minus that of the first. Do they hold after Bonferroni's correction for six, too, at 99.17 %?
PRIMARY = (
    ("CLIP, mixed, 32,000", "SuperCLIP, mixed, 32,000", "colour_shape"),
    ("control, mixed, 32,000", "SuperCLIP, mixed, 32,000", "colour_shape"),
    ("CLIP, short, 32,000", "SuperCLIP, short, 32,000", "colour_shape"),
    ("control, short, 32,000", "SuperCLIP, short, 32,000", "colour_shape"),
    ("CLIP, photographs, 6 epochs", "SuperCLIP, photographs, 6 epochs", "type"),
    ("a head for shapes", "a head for colours", "colour - shape"),
)
PRIMARY_QUANTILES = {10: 3.36, 15: 3.07}  # Student's t of so many differences, at 99.17 %
DRAWN = ("mixed, 24,000", "mixed, 32,000", "mixed, 48,000",
         "short, 24,000", "short, 32,000", "short, 48,000", "batch 8")  # fmt: skip
# What is compared beside them: the second arm minus the first
PAIRS = [
    *[(f"CLIP, {row}", f"SuperCLIP, {row}") for row in DRAWN],
    *[(f"control, {row}", f"SuperCLIP, {row}") for row in DRAWN],
    *[(f"CLIP, {row}", f"control, {row}") for row in DRAWN],
    ("CLIP, mixed, 32,000", "SuperCLIP, mixed, 24,000"),
    ("CLIP, mixed, 48,000", "SuperCLIP, mixed, 24,000"),
    ("CLIP, short, 32,000", "SuperCLIP, short, 24,000"),
    ("CLIP, short, 48,000", "SuperCLIP, short, 24,000"),
    ("a head for shapes", "a head for colours"),
    ("CLIP, mixed, 32,000", "CLIP, mean of patches"),
    ("CLIP, mean of patches", "SuperCLIP, mixed, 32,000"),
    ("CLIP, mixed, 32,000", "CLIP, faster image tower"),
    ("CLIP, faster image tower", "SuperCLIP, mixed, 32,000"),
    ("SuperCLIP, mixed, 32,000", "no IDF"),
    ("SuperCLIP, mixed, 32,000", "lambda 0.3"),
    ("SuperCLIP, mixed, 32,000", "lambda 3"),
    ("SuperCLIP, short, 32,000", "dual captions"),
    ("CLIP, photographs, 3 epochs", "SuperCLIP, photographs, 3 epochs"),
    ("CLIP, photographs, 6 epochs", "SuperCLIP, photographs, 6 epochs"),
]


def runs_of(name):
    """All runs of an arm, of seeds that have chosen its rate, and of those that are scored."""
    command = compare.read_command(ARMS[name]).text()
    return [run for run in RUNS if run["command"] == command]


def values_of(name, score):
    """A score of an arm in percent, for each seed. score: its name, or "colour - shape"."""
    first, _, second = score.partition(" - ")
    values = {}
    for run in runs_of(name):
        if run["seed"] >= FIRST_SCORED:
            values[run["seed"]] = compare.value_of(run, first)
            if second:
                values[run["seed"]] -= compare.value_of(run, second)
    return values


def row(a, b, score):
    """A line of a table: both means over all seeds, and the mean of b - a over those that both
    have, with its 95 % interval."""
    left, right = values_of(a, score), values_of(b, score)
    differences = [right[seed] - left[seed] for seed in left if seed in right]
    overlap = SHOP_OVERLAP if "photographs" in a else 0.0
    middle, half = compare.interval(differences, overlap=overlap)
    cells = [score, a, b, f"{mean(left.values()):.1f}", f"{mean(right.values()):.1f}"]
    cells.append(f"{middle:+.1f} ± {half:.1f}")
    if (a, b, score) in PRIMARY:
        quantile = PRIMARY_QUANTILES[len(differences)]
        _, half = compare.interval(differences, quantile, overlap)
        cells.append("yes" if abs(middle) > half else "no")
    return "| " + " | ".join(cells) + " |"


def rates_of(name):
    """The learning rate of an arm, and {rate: its score} of those that were tried."""
    score = "type" if "photographs" in name else "colour_shape"
    [rate] = {run["rate"] for run in runs_of(name) if run["seed"] >= FIRST_SCORED}
    tried = {}
    for run in sorted(runs_of(name), key=lambda run: run["rate"]):
        if run["seed"] < FIRST_SCORED:
            tried.setdefault(run["rate"], []).append(compare.value_of(run, score))
    return rate, {rate: mean(values) for rate, values in tried.items()}


def main(argv):
    make_parser(__doc__).parse_args(argv)
    print("| score | a | b | a, percent | b, percent | b - a | holds after correction |")
    for question in PRIMARY:
        print(row(*question))
    print("\n| score | a | b | a, percent | b, percent | b - a |")
    for a, b in PAIRS:
        scores = ("colour_shape", "held_out", "colour", "shape", "R@1")
        if "photographs" in a:
            scores = ("type", "R@1", "R@5", "R@10")
        for score in scores:
            print(row(a, b, score))
    print("\n| arm | its learning rate | those that were tried: percent |")
    for name in ARMS:
        rate, goals = rates_of(name)
        print(f"| {name} | {rate:.3g} | {compare.text_of(goals)} |")


if __name__ == "__main__":
    run_command(main)
