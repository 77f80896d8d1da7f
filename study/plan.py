"""The published study: what was run, and the tables of results.md.

    python -m study.plan    write the tables of results.md anew, from runs.jsonl

An arm is a command at a learning rate that was chosen for it. Seeds 0 to 4, or 0 to 2, choose the
rate. They try half, once and twice the default rate (at batch 8 a quarter of each). While the best
rate is the lowest or the highest one, they try one rate beyond it. A rate is good if its score is
within a point of the best one. The default rate is taken if it is good, otherwise the lowest good
rate. The score that chooses is colour + shape, or the type for photographs. Seeds 15 and up are
scored. No seed is left out, and none is added.

There are two rounds of runs. The first round has commit a9a4f28, and answers questions 1 to 6. The
second round has commit d7f258b, and answers questions 7 to 10. Scores of the two rounds differ
although the commands are equal, because rounding differs. So no difference pairs their runs. The
rest of this text was written down before the first run of the second round:

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
import re
from pathlib import Path
from statistics import mean

from common.cli import check, make_parser, run_command
from common.machine import write_file
from study import compare

PAGE = Path(__file__).with_name("results.md")
RUNS = [json.loads(line) for line in open(Path(__file__).with_name("runs.jsonl"))]
FIRST_ROUND, SECOND_ROUND = "a9a4f28", "d7f258b"  # commits
FIRST_SCORED = 15  # the seeds before it have chosen rates
# Splits of the photographs share pairs, so their variance is larger (Nadeau and Bengio), by the
# pairs validated on over those trained on.
SHOP_OVERLAP = 2_000 / 24_000
# {number of questions: {number of differences: Student's t}} after Bonferroni's correction, which
# is at 99.17 % for six questions and at 98.75 % for four
CORRECTED = {6: {10: 3.36, 15: 3.07}, 4: {10: 3.111, 15: 2.864}}

# -----------------------------------------------------------------------------
# What was run: {arm: its command}

CLIP, CONTROL, SUPERCLIP = "train.py --cls_weight 0", "-m study.shuffled", "train.py"
SHORT = "--captions json.short"
SHOP = """--train_data 'out_study/shop/{seed}/train-*.tar' \
--val_data 'out_study/shop/{seed}/val-*.tar' --zeroshot_data out_study/shop/{seed}/type \
--model tiny --batch_size 32 --epochs"""


def three_arms(row, options):
    programs = {"CLIP": CLIP, "control": CONTROL, "SuperCLIP": SUPERCLIP}
    return {f"{model}, {row}": f"{program} {options}" for model, program in programs.items()}


# A bare run trains on 32,000 samples, 1.6 epochs.
FIRST_ARMS = {
    **three_arms("mixed, 24,000", "--epochs 1.2"),
    **three_arms("mixed, 32,000", ""),
    **three_arms("mixed, 48,000", "--epochs 2.4"),
    **three_arms("short, 24,000", f"{SHORT} --epochs 1.2"),
    **three_arms("short, 32,000", SHORT),
    **three_arms("short, 48,000", f"{SHORT} --epochs 2.4"),
    **three_arms("mixed, 32,000, batch 8", "--batch_size 8 --epochs 1.6"),
    "CLIP, photographs, 3 epochs": f"{CLIP} {SHOP} 3",  # at the rates of 6 epochs
    "SuperCLIP, photographs, 3 epochs": f"{SUPERCLIP} {SHOP} 3",
    "CLIP, photographs, 6 epochs": f"{CLIP} {SHOP} 6",
    "SuperCLIP, photographs, 6 epochs": f"{SUPERCLIP} {SHOP} 6",
    # at the rate of SuperCLIP, mixed, 32,000
    "head for colours": "-m study.some_words --hears colours --epochs 1.2",
    "head for shapes": "-m study.some_words --hears shapes --epochs 1.2",
    "no IDF": "-m study.no_idf",
    "lambda 0.3": "train.py --cls_weight 0.3",
    "lambda 3": "train.py --cls_weight 3",
    "dual captions": "train.py --captions json.short --label_captions json.long",
    "mean of the patches": "-m study.mean_patches --cls_weight 0",
    "faster image tower": "-m study.fast_tower --cls_weight 0",
}
SECOND_ARMS = {
    **three_arms("long, 32,000", "--captions json.long"),
    **three_arms("mixed, 32,000, again", ""),
    **three_arms("photographs, 6 epochs, again", f"{SHOP} 6"),
    "yes or no, lambda 0.01": "-m study.yes_no --cls_weight 0.01",
    "yes or no, lambda 0.1": "-m study.yes_no --cls_weight 0.1",
    "yes or no, lambda 1": "-m study.yes_no --cls_weight 1",
    "yes or no, lambda 10": "-m study.yes_no --cls_weight 10",
}
ARMS = {**FIRST_ARMS, **SECOND_ARMS}

# -----------------------------------------------------------------------------
# What was asked: a score, an arm and its baseline

TOKEN = "probe, class token"
FIRST_QUESTIONS = {
    "1. mixed captions": ("colour_shape", "SuperCLIP, mixed, 32,000", "CLIP, mixed, 32,000"),
    "2. mixed captions": ("colour_shape", "SuperCLIP, mixed, 32,000", "control, mixed, 32,000"),
    "3. short captions": ("colour_shape", "SuperCLIP, short, 32,000", "CLIP, short, 32,000"),
    "4. short captions": ("colour_shape", "SuperCLIP, short, 32,000", "control, short, 32,000"),
    "5. photographs": ("type", "SuperCLIP, photographs, 6 epochs", "CLIP, photographs, 6 epochs"),
    "6. two heads": ("colour - shape", "head for colours", "head for shapes"),
}
SECOND_QUESTIONS = {
    "7. long captions": ("colour_shape", "SuperCLIP, long, 32,000", "CLIP, long, 32,000"),
    "8. long captions": ("colour_shape", "SuperCLIP, long, 32,000", "control, long, 32,000"),
    "9. mixed captions": (TOKEN, "SuperCLIP, mixed, 32,000, again", "CLIP, mixed, 32,000, again"),
    "10. photographs": (
        TOKEN,
        "SuperCLIP, photographs, 6 epochs, again",
        "CLIP, photographs, 6 epochs, again",
    ),
}
# A score and a row, and how many questions were planned with this one. The others are exploratory.
CLAIMS = (
    ("better zero-shot classification", "colour_shape", "mixed, 32,000", 6),
    ("better zero-shot classification", "type", "photographs, 6 epochs", 6),
    ("better retrieval", "R@1", "mixed, 32,000"),
    ("better retrieval", "R@1", "photographs, 6 epochs"),
    ("better in tasks of vision alone", TOKEN, "mixed, 32,000, again", 4),
    ("better in tasks of vision alone", TOKEN, "photographs, 6 epochs, again", 4),
    ("gains from raw captions", "colour_shape", "short, 32,000", 6),
    ("gains from raw captions", "R@1", "short, 32,000"),
    ("gains from long, detailed captions", "colour_shape", "long, 32,000", 4),
    ("gains from long, detailed captions", "R@1", "long, 32,000"),
    ("loses less in small batches", "colour_shape", "mixed, 32,000, batch 8 - 32"),
)
# The time of a step, from docs/speed.md, and our judgement of it
COST = "time of a step", "1", "1.03", "no interval", "not timed", "no interval", "not clear"
NAMES = {
    "colour_shape": "colour + shape",
    "colour - shape": "colours - shapes",
    TOKEN: "linear probe",
}

# -----------------------------------------------------------------------------
# Values


def runs_of(arm):
    """Return all runs of an arm: of seeds that have chosen its rate, and of those that are scored.
    Equal commands of the two rounds differ by their commits."""
    if arm not in ARMS:
        return []
    command = compare.read_command(ARMS[arm]).text()
    commit = FIRST_ROUND if arm in FIRST_ARMS else SECOND_ROUND
    runs = [run for run in RUNS if run["command"] == command]
    return [run for run in runs if run["commit"] == commit]


def values_of(arm, score):
    """Return {seed: score in percent} of the scored runs of an arm, which is empty if there are
    none. A score or a model's row can be a difference: "colour - shape" or "batch 8 - 32"."""
    first, _, second = score.partition(" - ")
    if second:
        return minus(values_of(arm, first), values_of(arm, second))
    if arm.endswith("batch 8 - 32"):
        at_8 = arm.removesuffix(" - 32")
        return minus(values_of(at_8, score), values_of(at_8.removesuffix(", batch 8"), score))
    runs = [run for run in runs_of(arm) if run["seed"] >= FIRST_SCORED]
    return {run["seed"]: compare.value_of(run, score) for run in runs}


