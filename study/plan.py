"""The published study: what was run, and its tables.

    python -m study.plan    write tables.md anew, from runs.jsonl

An arm is a command at a learning rate that seeds 0 to 4, or 0 to 2, have chosen for it by the rule
of study.compare (at batch 8 from a quarter of the rates). The score that chooses is colour + shape,
or the type for photographs. Seeds 15 and up are scored. No seed is left out, and none is added.

There are three rounds of runs. The first round has commit a9a4f28, and answers questions 1 to 6.
The second round has commit d7f258b, and answers questions 7 to 10. Scores of the rounds differ
although the commands are equal, because rounding differs. So no difference pairs their runs. The
rules of the second round were written down before its first run. `git show d7f258b:study/plan.py`
prints them.

The rules of the third round were written down before its first run, too. When we wrote them, we
knew the results of the first two rounds, and a pilot of one seed, which had seen 12 cells of the
grid below and two rates on Flickr8k. study/recipes.py makes the runs.

- Recipes. Each model trains on 32,000 mixed pairs in batches of 32 at every cell of a grid: a
  warm-up of 10, 30, 50, 70 and 90 % of the steps, and a rate of 0.00025, 0.0005 and 0.001. The
  score is colour + shape. Seeds 0 and 1 score all cells. (If a run takes more than 130 seconds, the
  warm-up of 10 % gets seed 0 only.) If the best cell of a model lies at the lowest or the highest
  rate, this model tries one rate beyond it, once, at all warm-ups. The four best cells of a model
  get seeds 2 to 5 as well. The recipe of the model is the cell with the highest mean over the six
  seeds. Of equal ones it is the one with the fewest steps in the grid from 50 % and 0.0005, then
  the one with the lower rate, then the one with the shorter warm-up. Seeds 30 to 44 score the
  three recipes.
- Question 11: colour + shape, SuperCLIP - CLIP, each at its recipe. Question 12: SuperCLIP -
  control.
- Flickr8k. tiny at 72 pixels in batches of 32, with the five captions that people wrote for each
  photograph, and a vocabulary of 3,000 entries. The score is R@10, the mean of both ways. Choices
  are made by training on five shards and scoring the sixth. CLIP at 0.0005 with seeds 0 and 1
  chooses the length: 5, 10 or 15 epochs. Then seeds 0 and 1 choose the rate of each model by the
  usual rule. Seeds 30 to 39 train on all six shards, and are scored on the 1,000 photographs of the
  development split.
- Question 13: R@10 on Flickr8k, SuperCLIP - CLIP. Question 14: SuperCLIP - control. They are about
  training on these photographs and these 1,000 test pictures, because the data is fixed.
- These four questions are tested by the exact sign-flip test (compare.sign_flip) and corrected by
  Holm at 5 %. Questions 1 to 10 keep their tests and whether they hold.
- Answers, the first that matches. *Against*: the 95 % interval lies below 0, or a planned question
  has a significant loss. *Confirmed*: planned, and a gain that holds after the correction.
  *Suggested*: the 95 % interval lies above 0. *Not seen*: everything else.
- No run is left out. What is not finished is named on the page.

A claim that a planned question asks has the answer *yes* if SuperCLIP is better and the difference
holds after the correction for all questions of its round. A claim that no planned question asks has
the answer *seen* if the 95 % interval lies above 0. The answer is *no* if the 95 % interval lies
below 0, and else *not clear*.
"""

import json
from pathlib import Path
from statistics import mean

from common.cli import make_parser, run_command
from common.machine import write_file
from study import compare

PAGE = Path(__file__).with_name("tables.md")
RUNS = [json.loads(line) for line in open(Path(__file__).with_name("runs.jsonl"))]
FIRST_SCORED = 15  # the seeds before it have chosen rates
# Splits of the photographs share pairs, so their variance is larger (Nadeau and Bengio), by the
# pairs validated on over those trained on.
SHOP_OVERLAP = 2_000 / 24_000
# {number of questions: {number of differences: Student's t}} after Bonferroni's correction, which
# is at 99.17 % for six questions and at 98.75 % for four
CORRECTED = {6: {10: 3.36, 15: 3.07}, 4: {10: 3.111, 15: 2.864}}

