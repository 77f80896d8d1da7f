"""Make the runs of the third round, whose rules are in plan.py:

    python -m study.recipes --flickr8k DIR

First each model searches its recipe, which is the warm-up and the learning rate. Fresh seeds score
the three recipes. Then the three models train on the captions of Flickr8k. The runs are added to
out_study/runs.jsonl as they end. Repeat the command to go on with runs that were stopped.

DIR holds train-00000.tar to train-00005.tar, with 1,000 photographs each, and dev-00000.tar with
1,000 more. Each photograph has a list of five captions, json.captions.
"""

import math
import os
from pathlib import Path
from statistics import mean

from common.cli import make_parser, number, run_command
from common.machine import cores
from scripts import vocab
from study import compare

# The grid. The middle of both is what train.py does.
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # warm-up
RATES = (2.5e-4, 5e-4, 1e-3)
MODELS = {"CLIP": "--cls_weight 0", "control": "--shuffled", "SuperCLIP": ""}
FIRST_SEEDS = (0, 1)  # for all cells of the grid
MORE_SEEDS = (2, 3, 4, 5)  # for the four best cells of a model
FRESH_SEEDS = range(30, 45)
PROBE = ("scenes/zeroshot/colour_shape", "scenes/zeroshot/held_out")  # fit on, test on

# A link to DIR, so that a run's command names no folder of one machine
FLICKR8K = Path("out_study/flickr8k")
VOCABULARY = Path("out_study/flickr8k.tiktoken")
FLICKR8K_MODELS = {
    "CLIP": "train.py --cls_weight 0",
    "control": "-m study.shuffled",
    "SuperCLIP": "train.py",
}
EPOCHS = (5, 10, 15)
FLICKR8K_SEEDS = range(30, 40)

# -----------------------------------------------------------------------------
# The search. means: {(share, rate): mean score of a cell}, of one model


def command(model, share):
    return f"-m study.warmup --share {share} {MODELS[model]}".strip()


def best_cells(means):
    """Return the cells, the best one first. Of equal ones, the first is closer to train.py's."""

    def order(cell):
        share, rate = cell
        steps_away = abs(share - 0.5) / 0.2 + abs(math.log2(rate / 5e-4))
        return -round(means[cell], 6), round(steps_away), rate, share

    return sorted(means, key=order)


def rate_beyond(means):
    """Return the learning rate to try beyond the grid, or None if the best cell is not at the
    lowest or the highest one."""
    _, rate = best_cells(means)[0]
    return {RATES[0]: RATES[0] / 2, RATES[-1]: RATES[-1] * 2}.get(rate)


def means_of(runs):
    """Return the mean score of each cell. runs: {(share, rate): list of runs}"""
    return {
        cell: mean(compare.value_of(run, "colour_shape") for run in found)
        for cell, found in runs.items()
    }


def search(jobs):
    """Return the recipe of each model, {model: (share, rate)}."""
    cells = [(share, rate) for share in SHARES for rate in RATES]
    runs = {model: {} for model in MODELS}

    def add(tasks):
        """Run tasks (model, cell, seed), and add them to `runs`."""
        commands = [
            compare.read_command(command(model, share)).at(rate, seed)
            for model, (share, rate), seed in tasks
        ]
        for (model, cell, _), run in zip(tasks, compare.runs_of(commands, jobs)):
            runs[model].setdefault(cell, []).append(run)

    add([(model, cell, seed) for seed in FIRST_SEEDS for cell in cells for model in MODELS])
    extra = []
    for model in MODELS:
        rate = rate_beyond(means_of(runs[model]))
        if rate is not None:
            extra += [(model, (share, rate), seed) for share in SHARES for seed in FIRST_SEEDS]
    add(extra)
    best = {model: best_cells(means_of(runs[model]))[:4] for model in MODELS}
    add([(model, cell, seed) for model in MODELS for cell in best[model] for seed in MORE_SEEDS])
    recipes = {}
    for model in MODELS:
        means = means_of({cell: runs[model][cell] for cell in best[model]})
        recipes[model] = best_cells(means)[0]
        print(f"{model}: {recipes[model]} of {means}")
    return recipes


def score_recipes(recipes, jobs):
    tasks = []
    for seed in FRESH_SEEDS:
        for model, (share, rate) in recipes.items():
            task = compare.read_command(command(model, share)).at(rate, seed)
            tasks.append(task._replace(probe=PROBE))
    compare.runs_of(tasks, jobs)


# -----------------------------------------------------------------------------
# Captions that people wrote


def flickr8k_command(model, train, val, epochs):
    """train, val: the shards to train on and to validate on, without the folder."""
    text = f"{FLICKR8K_MODELS[model]} --train_data {FLICKR8K}/{train} --val_data {FLICKR8K}/{val}"
    text += f" --captions json.captions --vocab {VOCABULARY} --model tiny --batch_size 32"
    return compare.read_command(text, f"--epochs {epochs}")


def run_flickr8k(jobs):
    # 1. How long? 2. At which rates? The pictures that score take no part.
    choose = "train-{00000..00004}.tar", "train-00005.tar"
    lengths = [flickr8k_command("CLIP", *choose, epochs) for epochs in EPOCHS]
    tasks = [length.at(5e-4, seed) for length in lengths for seed in FIRST_SEEDS]
    found = compare.runs_of(tasks, jobs)
    scores = [compare.value_of(run, "R@10") for run in found]
    goals = [mean(scores[i : i + 2]) for i in range(0, len(scores), 2)]
    epochs = EPOCHS[goals.index(max(goals))]  # of equal ones the shortest
    print(f"Flickr8k: {epochs} epochs of {dict(zip(EPOCHS, goals))}")
    rates = {}
    for model in FLICKR8K_MODELS:
        length = flickr8k_command(model, *choose, epochs)
        rates[model] = compare.best_rate(length, FIRST_SEEDS, "R@10", jobs).rate
    # 3. The scores
    tasks = []
    for seed in FLICKR8K_SEEDS:
        for model, rate in rates.items():
            scored = flickr8k_command(model, "train-*.tar", "dev-00000.tar", epochs)
            tasks.append(scored.at(rate, seed))
    compare.runs_of(tasks, jobs)


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--flickr8k", required=True, metavar="DIR", help="folder of the shards")
    add("--jobs", type=number(int, 1), default=cores(), help="runs at a time (default: the cores)")
    args = parser.parse_args(argv)
    FLICKR8K.parent.mkdir(exist_ok=True)
    if not FLICKR8K.exists():
        os.symlink(Path(args.flickr8k).resolve(), FLICKR8K)
        vocab.main([f"{FLICKR8K}/train-*.tar", "--captions", "json.captions", "--size", "3000",
                    "--out", str(VOCABULARY)])  # fmt: skip
    score_recipes(search(args.jobs), args.jobs)
    run_flickr8k(args.jobs)


if __name__ == "__main__":
    run_command(main)