def minus(values, others):
    return {seed: values[seed] - others[seed] for seed in values if seed in others}


def interval_of(score, arm, baseline, questions=None):
    """Return the mean of arm - baseline over the seeds that both have, and half of its interval, at
    95 % or after the correction for a number of questions."""
    differences = [*minus(values_of(arm, score), values_of(baseline, score)).values()]
    quantile = None
    if questions is not None:
        quantile = CORRECTED[questions][len(differences)]
    overlap = SHOP_OVERLAP if "photographs" in arm else 0.0
    return compare.interval(differences, quantile, overlap)


def rates_of(arm):
    """Return the learning rate of an arm, or None if it has no scores, and {tried rate: score}."""
    score = "type" if "photographs" in arm else "colour_shape"
    chosen = None
    tried = {}
    for run in runs_of(arm):
        if run["seed"] >= FIRST_SCORED:
            chosen = run["rate"]
        else:
            tried.setdefault(run["rate"], []).append(compare.value_of(run, score))
    return chosen, {rate: mean(values) for rate, values in tried.items()}


# -----------------------------------------------------------------------------
# Lines of tables. Each function returns the cells that follow the label.


def means(score, *arms):
    """Return the mean of each arm over the seeds that all of them have."""
    found = [values_of(arm, score) for arm in arms]
    seeds = set.intersection(*map(set, found))
    return [f"{mean(values[seed] for seed in seeds):.1f}" for values in found]