# -----------------------------------------------------------------------------
# What was run: {arm: (commit, command)}. A row has three arms.

MODELS = {
    "CLIP": "train.py --cls_weight 0",
    "control": "-m study.shuffled",
    "SuperCLIP": "train.py",
}
SHOP = """--train_data 'out_study/shop/{seed}/train-*.tar' \
--val_data 'out_study/shop/{seed}/val-*.tar' --zeroshot_data out_study/shop/{seed}/type \
--model tiny --batch_size 32 --epochs"""


def arms_of(commit, rows, others):
    arms = {f"{model}, {row}": f"{MODELS[model]} {rows[row]}" for row in rows for model in MODELS}
    return {arm: (commit, command) for arm, command in (arms | others).items()}


# A bare run trains on 32,000 samples, 1.6 epochs. Runs of 3 epochs have the rates of 6 epochs, and
# the two heads have that of SuperCLIP, mixed, 32,000.
FIRST_ROUND = {
    "mixed, 24,000": "--epochs 1.2",
    "mixed, 32,000": "",
    "mixed, 48,000": "--epochs 2.4",
    "short, 24,000": "--captions json.short --epochs 1.2",
    "short, 32,000": "--captions json.short",
    "short, 48,000": "--captions json.short --epochs 2.4",
    "mixed, 32,000, batch 8": "--batch_size 8 --epochs 1.6",
    "photographs, 3 epochs": f"{SHOP} 3",
    "photographs, 6 epochs": f"{SHOP} 6",
}
CHANGES = {
    "head for colours": "-m study.some_words --hears colours --epochs 1.2",
    "head for shapes": "-m study.some_words --hears shapes --epochs 1.2",
    "no IDF": "-m study.no_idf",
    "lambda 0.3": "train.py --cls_weight 0.3",
    "lambda 3": "train.py --cls_weight 3",
    "dual captions": "train.py --captions json.short --label_captions json.long",
    "mean of the patches": "-m study.mean_patches --cls_weight 0",
    "faster image tower": "-m study.fast_tower --cls_weight 0",
}
SECOND_ROUND = {
    "long, 32,000": "--captions json.long",
    "mixed, 32,000, again": "",
    "photographs, 6 epochs, again": f"{SHOP} 6",
}
YES_NO = {f"yes or no, lambda {x}": f"-m study.yes_no --cls_weight {x}" for x in (0.01, 0.1, 1, 10)}
ARMS = arms_of("a9a4f28", FIRST_ROUND, CHANGES) | arms_of("d7f258b", SECOND_ROUND, YES_NO)

# -----------------------------------------------------------------------------
# Values


def runs_of(arm):
    """Return all runs of an arm, those that have chosen its rate and those that are scored."""
    if arm not in ARMS:
        return []
    commit, command = ARMS[arm]
    text = compare.read_command(command).text()
    return [run for run in RUNS if (run["commit"], run["command"]) == (commit, text)]


def values_of(arm, score):
    """Return {seed: score in percent} of the scored runs of an arm, which is empty if there are
    none. A score or a model's row can be a difference: "colour - shape" or "batch 8 - 32"."""
    first, _, second = score.partition(" - ")
    if second:
        return minus(values_of(arm, first), values_of(arm, second))
    if arm.endswith(", batch 8 - 32"):
        at_32 = arm.removesuffix(", batch 8 - 32")
        return minus(values_of(f"{at_32}, batch 8", score), values_of(at_32, score))
    runs = [run for run in runs_of(arm) if run["seed"] >= FIRST_SCORED]
    return {run["seed"]: compare.value_of(run, score) for run in runs}


