"""The published study: what was run, and its tables.

    python -m study.plan    write tables.md anew, from runs.jsonl

An arm is a command at a learning rate that other seeds have chosen for it by the rule of
study.compare (at batch 8 from a quarter of the rates). The score that chooses is colour + shape,
the type for photographs, and R@10 for Flickr8k. Seeds 15 and up are scored. No seed is left out,
and none is added.

There are three rounds of runs. The first round has commit a9a4f28, and answers questions 1 to 6.
The second round has commit d7f258b, and answers questions 7 to 10. The third round has commit
43e1f26, and answers questions 11 to 14. Scores of the rounds differ although the commands are
equal, because rounding differs. So no difference pairs runs of two rounds. The rules of a round
were written down before its first run: `git show d7f258b:study/plan.py` and
`git show 43e1f26:study/plan.py` print them. `git show 43e1f26:study/recipes.py` prints the program
that made the third round.

In the third round each model searched its *recipe*, the warm-up and the learning rate, on a grid.
Seeds 0 and 1 scored all cells. The four best cells of a model got seeds 2 to 5 as well, and the
recipe is the cell with the highest mean over the six seeds.

Questions 1 to 10 are tested by Student's t and corrected by Bonferroni, in each round. Questions 11
to 14 are tested by the exact sign-flip test and corrected by Holm. The answer to a claim is the
first that matches. *Against*: the 95 % interval lies below 0, or a planned question has a
significant loss. *Confirmed*: planned, and a gain that holds after the correction. *Suggested*: the
95 % interval lies above 0. *Not seen*: everything else.
"""

import json
from functools import cache
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

# The third round. The middle of the grid is what train.py does.
THIRD = "43e1f26"
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # warm-up
RATES = (2.5e-4, 5e-4, 1e-3)
WARMUP = {"CLIP": "--cls_weight 0", "control": "--shuffled", "SuperCLIP": ""}
TUNED = "mixed, 32,000, tuned"
FLICKR8K = """--train_data out_study/flickr8k/{train} --val_data out_study/flickr8k/{val} \
--captions json.captions --vocab out_study/flickr8k.tiktoken --model tiny --batch_size 32 \
--epochs"""
CHOOSE_ON = FLICKR8K.format(train="'train-{00000..00004}.tar'", val="train-00005.tar")
SCORE_ON = FLICKR8K.format(train="'train-*.tar'", val="dev-00000.tar")
LENGTH = 15  # epochs on Flickr8k, which CLIP has chosen
# The (warm-up, rate) that each model has found
RECIPES = {"CLIP": (0.7, 5e-4), "control": (0.7, 5e-4), "SuperCLIP": (0.7, 1e-3)}
THIRD_ROUND = {
    "Flickr8k": f"{SCORE_ON} {LENGTH}",
    **{f"Flickr8k, choice, {epochs} epochs": f"{CHOOSE_ON} {epochs}" for epochs in (5, 10, 15)},
}
SEARCHED = {
    f"{model}, {TUNED}": f"-m study.warmup --share {share} {WARMUP[model]}"
    for model, (share, _) in RECIPES.items()
}
ARMS |= arms_of(THIRD, THIRD_ROUND, SEARCHED)

# -----------------------------------------------------------------------------
# Values


@cache
def runs_with(commit, command):
    text = compare.read_command(command).text()
    return [run for run in RUNS if (run["commit"], run["command"]) == (commit, text)]


def runs_of(arm):
    """Return all runs of an arm, those that have chosen its rate and those that are scored."""
    return runs_with(*ARMS[arm]) if arm in ARMS else []


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


def differences_of(score, arm, baseline):
    """Return the list of arm - baseline, one for each seed that both have."""
    return [*minus(values_of(arm, score), values_of(baseline, score)).values()]


def interval_of(score, arm, baseline, questions=None):
    """Return the mean of arm - baseline, and half of its interval, at 95 % or after the correction
    for a number of questions."""
    differences = differences_of(score, arm, baseline)
    quantile = CORRECTED[questions][len(differences)] if questions else None
    overlap = SHOP_OVERLAP if "photographs" in arm else 0.0
    return compare.interval(differences, quantile, overlap)


def scores_of(arm):
    """Return the names of the scores of an arm. The first one has chosen its rate."""
    if "photographs" in arm:
        return "type", "R@1", "R@5", "R@10"
    if "Flickr8k" in arm:
        return "R@10", "R@1", "R@5"
    return "colour_shape", "R@1", "held_out"


