"""Print the tables of results.md as Markdown, from runs.jsonl: python -m study.claims

There were three rounds of runs, each at one commit. The same command has other scores in another
round, because rounding differs, so no difference pairs runs of two rounds.

The answer to a claim is the first of these that fits. *Against*: the 95 % interval of SuperCLIP -
CLIP lies below 0. *Confirmed*: we planned the question before its runs, and SuperCLIP's lead is
significant after the correction for several questions. *Suggested*: the interval lies above 0. *Not
seen*: everything else.
"""

import json
from pathlib import Path
from statistics import mean, stdev

from common.cli import make_parser, run_command
from study.compare import QUANTILES, ahead, sign_flip

RUNS = [json.loads(line) for line in open(Path(__file__).with_name("runs.jsonl"))]
FIRST_SCORED = 15  # the seeds before it have chosen learning rates and warm-ups

# -----------------------------------------------------------------------------
# What was compared. An arm is the commit of a round and a command. If a second command follows, the
# score of its runs is subtracted.

FIRST, SECOND, THIRD = "a9a4f28", "d7f258b", "43e1f26"
MODELS = ("train.py --cls_weight 0", "-m study.shuffled", "train.py")
SHOP = """--train_data 'out_study/shop/{seed}/train-*.tar' \
--val_data 'out_study/shop/{seed}/val-*.tar' --zeroshot_data 'out_study/shop/{seed}/type' \
--model tiny --batch_size 32 --epochs"""
FLICKR8K = """--train_data 'out_study/flickr8k/train-*.tar' \
--val_data out_study/flickr8k/dev-00000.tar --captions json.captions \
--vocab out_study/flickr8k.tiktoken --model tiny --batch_size 32 --epochs 15"""


def arms(commit, options=""):
    """Return the arms CLIP, control and SuperCLIP with these options."""
    return [(commit, f"{model} {options}".strip()) for model in MODELS]


# Each model has the warm-up and the learning rate that its own search has found. These commands are
# older than --warmup_steps. study.warmup, which is gone, did what this option does now.
WARMUP = "-m study.warmup --share 0.7"
TUNED = [(THIRD, f"{WARMUP}{option}") for option in (" --cls_weight 0", " --shuffled", "")]
MIXED, MIXED_AGAIN = arms(FIRST), arms(SECOND)
MIXED_24, MIXED_48 = arms(FIRST, "--epochs 1.2"), arms(FIRST, "--epochs 2.4")
SHORT, LONG = arms(FIRST, "--captions json.short"), arms(SECOND, "--captions json.long")
BATCH_8 = arms(FIRST, "--batch_size 8 --epochs 1.6")
BATCHES = [(*arm, model) for arm, model in zip(BATCH_8, MODELS)]
PHOTOS_3, PHOTOS_6 = arms(FIRST, f"{SHOP} 3"), arms(FIRST, f"{SHOP} 6")
PHOTOS_AGAIN = arms(SECOND, f"{SHOP} 6")
# The first round has no control on photos. That of the second round is compared with the SuperCLIP
# of the second round, the fourth arm.
PHOTOS = [PHOTOS_6[0], PHOTOS_AGAIN[1], PHOTOS_6[2], PHOTOS_AGAIN[2]]
LONG_LABELS = (FIRST, "train.py --captions json.short --label_captions json.long")
NO_IDF, LAMBDA_3 = (FIRST, "-m study.no_idf"), (FIRST, "train.py --cls_weight 3")
YES_NO = (SECOND, "-m study.yes_no --cls_weight 1")
HEADS = [
    (FIRST, f"-m study.some_words --hears {kind} --epochs 1.2") for kind in ("shapes", "colours")
]

OBJECTS, PROBE = "colour_shape", "probe, class token"
ZERO_SHOT = "zero-shot accuracy (64 objects)"  # what pages call OBJECTS
TYPES = "zero-shot accuracy (10 types)"
# The paper's claim, what we measured, its score, the arms, and whether the question was planned
CLAIMS = [
    ("better zero-shot classification", f"{ZERO_SHOT}, equally tuned", OBJECTS, TUNED, True),
    ("", f"{TYPES}, product photos", "type", PHOTOS, True),
    ("better retrieval", "R@1, scenes, equally tuned", "R@1", TUNED, False),
    ("", "R@1, product photos", "R@1", PHOTOS, False),
    ("", "R@10, Flickr8k", "R@10", arms(THIRD, FLICKR8K), True),
    ("better in vision alone", "linear probe, scenes", PROBE, MIXED_AGAIN, True),
    ("", "linear probe, product photos", PROBE, PHOTOS_AGAIN, True),
    ("gains from raw captions", f"{ZERO_SHOT}, short captions", OBJECTS, SHORT, True),
    ("", "R@1, scenes, short captions", "R@1", SHORT, False),
    ("gains from long captions", f"{ZERO_SHOT}, long captions", OBJECTS, LONG, True),
    ("", "R@1, scenes, long captions", "R@1", LONG, False),
    ("loses less in small batches", f"{ZERO_SHOT}, batch 8 minus 32", OBJECTS, BATCHES, False),
]
# Names of A and B, what we measured, its score, the arms A and B. Only HEADS was planned.
OTHERS = [
    ("CLIP, 24,000 samples", "SuperCLIP", ZERO_SHOT, OBJECTS, MIXED_24[0], MIXED_24[2]),
    ("CLIP, 48,000 samples", "SuperCLIP", ZERO_SHOT, OBJECTS, MIXED_48[0], MIXED_48[2]),
    ("CLIP, 48,000 samples", "SuperCLIP, 32,000", ZERO_SHOT, OBJECTS, MIXED_48[0], MIXED[2]),
    ("control, 48,000 samples", "SuperCLIP", "R@1", "R@1", MIXED_48[1], MIXED_48[2]),
    ("CLIP, own recipe", "SuperCLIP", "linear probe, scenes", PROBE, TUNED[0], TUNED[2]),
    ("CLIP, photos, 3 epochs", "SuperCLIP", TYPES, "type", PHOTOS_3[0], PHOTOS_3[2]),
    ("CLIP, photos, 3 epochs", "SuperCLIP", "R@5", "R@5", PHOTOS_3[0], PHOTOS_3[2]),
    ("SuperCLIP, short captions", "head with long ones", ZERO_SHOT, OBJECTS, SHORT[2], LONG_LABELS),
    ("SuperCLIP", "without IDF", ZERO_SHOT, OBJECTS, MIXED[2], NO_IDF),
    ("SuperCLIP", "with `--cls_weight 3`", ZERO_SHOT, OBJECTS, MIXED[2], LAMBDA_3),
    ("SuperCLIP", "with a yes/no head", ZERO_SHOT, OBJECTS, MIXED_AGAIN[2], YES_NO),
    ("head for shapes", "head for colours", "colours - shapes", "colour - shape", *HEADS),
]