def minus(values, others):
    return {seed: values[seed] - others[seed] for seed in values if seed in others}


def interval_of(score, arm, baseline, questions=None):
    """Return the mean of arm - baseline over the seeds that both have, and half of its interval, at
    95 % or after the correction for a number of questions."""
    differences = [*minus(values_of(arm, score), values_of(baseline, score)).values()]
    quantile = CORRECTED[questions][len(differences)] if questions else None
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
# Rows of tables. Each function returns the cells that follow the label.

TOKEN = "probe, class token"
NAMES = {
    "colour_shape": "colour + shape",
    "colour - shape": "colours - shapes",
    "held_out": "held out",
    TOKEN: "linear probe",
}


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


def pair_of(row, baseline="CLIP"):
    return f"SuperCLIP, {row}", f"{baseline}, {row}"


def three(score, row):
    """Return the cells of `two` for CLIP and SuperCLIP, and the mean of the control, and SuperCLIP
    minus the control."""
    superclip, control = pair_of(row, "control")
    cells = two(score, *pair_of(row))
    if not values_of(control, score):
        return [*cells, "not run", "not run"]
    return [*cells, *means(score, control), difference(score, superclip, control)]


def claim(score, row, questions=None):
    """questions: how many were planned with this one, or None if this one was not planned."""
    middle, half = interval_of(score, *pair_of(row))
    _, corrected = interval_of(score, *pair_of(row), questions)
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


def probe(token, row):
    untrained = means(f"probe, untrained {token}", f"CLIP, {row}")
    return [*untrained, *three(f"probe, {token}", row)]


def comparison(score, arm, baseline):
    return [baseline, NAMES.get(score, score), *two(score, arm, baseline)]


def rates(arm):
    chosen, tried = rates_of(arm)
    return [str(chosen or "not scored"), compare.text_of(tried) or "not searched"]


# -----------------------------------------------------------------------------
# Tables: {head: rows}. A row is a label, a function, and its arguments.

CLIP_32, CONTROL_32, SUPERCLIP_32 = [f"{model}, mixed, 32,000" for model in MODELS]
SHOP_6 = "photographs, 6 epochs"
DRAWN = [row for row in [*FIRST_ROUND, "long, 32,000"] if "photographs" not in row]
HEADS = "head for colours", "head for shapes"
# All arms and baselines that are compared by several scores
PAIRS = [pair_of(row, model) for row in FIRST_ROUND | SECOND_ROUND for model in ("CLIP", "control")]
PAIRS += [(arm, CLIP_32) for arm in (CONTROL_32, "mean of the patches", "faster image tower")]
PAIRS += [(SUPERCLIP_32, arm) for arm in ("mean of the patches", "faster image tower")]
PAIRS += [(arm, SUPERCLIP_32) for arm in ("no IDF", "lambda 0.3", "lambda 3")]
PAIRS += [
    ("dual captions", "SuperCLIP, short, 32,000"),
    ("yes or no, lambda 1", f"{SUPERCLIP_32}, again"),
    ("SuperCLIP, mixed, 24,000", "CLIP, mixed, 32,000"),
    ("SuperCLIP, mixed, 24,000", "CLIP, mixed, 48,000"),
    ("SuperCLIP, short, 24,000", "CLIP, short, 32,000"),
    ("SuperCLIP, short, 24,000", "CLIP, short, 48,000"),
]


def scores_of(arm, baseline):
    """Return the names of the scores that compare two arms. There are none without a baseline."""
    if not runs_of(baseline):
        return []
    photographs = ["type", "R@1", "R@5", "R@10"]
    return photographs if "photographs" in arm else ["colour_shape", "R@1", "held_out"]


