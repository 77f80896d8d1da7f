"""Compare two commands over several seeds:

    python -m study.compare --a "train.py --cls_weight 0" --b "train.py"
    python -m study.compare --a "train.py" --b "../fork/train.py --cls_weight 3" --seeds 5-14
    python -m study.compare --a "train.py" --b "-m study.shuffled"

Both train with the same seeds. For each score the command prints both means, the mean difference
with its 95 % confidence interval, the number of seeds in which b is ahead, and the p of the exact
sign-flip test. p counts for one score, which was named before the runs. A run whose loss becomes
infinite or NaN has diverged, and its scores count as 0.

Each seed has other built-in scenes, which are drawn for it, so the interval includes the luck of
the data. The command runs in their folder, so paths in its options must be absolute. A command with
--train_data runs here, and has the same pairs with each seed. Then interval and p hold only for
these pairs.

Finished runs are lines of out_study/runs.jsonl, so a comparison that was stopped goes on. A run is
known by its command, its seed, the text of its code, and the machine: the kind of device, the
default dtype, and the version of torch. So runs of other code or of another machine are never
reported. Give a file of data another name when it changes.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import mean, stdev

import torch

from common.cli import check, make_parser, number, run_command
from common.devices import pick_dtype
from common.processes import cores
from common.run import read_log
from common.scenes import VERSION, find_or_make_scenes
from scripts.curves import names_of

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out_study")  # finished runs, and the scenes of each seed
OTHERS = ("tests", "docs", "scripts", "study")  # folders whose code changes no training

# -----------------------------------------------------------------------------
# One run. A command is a text, such as "train.py --cls_weight 0" or "-m study.shuffled"


def split(command):
    """Return the program of a command and its options, two lists of words."""
    words = shlex.split(command)
    n = 2 if words[:1] == ["-m"] else 1
    check(len(words) >= n, f'"{command}" names no program')
    return words[:n], words[n:]


def code_in(folder):
    """Return the Python files in a folder and in the folders below it, except OTHERS, hidden
    folders, and virtual environments."""
    files = [*folder.glob("*.py")]
    for path in folder.glob("[!.]*/"):
        if path.name not in OTHERS and not (path / "pyvenv.cfg").exists():
            files += path.rglob("*.py")
    return files


def code_of(command):
    """Return a hash of the code of a command: the code around its program, our code, and what lies
    beside the module of -m."""
    program, _ = split(command)
    if program[0] == "-m":
        module = Path(ROOT, program[1].replace(".", "/"))
        files = [*module.parent.glob("*.py")]
    else:
        files = code_in(Path(program[0]).resolve().parent)
    digest = hashlib.sha256()
    for file in sorted({*files, *code_in(ROOT)}):
        digest.update(file.read_text("utf-8").encode())  # kinds of line ends do not matter
    return digest.hexdigest()[:8]


def machine():
    """Return a text that says on what this machine computes. Other machines round differently, so
    the same run ends with other scores there."""
    # pick_device would not do, because it fails on a GPU that is too old for this torch. The
    # commands may name the CPU.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {pick_dtype(device)}, torch {torch.__version__}"


def folder_of(command, seed):
    """Return the folder in which a command runs: this one if the command names its data, else one
    with the scenes of the seed, which are drawn if they are not there."""
    if "--train_data" in command:
        return Path()
    folder = OUT / f"world-{seed}-{VERSION}"
    find_or_make_scenes(folder / "scenes", seed=seed)
    return folder


def start(task):
    """Start a training. task: (command, seed, code). Return its process, and its folder."""
    command, seed, _ = task
    program, options = split(command)
    if program[0] != "-m":
        program = [str(Path(program[0]).resolve())]
    # Validate before the first step and at the end only. The scenes load fast enough for one core.
    usual = ["--workers", "0", "--eval_every", str(10**9)]
    folder = tempfile.TemporaryDirectory(prefix="run-", dir=OUT.resolve())
    last = ["--seed", str(seed), "--out_dir", folder.name]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(f"{folder.name}/output.txt", "w") as output:
        process = subprocess.Popen(
            [sys.executable, *program, *usual, *options, *last],
            cwd=folder_of(command, seed),
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return process, folder


def result_of(task, process, folder):
    """Return the run of a training that has ended, as a dict: the task, the machine, the scores,
    and the conditions of the run from its log. A run that has diverged has no scores. Raise
    InputError if the training failed for another reason."""
    command, seed, code = task
    output = Path(folder.name, "output.txt").read_text("utf-8", errors="replace")
    last_line = output.strip().rpartition("\n")[2]
    has_diverged = process.returncode != 0 and "not finite" in last_line
    check(process.returncode == 0 or has_diverged, f"{command}, seed {seed}: {last_line}")
    check(code_of(command) == code, f"the code of {command} has changed meanwhile. Start again.")
    header, rows = read_log(f"{folder.name}/log.jsonl")
    scores = {}
    if not has_diverged:
        scores = scores_of(rows[-1])  # the last row is a validation
        check(scores, f"{command} has no score. Add --val_data or --zeroshot_data.")
    facts = {name: header[name] for name in ("device", "dtype", "torch", "commit", "date")}
    known_by = {"command": command, "seed": seed, "code": code, "machine": machine()}
    return {**known_by, "scores": scores, **facts}


def scores_of(row):
    """Return the scores of a validation, a row of a log, by name. R@k is the mean of both ways."""
    scores = {name: row["zeroshot"][folder] for folder, name in names_of(row["zeroshot"]).items()}
    ways = row.get("validation", {})
    for name, score in ways.get("image_to_text", {}).items():
        value = mean(way[name]["value"] for way in ways.values())
        scores[name] = {"value": value, "chance": score["chance"]}
    return scores


def runs_of(tasks, jobs):
    """Return the runs of tasks, in their order. First make those that out_study/runs.jsonl lacks,
    `jobs` at a time, and add each one to that file as it ends. If one fails, or the user presses
    Ctrl-C, end the others."""
    OUT.mkdir(exist_ok=True)
    path = OUT / "runs.jsonl"
    path.touch()
    text = path.read_text("utf-8", errors="replace")
    if text and not text.endswith("\n"):  # A full disk has cut the last line.
        with open(path, "a") as file:
            file.write("\n")
    here = machine()
    found = {}
    for line in text.splitlines():
        with suppress(ValueError):  # skip a line that was cut
            run = json.loads(line)
            if run.get("machine") == here:  # older lines name no machine
                found[run["command"], run["seed"], run["code"]] = run
    todo = [task for task in dict.fromkeys(tasks) if task not in found]
    running = {}  # task: its process and its folder
    try:
        while todo or running:
            while todo and len(running) < jobs:
                task = todo.pop(0)
                running[task] = start(task)
            time.sleep(0.1)
            ended = [task for task, (process, _) in running.items() if process.poll() is not None]
            for task in ended:
                process, folder = running.pop(task)
                with folder:  # which is removed at the end
                    run = result_of(task, process, folder)
                found[task] = run
                with open(path, "a") as file:
                    file.write(json.dumps(run) + "\n")
                how = "trained" if run["scores"] else "diverged"
                left = len(todo) + len(running)
                print(f"{how}: {run['command']}, seed {run['seed']} ({left} left)")
    finally:
        for process, folder in running.values():
            process.kill()
            process.wait()
            folder.cleanup()
    return [found[task] for task in tasks]


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


def ahead(differences):
    """Return in how many of the seeds the difference is above 0, as "13 of 15"."""
    return f"{sum(difference > 0 for difference in differences)} of {len(differences)}"


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


def value_of(run, name):
    """Return a score of a run in percent, or 0 if the run has diverged."""
    return 100 * run["scores"][name]["value"] if run["scores"] else 0.0


def print_scores(a, b):
    """Print a table of the scores of two lists of runs, which have the same seeds."""
    print("\nin percent          a       b     b - a, 95 %     b ahead  exact p  chance")
    scores = max((run["scores"] for run in a + b), key=len)  # of a run that has not diverged
    for name, score in scores.items():
        if any(run["scores"] and name not in run["scores"] for run in a + b):
            continue  # a score that one side alone has, such as that of a fork
        first = [value_of(run, name) for run in a]
        second = [value_of(run, name) for run in b]
        differences = [y - x for x, y in zip(first, second)]
        middle, half = interval(differences)
        print(
            f"{name:14s}"
            f"{mean(first):7.1f} {mean(second):7.1f}"
            f"  {middle:+6.1f} ± {half:4.1f}"
            f"  {ahead(differences):>10s}"
            f"  {sign_flip(differences):7.4f}"
            f"  {100 * score['chance']:6.1f}"
        )
    for side, runs in (("a", a), ("b", b)):
        diverged = [str(run["seed"]) for run in runs if not run["scores"]]
        if diverged:
            print(f"{side} has diverged with the seeds {', '.join(diverged)}. They count as 0.")


def seeds(text):
    """Return range(15, 30) for "15-29". A type for argparse."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--a", required=True, metavar="COMMAND", help='such as "train.py --cls_weight 0"')
    add("--b", required=True, metavar="COMMAND", help='such as "../fork/train.py"')
    # Eight seeds, because with five p cannot be below 0.0625.
    text = "seeds of both commands, 2 to 20 of them (default 5-12)"
    add("--seeds", type=seeds, default=range(5, 13), metavar="FIRST-LAST", help=text)
    jobs = 1 if torch.cuda.is_available() else cores()
    text = "runs at a time (default: the cores, or 1 if there is a GPU)"
    add("--jobs", type=number(int, 1), default=jobs, help=text)
    args = parser.parse_args(argv)
    # Let a scheduler that ends this command end its trainings, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    check(2 <= len(args.seeds) <= 20, "--seeds: give 2 to 20 seeds")
    sides = [(command, code_of(command)) for command in (args.a, args.b)]
    tasks = [(command, seed, code) for seed in args.seeds for command, code in sides]
    runs = runs_of(tasks, args.jobs)  # a, b, a, b ...
    print_scores(runs[::2], runs[1::2])


if __name__ == "__main__":
    run_command(main)