# -----------------------------------------------------------------------------
# Differences

# Splits of the product photos share pairs, so their variance is larger (Nadeau and Bengio), by the
# pairs validated on over those trained on.
OVERLAP = 2_000 / 24_000
# Student's t after Bonferroni's correction, by round and number of seeds. The first round had six
# questions, and the second one four.
CORRECTED = {(FIRST, 10): 3.36, (FIRST, 15): 3.07, (SECOND, 10): 3.111, (SECOND, 15): 2.864}


def values_of(arm, score):
    """Return {seed: score in percent} of the scored runs of an arm. The score "a - b" is the score
    a minus the score b."""
    commit, command, *minus = arm
    if minus:
        return differences_of(score, (commit, *minus), (commit, command))
    values = {}
    for run in RUNS:
        if (run["commit"], run["command"]) == (commit, command) and run["seed"] >= FIRST_SCORED:
            a, *b = [100 * run["scores"][name]["value"] for name in score.split(" - ")]
            values[run["seed"]] = a - sum(b)
    return values


def differences_of(score, baseline, arm):
    """Return {seed: score of the arm - score of the baseline}, for the seeds that both have."""
    a, b = values_of(baseline, score), values_of(arm, score)
    return {seed: b[seed] - a[seed] for seed in a.keys() & b.keys()}


def compare(score, baseline, arm):
    """Compare two arms over the seeds that both have. Return the cells of a table (both means, the
    difference, the seeds ahead), the mean difference, half of its 95 % interval, and whether it is
    significant after the correction for the planned questions of the round.

    The third round had four questions, the exact sign-flip test and Holm's correction. None of its
    p lies between 0.05 / 4 and 0.05, so Bonferroni's correction gives the same answers.
    """
    by_seed = differences_of(score, baseline, arm)
    differences = list(by_seed.values())
    n = len(differences)
    middle = mean(differences)
    overlap = OVERLAP if SHOP in arm[1] else 0.0
    error = stdev(differences) * (1 / n + overlap) ** 0.5
    half = QUANTILES[n - 2] * error
    if arm[0] == THIRD:
        is_significant = sign_flip(differences) < 0.05 / 4
    else:
        is_significant = abs(middle) > CORRECTED[arm[0], n] * error
    both = [values_of(side, score) for side in (baseline, arm)]
    means = [f"{mean(values[seed] for seed in by_seed):.1f}" for values in both]
    cells = [*means, f"{middle:+.1f} ± {half:.1f}", ahead(differences)]
    return cells, middle, half, is_significant


def answer(middle, half, is_confirmed):
    """Return the answer to a claim. middle, half: the mean difference and half of its interval;
    is_confirmed: whether the question was planned, and the difference is significant."""
    if middle < -half:
        return "against"
    if is_confirmed and middle > 0:
        return "confirmed"
    return "suggested" if middle > half else "not seen"


# -----------------------------------------------------------------------------
# Tables


def table(*rows):
    """Return a table in Markdown. rows: lists of cells, that of the head first."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def tables():
    """Return three tables as Markdown: the answers to the claims, the other comparisons, and the
    scores behind the answers."""
    answers = [["the paper's claim", "what we measured", "SuperCLIP - CLIP", "ahead", "answer"]]
    scores = [["what we measured", "CLIP", "control", "SuperCLIP", "SuperCLIP - control"]]
    for claim, measured, score, (clip, control, superclip, *again), is_planned in CLAIMS:
        cells, middle, half, is_significant = compare(score, clip, superclip)
        of_clip, of_superclip, gain, seeds_ahead = cells
        (of_control, _, lead, _), *_ = compare(score, control, *again or [superclip])
        last = answer(middle, half, is_planned and is_significant)
        answers.append([claim, measured, gain, seeds_ahead, last])
        scores.append([measured, of_clip, of_control, of_superclip, lead])
    others = [["A", "B", "what we measured", "mean of A", "mean of B", "B - A", "B ahead"]]
    for a, b, measured, score, *two_arms in OTHERS:
        cells, *_ = compare(score, *two_arms)
        others.append([a, b, measured, *cells])
    return table(*answers), table(*others), table(*scores)


def main(argv):
    make_parser(__doc__).parse_args(argv)
    print("\n\n".join(tables()))


if __name__ == "__main__":
    run_command(main)