THREE = "CLIP | SuperCLIP | SuperCLIP - CLIP | control | SuperCLIP - control"
INTRODUCTION = """`python -m study.plan` writes this page from [runs.jsonl](runs.jsonl).
[results.md](results.md) explains its words, and quotes the tables that the claims need."""
# The time of a step, from docs/speed.md, and our judgement of it
COST = "time of a step", "1", "1.03", "no interval", "not timed", "no interval", "not clear"
TABLES = {
    f"claim of the paper | measured here | {THREE} | answer": [
        ("better zero-shot classification", claim, "colour_shape", "mixed, 32,000", 6),
        ("better zero-shot classification", claim, "type", SHOP_6, 6),
        ("better retrieval", claim, "R@1", "mixed, 32,000"),
        ("better retrieval", claim, "R@1", SHOP_6),
        ("better in tasks of vision alone", claim, TOKEN, "mixed, 32,000, again", 4),
        ("better in tasks of vision alone", claim, TOKEN, f"{SHOP_6}, again", 4),
        ("gains from raw captions", claim, "colour_shape", "short, 32,000", 6),
        ("gains from raw captions", claim, "R@1", "short, 32,000"),
        ("gains from long, detailed captions", claim, "colour_shape", "long, 32,000", 4),
        ("gains from long, detailed captions", claim, "R@1", "long, 32,000"),
        ("loses less in small batches", claim, "colour_shape", "mixed, 32,000, batch 8 - 32"),
        ("costs next to nothing", lambda: COST),
    ],
    "planned question | model against baseline | score | baseline | model | model - baseline "
    "| holds after correction": [
        ("1. mixed captions", planned, 6, "colour_shape", SUPERCLIP_32, CLIP_32),
        ("2. mixed captions", planned, 6, "colour_shape", SUPERCLIP_32, CONTROL_32),
        ("3. short captions", planned, 6, "colour_shape", *pair_of("short, 32,000")),
        ("4. short captions", planned, 6, "colour_shape", *pair_of("short, 32,000", "control")),
        ("5. photographs", planned, 6, "type", *pair_of(SHOP_6)),
        ("6. two heads", planned, 6, "colour - shape", *HEADS),
        ("7. long captions", planned, 4, "colour_shape", *pair_of("long, 32,000")),
        ("8. long captions", planned, 4, "colour_shape", *pair_of("long, 32,000", "control")),
        ("9. mixed captions", planned, 4, TOKEN, *pair_of("mixed, 32,000, again")),
        ("10. photographs", planned, 4, TOKEN, *pair_of(f"{SHOP_6}, again")),
    ],
    f"captions, pairs | {THREE}": [(row, three, "colour_shape", row) for row in DRAWN],
    f"linear probe | CLIP, untrained | {THREE}": [
        (f"{token}: {row}", probe, token, row)
        for token in ("class token", "patch mean")
        for row in ("mixed, 32,000, again", "long, 32,000", f"{SHOP_6}, again")
    ],
    "comparisons | baseline | score | mean of the baseline | mean | difference": [
        *[(HEADS[0], comparison, score, *HEADS) for score in ("colour", "shape", "colour - shape")],
        *[(pair[0], comparison, score, *pair) for pair in PAIRS for score in scores_of(*pair)],
    ],
    "learning rates | chosen | tried: mean score": [
        (arm, rates, arm) for arm in ARMS if runs_of(arm)
    ],
}


def text_of(tables):
    """Return the tables as Markdown. The heading of a table is its first cell."""
    text = f"# The tables of the study\n\n{INTRODUCTION}\n"
    for head, rows in tables.items():
        text += f"\n## {head[0].upper()}{head.partition(' | ')[0][1:]}\n\n"
        lines = [head.split(" | "), ["---"] * (head.count(" | ") + 1)]
        lines += [[label, *cells_of(*arguments)] for label, cells_of, *arguments in rows]
        text += "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return text


def main(argv):
    make_parser(__doc__).parse_args(argv)
    write_file(PAGE, lambda file: file.write(text_of(TABLES).encode()))


if __name__ == "__main__":
    run_command(main)