def rates_of(arm):
    """Return the learning rate of an arm, or None if it has no scores, and {tried rate: score}."""
    score, *_ = scores_of(arm)
    chosen = None
    tried = {}
    # Rates on Flickr8k were chosen on a part of the training pictures.
    for run in runs_of(arm) + runs_of(f"{arm}, choice, {LENGTH} epochs"):
        if run["seed"] >= FIRST_SCORED:
            chosen = run["rate"]
        else:
            tried.setdefault(run["rate"], []).append(compare.value_of(run, score))
    return chosen, {rate: mean(values) for rate, values in tried.items()}


def search_of(model):
    """Return {(warm-up, rate): {seed: colour + shape in percent}}, of the runs in which a model has
    searched its recipe."""
    cells = {}
    for share in SHARES:
        for run in runs_with(THIRD, f"-m study.warmup --share {share} {WARMUP[model]}"):
            if run["seed"] < FIRST_SCORED:
                scores = cells.setdefault((share, run["rate"]), {})
                scores[run["seed"]] = compare.value_of(run, "colour_shape")
    return cells


def grid_of(model):
    """Return {(warm-up, rate): mean of seeds 0 and 1} of all cells."""
    return {cell: mean((scores[0], scores[1])) for cell, scores in search_of(model).items()}


# -----------------------------------------------------------------------------
# The planned questions: {number: (score, arm, baseline)}

TOKEN = "probe, class token"
CLIP_32, CONTROL_32, SUPERCLIP_32 = [f"{model}, mixed, 32,000" for model in MODELS]
SHOP_6 = "photographs, 6 epochs"
HEADS = "head for colours", "head for shapes"


def pair_of(row, baseline="CLIP"):
    return f"SuperCLIP, {row}", f"{baseline}, {row}"


QUESTIONS = {
    1: ("colour_shape", SUPERCLIP_32, CLIP_32),
    2: ("colour_shape", SUPERCLIP_32, CONTROL_32),
    3: ("colour_shape", *pair_of("short, 32,000")),
    4: ("colour_shape", *pair_of("short, 32,000", "control")),
    5: ("type", *pair_of(SHOP_6)),
    6: ("colour - shape", *HEADS),
    7: ("colour_shape", *pair_of("long, 32,000")),
    8: ("colour_shape", *pair_of("long, 32,000", "control")),
    9: (TOKEN, *pair_of("mixed, 32,000, again")),
    10: (TOKEN, *pair_of(f"{SHOP_6}, again")),
    11: ("colour_shape", *pair_of(TUNED)),
    12: ("colour_shape", *pair_of(TUNED, "control")),
    13: ("R@10", *pair_of("Flickr8k")),
    14: ("R@10", *pair_of("Flickr8k", "control")),
}
BY_SIGN_FLIP = (11, 12, 13, 14)


def p_of(number):
    """Return the p of the exact sign-flip test of a question."""
    return compare.sign_flip(differences_of(*QUESTIONS[number]))


def holm(ps):
    """Return the questions that hold after Holm's correction at 5 %. ps: {number: p}."""
    found = []
    for number in sorted(ps, key=ps.get):
        if ps[number] > 0.05 / (len(ps) - len(found)):
            break
        found.append(number)
    return found


def holds(number):
    """Return whether the difference of a question holds after the correction."""
    if number in BY_SIGN_FLIP:
        return number in holm({other: p_of(other) for other in BY_SIGN_FLIP})
    middle, half = interval_of(*QUESTIONS[number], questions=6 if number <= 6 else 4)
    return abs(middle) > half


# -----------------------------------------------------------------------------
# Rows of tables. Each function returns the cells that follow the label.

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


def two(score, arm, baseline):
    middle, half = interval_of(score, arm, baseline)
    return [*means(score, baseline, arm), f"{middle:+.1f} ± {half:.1f}"]


def three(score, row):
    """Return the cells of `two` for CLIP and SuperCLIP, and the mean of the control, and SuperCLIP
    minus the control. The first round has no control on photographs, but the second one has."""
    superclip, control = pair_of(row, "control")
    if not values_of(control, score):
        superclip, control = pair_of(f"{row}, again", "control")
    mean_of_control, _, difference = two(score, superclip, control)
    return [*two(score, *pair_of(row)), mean_of_control, difference]


def answer(middle, half, is_significant):
    """Return the answer to a claim. middle, half: the mean difference and half of its interval;
    is_significant: whether this was planned, and holds after the correction."""
    if middle < -half or (is_significant and middle < 0):
        return "against"
    if is_significant:
        return "confirmed"
    return "suggested" if middle > half else "not seen"


def claim(score, row, number=None):
    """number: that of the planned question, or None if this was not planned."""
    pair = pair_of(row)
    ahead = compare.ahead(differences_of(score, *pair))
    is_significant = number is not None and holds(number)
    clip, superclip, lead, *control = three(score, row)
    what = f"{row}: {NAMES.get(score, score)}"
    last = answer(*interval_of(score, *pair), is_significant)
    return [what, clip, superclip, lead, ahead, *control, last]