def difference(score, arm, baseline):
    middle, half = interval_of(score, arm, baseline)
    return f"{middle:+.1f} ± {half:.1f}"


def two(score, arm, baseline):
    return [*means(score, baseline, arm), difference(score, arm, baseline)]


def pair(score, row):
    return two(score, f"SuperCLIP, {row}", f"CLIP, {row}")


def three(score, row):
    """Return the cells of `pair`, the mean of the control, and SuperCLIP minus the control. A
    control that was not run has words in place of numbers."""
    control = f"control, {row}"
    if not values_of(control, score):
        return [*pair(score, row), "not run", "not run"]
    gain = difference(score, f"SuperCLIP, {row}", control)
    return [*pair(score, row), *means(score, control), gain]


def claim(score, row, questions=None):
    arms = f"SuperCLIP, {row}", f"CLIP, {row}"
    middle, half = interval_of(score, *arms)
    _, corrected = interval_of(score, *arms, questions)
    answer = "not clear"
    if middle < -half:
        answer = "no"
    elif middle > corrected:
        answer = "yes" if questions else "seen"
    return [f"{row}: {NAMES.get(score, score)}", *three(score, row), answer]


def planned(questions, score, arm, baseline):
    models = [name.partition(", ")[0] for name in (arm, baseline)]
    middle, half = interval_of(score, arm, baseline, questions)
    holds = "yes" if abs(middle) > half else "no"
    return [" against ".join(models), NAMES.get(score, score), *two(score, arm, baseline), holds]


def change(arm, baseline):
    return [*two("colour_shape", arm, baseline), difference("R@1", arm, baseline)]


def probe(token, row):
    untrained = means(f"probe, untrained {token}", f"CLIP, {row}")
    return [*untrained, *three(f"probe, {token}", row)]


def again(score, row):
    """Return the cells of the second round, and the difference in the first one."""
    return [*three(score, f"{row}, again"), pair(score, row)[-1]]


def rates(arm):
    chosen, tried = rates_of(arm)
    return [str(chosen or "not scored"), compare.text_of(tried) or "not searched"]


# -----------------------------------------------------------------------------
# Tables: {first cell of the head: lines}. A line is a label, a function, and its arguments.

DRAWN = ("mixed, 24,000", "mixed, 32,000", "mixed, 48,000", "short, 24,000", "short, 32,000",
         "short, 48,000", "mixed, 32,000, batch 8", "long, 32,000")  # fmt: skip
