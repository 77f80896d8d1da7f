"""Compare two commands over several seeds:

    python -m study.compare --a "train.py --cls_weight 0" --b "train.py"
    python -m study.compare --a "train.py" --b "../fork/train.py --cls_weight 3" --seeds 5-14
    python -m study.compare --a "train.py" --b "-m study.shuffled"
    python -m study.compare --resume out_study/compare

Both train with the same seeds. For each score the command prints both means, the mean difference
with its 95 % confidence interval, the number of seeds in which b is ahead, and the p of the exact
sign-flip test. p counts for one score, which was named before the runs. A run whose loss becomes
infinite or NaN has diverged, and its scores count as 0.

Each seed has other built-in scenes, which are drawn for it, so the interval includes the luck of
the data. The command runs in their folder, so paths in its options must be absolute. A command with
--train_data runs here, and has the same pairs with each seed. Then interval and p hold only for
these pairs.

The commands must not contain --seed, --eval_every, --out_dir and --resume, which are set here. A
run validates before its first step and after its last one. On a CPU it loads its data itself
(--workers 0), because each core has a run.

A comparison has a folder. There comparison.json has the commands and the seeds, and a-5 is the run
of the first command with seed 5. --resume, typed in the folder where the comparison began, goes on
with one that was stopped. A run that was stopped goes on with the options in its last.pt. So if an
experiment has an option of its own, this must be one of train.OPTIONS, as in study/some_words.py.

Each run reads the code when it starts, so change no code before the comparison has ended. A WARNING
below the table says if runs of one command had different commits, or if any runs had different
devices, dtypes or versions of torch. It does not notice changes that were not committed.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from tqdm import tqdm

from common.cli import (
    check,
    make_parser,
    number,
    progress,
    run_command,
    write_file,
)
from common.processes import cores
from common.run import make_next_folder, names_of, read_log
from common.scenes import VERSION, find_or_make_scenes

ROOT = Path(__file__).parents[1]
OUT = Path("out_study")  # comparisons, and the scenes of each seed

# -----------------------------------------------------------------------------
# Runs


class Run(NamedTuple):
    command: str  # such as "train.py --cls_weight 0" or "-m study.shuffled"
    seed: int
    folder: Path  # has scores.json when the run has finished


def start(run):
    """Start the training of a run, or go on with it. Return its process."""
    words = shlex.split(run.command)
    if words[0] != "-m":
        words[0] = Path(words[0]).resolve()
    if (run.folder / "last.pt").exists():
        program = words[:2] if words[0] == "-m" else words[:1]
        words = [*program, "--resume", run.folder]
    else:
        # Validate before the first step and at the end only.
        words += ["--seed", str(run.seed), "--eval_every", str(10**9), "--out_dir", run.folder]
        if not torch.cuda.is_available() and "--workers" not in run.command:
            words += ["--workers", "0"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path}
    if not torch.cuda.is_available():
        variables["OMP_NUM_THREADS"] = "1"  # because each core has a run
    data_folder = Path()
    if "--train_data" not in run.command:
        # The version is in the name, so that a new version of the scenes is drawn beside the old.
        data_folder = OUT / f"world-{run.seed}-{VERSION}"
        find_or_make_scenes(data_folder / "scenes", seed=run.seed)
    run.folder.mkdir(exist_ok=True)
    with open(run.folder / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=data_folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def finish(run, exit_code):
    """Write the scores of a run that has ended, and remove its checkpoints. A run that has diverged
    has no scores. Raise InputError if the training failed for another reason."""
    output = run.folder / "output.txt"
    last_line = output.read_text("utf-8", errors="replace").strip().rpartition("\n")[2]
    scores = {}
    if exit_code == 0:
        _, rows = read_log(run.folder / "log.jsonl")
        scores = scores_of(rows[-1])  # the last row is a validation
        check(scores, f"{run.command} has no score. Add --val_data or --zeroshot_data.")
    else:
        # Any other message than that of a diverged run is a mistake.
        check("not finite" in last_line, f"{run.command}, seed {run.seed}: {last_line} ({output})")
    write_json(run.folder / "scores.json", scores)
    for checkpoint in run.folder.glob("*.pt"):
        checkpoint.unlink()
    tqdm.write(f"{run.folder.name}: {'trained' if scores else 'diverged'}")


def write_json(path, content):
    write_file(path, lambda file: file.write(json.dumps(content).encode()))


def scores_of(row):
    """Return the scores of a validation, a row of a log, by name. R@k is the mean of both ways."""
    scores = {name: row["zeroshot"][folder] for folder, name in names_of(row["zeroshot"]).items()}
    ways = row.get("validation", {})
    for name, score in ways.get("image_to_text", {}).items():
        value = mean(way[name]["value"] for way in ways.values())
        scores[name] = {"value": value, "chance": score["chance"]}
    return scores


def train(runs, jobs):
    """Train the runs that have not finished, `jobs` at a time. If one fails, or the user presses
    Ctrl-C, end the others."""
    todo = [run for run in runs if not (run.folder / "scores.json").exists()]
    running = {}  # run: its process
    try:
        for _ in progress(range(len(todo)), "training", unit="run"):
            while todo and len(running) < jobs:
                run = todo.pop(0)
                running[run] = start(run)
            run = first_that_ends(running)
            process = running.pop(run)
            finish(run, process.returncode)
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def first_that_ends(running):
    while True:
        for run, process in running.items():
            if process.poll() is not None:
                return run
        time.sleep(0.1)


# -----------------------------------------------------------------------------
# Differences, one for each seed

# 95 % of the means of 2, 3, 4 ... differences lie within so many standard errors (Student's t).
QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010,
    2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930,
)  # fmt: skip


def interval(differences):
    """Return the mean of some differences, and half of its 95 % confidence interval."""
    n = len(differences)
    return mean(differences), QUANTILES[n - 2] * stdev(differences) / n**0.5


def sign_flip(differences):
    """Return the p of the exact sign-flip test.

    If both sides were equally good, each difference could as well have the other sign. p is the
    share of all patterns of signs whose mean is at least as far from 0 as the one that was seen.
    """
    sums = torch.zeros(1, dtype=torch.float64)
    for difference in differences:
        sums = torch.cat([sums + difference, sums - difference])
    is_as_far = sums.abs() >= abs(sum(differences)) - 1e-9
    return is_as_far.double().mean().item()


# -----------------------------------------------------------------------------
# The command


def in_percent(side, name):
    """Return one score of all runs of a side. It is 0 if a run has diverged."""
    return [100 * scores[name]["value"] if scores else 0.0 for scores in side]


def print_scores(a, b):
    """Print a table. a, b: for each command the scores of its runs, with the same seeds."""
    print("\nin percent          a       b     b - a, 95 %     b ahead  exact p  chance")
    names = max(a + b, key=len)  # those of a run that has not diverged
    for name in names:
        if any(scores and name not in scores for scores in a + b):
            continue  # a score that one side alone has, such as that of a fork
        first = in_percent(a, name)
        second = in_percent(b, name)
        differences = [y - x for x, y in zip(first, second)]
        middle, half = interval(differences)
        ahead = sum(difference > 0 for difference in differences)
        print(
            f"{name:14s}"
            f"{mean(first):7.1f} {mean(second):7.1f}"
            f"  {middle:+6.1f} ± {half:4.1f}"
            f"  {f'{ahead} of {len(differences)}':>10s}"
            f"  {sign_flip(differences):7.4f}"
            f"  {100 * names[name]['chance']:6.1f}"
        )


def warn_of_mixture(runs, fact):
    """Warn if runs differ in a fact from the headers of their logs, such as "torch"."""
    found = {}  # value: names of runs
    for run in runs:
        headers, _ = read_log(run.folder / "log.jsonl")  # several, if the run was resumed
        for header in headers:
            found.setdefault(header[fact], set()).add(run.folder.name)
    if len(found) > 1:
        print(f"WARNING: these runs do not have the same {fact}, which may change their scores:")
        for value, names in found.items():
            print(f"  {value}:", *sorted(names))


def seeds(text):
    """Return range(15, 30) for "15-29". A type for argparse."""
    first, last = map(int, text.split("-"))
    numbers = range(first, last + 1)
    check(2 <= len(numbers) <= 20, f"--seeds {text}: give 2 to 20 seeds, such as 5-12")
    return numbers


def check_command(text):
    """Refuse a command without a program, or with an option that `start` adds."""
    words = shlex.split(text)
    has_program = words and (words[0] == "-m" or Path(words[0]).is_file())
    check(has_program, f"there is no such program: {text}")
    for option in ("--seed", "--eval_every", "--out_dir", "--resume"):
        check(option not in words, f"leave out {option}, which is set here: {text}")


def begin(args):
    """Make the folder of a new comparison, write down what it compares, and return the folder."""
    check(args.a and args.b, "give two commands, --a and --b")
    check_command(args.a)
    check_command(args.b)
    # Eight seeds, because with five p cannot be below 0.0625.
    numbers = args.seeds or range(5, 13)
    folder = make_next_folder(OUT / "compare")
    write_json(folder / "comparison.json", {"a": args.a, "b": args.b, "seeds": [*numbers]})
    return folder


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--a", metavar="COMMAND", help='such as "train.py --cls_weight 0"')
    add("--b", metavar="COMMAND", help='such as "../fork/train.py"')
    add("--seeds", type=seeds, metavar="FIRST-LAST", help="2 to 20 seeds (default: 5-12)")
    add("--jobs", type=number(int, 1), help="runs at a time (default: the cores, or 1 on a GPU)")
    add("--resume", metavar="DIR", help="go on with the comparison in this folder")
    args = parser.parse_args(argv)
    if args.resume:
        check(not (args.a or args.b or args.seeds), "give no --a, --b or --seeds with --resume")
        folder = Path(args.resume)
    else:
        folder = begin(args)
    print(f"comparison: {folder}")
    # Let a scheduler that ends this command end its trainings, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    folder = folder.absolute()
    plan = json.loads((folder / "comparison.json").read_text())
    runs = []
    for seed in plan["seeds"]:
        for side in ("a", "b"):
            runs.append(Run(plan[side], seed, folder / f"{side}-{seed}"))
    jobs = args.jobs
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else cores()
    train(runs, jobs)
    scores = [json.loads((run.folder / "scores.json").read_text()) for run in runs]
    print_scores(scores[::2], scores[1::2])
    diverged = [run.folder.name for run, found in zip(runs, scores) if not found]
    if diverged:
        print("These have diverged, and count as 0:", *diverged)
    warn_of_mixture(runs[::2], "commit")
    warn_of_mixture(runs[1::2], "commit")  # b may be a fork, so its commit may be another
    for fact in ("device", "dtype", "torch"):
        warn_of_mixture(runs, fact)


if __name__ == "__main__":
    run_command(main)