def planned(number):
    score, arm, baseline = QUESTIONS[number]
    ahead = compare.ahead(differences_of(score, arm, baseline))
    p = "no test" if "photographs" in arm else f"{p_of(number):.4f}"
    return [*comparison(score, arm, baseline), ahead, p, "yes" if holds(number) else "no"]


def cell_of_grid(cell):
    """Return the mean of seeds 0 and 1 for each model."""
    return [f"{grid_of(model)[cell]:.1f}" for model in MODELS]


def text_of_cell(cell):
    share, rate = cell
    return f"{100 * share:.0f} %, {rate}"


def search(model):
    """Return the recipe of a model, the cells with six seeds, and how many of the fifteen cells of
    the grid are within ten points of the best of them, by seeds 0 and 1."""
    cells = search_of(model)
    finals = {cell: mean(scores.values()) for cell, scores in cells.items() if len(scores) == 6}
    best_first = sorted(finals, key=finals.get, reverse=True)
    tried = "; ".join(f"{text_of_cell(cell)}: {finals[cell]:.1f}" for cell in best_first)
    grid = grid_of(model).values()
    near = sum(score >= max(grid) - 10 for score in grid)
    return [text_of_cell(RECIPES[model]), tried, str(near)]


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

DRAWN = [row for row in [*FIRST_ROUND, "long, 32,000"] if "photographs" not in row]
# All arms and baselines that are compared by several scores
ROWS = [*FIRST_ROUND, *SECOND_ROUND, TUNED, "Flickr8k"]
PAIRS = [pair_of(row, model) for row in ROWS for model in ("CLIP", "control")]
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
PAIRS = [pair for pair in PAIRS if runs_of(pair[1])]  # round 1 has no control on photographs

TWO = "CLIP | SuperCLIP | SuperCLIP - CLIP"
CONTROL = "control | SuperCLIP - control"
INTRODUCTION = """`python -m study.plan` writes this page from [runs.jsonl](runs.jsonl).
[results.md](results.md) explains its words, and quotes the tables that the claims need."""
# The time of a step, from docs/speed.md: tiny with the vocabulary of the scenes, and with CLIP's
COST = "time of a step", "1", "1.03, or 1.35", "", "", "", "", "none"
TABLES = {
    f"claim of the paper | measured here | {TWO} | ahead | {CONTROL} | answer": [
        ("better zero-shot classification", claim, "colour_shape", TUNED, 11),
        ("better zero-shot classification", claim, "type", SHOP_6, 5),
        ("better retrieval", claim, "R@1", TUNED),
        ("better retrieval", claim, "R@1", SHOP_6),
        ("better retrieval", claim, "R@10", "Flickr8k", 13),
        ("better in tasks of vision alone", claim, TOKEN, "mixed, 32,000, again", 9),
        ("better in tasks of vision alone", claim, TOKEN, f"{SHOP_6}, again", 10),
        ("gains from raw captions", claim, "colour_shape", "short, 32,000", 3),
        ("gains from raw captions", claim, "R@1", "short, 32,000"),
        ("gains from long, detailed captions", claim, "colour_shape", "long, 32,000", 7),
        ("gains from long, detailed captions", claim, "R@1", "long, 32,000"),
        ("loses less in small batches", claim, "colour_shape", "mixed, 32,000, batch 8 - 32"),
        ("costs next to nothing", lambda: COST),
    ],
    "planned question | baseline | score | mean of the baseline | mean | difference "
    "| ahead | exact p | holds": [
        (f"{number}. {arm}", planned, number) for number, (_, arm, _) in QUESTIONS.items()
    ],
    "warm-up, learning rate | CLIP | control | SuperCLIP": [
        (text_of_cell(cell), cell_of_grid, cell) for cell in grid_of("CLIP")
    ],
    "search | recipe | cells with six seeds | of 15 cells within ten points": [
        (model, search, model) for model in MODELS
    ],
    f"captions, samples | {TWO} | {CONTROL}": [(row, three, "colour_shape", row) for row in DRAWN],
    f"linear probe | CLIP, untrained | {TWO} | {CONTROL}": [
        (f"{token}: {row}", probe, token, row)
        for token in ("class token", "patch mean")
        for row in ("mixed, 32,000, again", TUNED, "long, 32,000", f"{SHOP_6}, again")
    ],
    "comparisons | baseline | score | mean of the baseline | mean | difference": [
        *[(HEADS[0], comparison, score, *HEADS) for score in ("colour", "shape", "colour - shape")],
        *[(pair[0], comparison, score, *pair) for pair in PAIRS for score in scores_of(pair[0])],
    ],
    "learning rates | chosen | tried: mean score": [
        (arm, rates, arm) for arm in ARMS if runs_of(arm) and TUNED not in arm
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