SUPERCLIP_32 = "SuperCLIP, mixed, 32,000"
TABLES = {
    "claim of the paper": [
        *[(label, claim, *row) for label, *row in CLAIMS],
        ("costs next to nothing", lambda: COST),
    ],
    "planned question": [
        *[(label, planned, 6, *question) for label, question in FIRST_QUESTIONS.items()],
        *[(label, planned, 4, *question) for label, question in SECOND_QUESTIONS.items()],
    ],
    "captions, pairs": [(row, three, "colour_shape", row) for row in DRAWN],
    "SuperCLIP after 24,000 pairs against": [
        ("mixed, CLIP after 32,000", change, "SuperCLIP, mixed, 24,000", "CLIP, mixed, 32,000"),
        ("mixed, CLIP after 48,000", change, "SuperCLIP, mixed, 24,000", "CLIP, mixed, 48,000"),
        ("short, CLIP after 32,000", change, "SuperCLIP, short, 24,000", "CLIP, short, 32,000"),
        ("short, CLIP after 48,000", change, "SuperCLIP, short, 24,000", "CLIP, short, 48,000"),
    ],
    "accuracy on": [
        ("colours", two, "colour", "head for colours", "head for shapes"),
        ("shapes", two, "shape", "head for colours", "head for shapes"),
        ("colours - shapes", two, "colour - shape", "head for colours", "head for shapes"),
    ],
    "change to CLIP": [
        ("control against CLIP", change, "control, mixed, 32,000", "CLIP, mixed, 32,000"),
        ("mean of the patches against CLIP", change, "mean of the patches", "CLIP, mixed, 32,000"),
        ("faster image tower against CLIP", change, "faster image tower", "CLIP, mixed, 32,000"),
        ("SuperCLIP against control", change, SUPERCLIP_32, "control, mixed, 32,000"),
        ("SuperCLIP against mean of the patches", change, SUPERCLIP_32, "mean of the patches"),
        ("SuperCLIP against faster image tower", change, SUPERCLIP_32, "faster image tower"),
    ],
    "change to SuperCLIP": [
        ("no IDF", change, "no IDF", "SuperCLIP, mixed, 32,000"),
        ("lambda 0.3", change, "lambda 0.3", "SuperCLIP, mixed, 32,000"),
        ("lambda 3", change, "lambda 3", "SuperCLIP, mixed, 32,000"),
        ("dual captions", change, "dual captions", "SuperCLIP, short, 32,000"),
        ("yes or no, lambda 1", change, "yes or no, lambda 1", "SuperCLIP, mixed, 32,000, again"),
    ],
    "photographs": [
        (f"{score}, {row}", pair, score, f"photographs, {row}")
        for score in ("type", "R@1", "R@5", "R@10")
        for row in ("3 epochs", "6 epochs")
    ],
    "linear probe": [
        (f"{token}: {row}", probe, token, row)
        for token in ("class token", "patch mean")
        for row in ("mixed, 32,000, again", "long, 32,000", "photographs, 6 epochs, again")
    ],
    "run again": [
        ("colour + shape, mixed, 32,000", again, "colour_shape", "mixed, 32,000"),
        ("R@1, mixed, 32,000", again, "R@1", "mixed, 32,000"),
        ("type, photographs, 6 epochs", again, "type", "photographs, 6 epochs"),
        ("R@1, photographs, 6 epochs", again, "R@1", "photographs, 6 epochs"),
    ],
    "score: captions, pairs": [
        (f"{name}: {row}", three, score, row)
        for name, score in (("R@1", "R@1"), ("held out", "held_out"))
        for row in DRAWN
    ],
    "arm": [(arm, rates, arm) for arm in ARMS],
}


def write_tables(page):
    """Return the text of the page with its tables written anew."""
    for first_cell, lines in TABLES.items():
        body = ""
        for label, cells_of, *arguments in lines:
            cells = cells_of(*arguments)
            body += f"| {label} | {' | '.join(cells)} |\n"
        table = rf"(^\| {re.escape(first_cell)} \|.*\n\|[-| ]+\n)(\|.*\n)*"
        page, n = re.subn(table, r"\1" + body, page, flags=re.MULTILINE)
        check(n == 1, f"{PAGE} has {n} tables that begin with {first_cell}")
    return page


def main(argv):
    make_parser(__doc__).parse_args(argv)
    page = write_tables(PAGE.read_text("utf-8"))
    write_file(PAGE, lambda file: file.write(page.encode()))


if __name__ == "__main__":
    run_command(main)
