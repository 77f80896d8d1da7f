"""Does a change help? An experiment is a pair of command lines:

    python -m study.compare --a "train.py --cls_weight 0" --b "train.py" --common "--batch_size 8"
    python -m study.compare --a "train.py" --b "../fork/train.py --my_weight 0.1" --rates
    python -m study.compare --a "train.py" --b "-m study.no_idf" --seeds 5-14
    python -m study.compare --a "train.py --cls_weight 0" --b "train.py" \\
        --common "--train_data 'pets/train-*.tar' --val_data 'pets/val-*.tar' --model tiny"

Both commands train with the same seeds. Each seed has a *world*: built-in scenes that are drawn for
this seed, in a folder where the command then runs. (So paths in its options must be absolute.)
Differences are paired by seed, and their intervals include the draw of the data. A command with
--train_data needs no world. {seed} in its options stands for the seed.

With --rates other seeds choose the learning rate of each command that names none. They try half,
once and twice the default rate. While the best rate is the lowest or the highest one, they try one
rate beyond it. A rate is good if its score is within a point of the best one. The default rate is
taken if it is good, otherwise the lowest good rate. The score is the mean of all scores, or the one
that --by names.

The number of seeds in which b is ahead stands beside each difference, and the p of the exact
sign-flip test. p counts for one score, which was named before the runs. It does not hold where
seeds share data.

With --probe each scored run also fits a linear classifier on its frozen image tower (`eval.py
probe`). No score of a probe takes part in the choice of a rate.

Finished runs are lines of out_study/runs.jsonl. A run is known by its command, learning rate, seed,
probe and code, which is the text of train.py, of the .py files beside it and in common/, and of the
module, if there is one, with the files beside it. So a comparison that was stopped goes on, and
runs of other code are never reported. Give a file of data another name when it changes. A run that
diverges scores 0.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

import train
from common.checkpoint import DIVERGED
from common.cli import check, make_parser, number, run_command
from common.machine import cores
from common.run_folder import names_of, read_log
from common.scenes import find_or_make_scenes

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out_study")  # worlds and runs
DRAWING = Path("common/scenes.py")  # the file that draws worlds
FACTORS = (1, 0.5, 2)  # times the default rate, which comes first: of equal rates the first wins
PROBE = "probe, "  # how the names of a probe's scores begin
# 95 % of the means of 2, 3, 4 ... differences lie within so many standard errors (Student's t).
QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010,
    2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930,
)  # fmt: skip

# -----------------------------------------------------------------------------
# Commands


def hash_of(files):
    """Return a hash of the text of some files. Kinds of line ends do not matter to it."""
    text = "\0".join(file.read_text("utf-8") for file in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Command(NamedTuple):
    """A command line of this train.py, of a fork's, or of a module that calls it."""

    program: list  # ["train.py"] or ["-m", "study.no_idf"]
    options: list  # words, without the learning rate
    rate: float
    seed: int = 0
    probe: tuple = ()  # two folders of images: to fit a linear probe on, and to test it on

    def at(self, rate, seed=0):
        return self._replace(rate=float(f"{rate:.3g}"), seed=seed)

    def text(self):
        return shlex.join([*self.program, *self.options])

    def facts(self):
        """Return the facts that identify a run."""
        facts = {"command": self.text(), "rate": self.rate, "seed": self.seed}
        return {**facts, "code": self.code(), "probe": [*self.probe]}

    def file(self):
        """Return the file that runs: a train.py, or that of a module."""
        is_module = self.program[0] == "-m"
        return Path(f"{self.program[1].replace('.', '/')}.py" if is_module else self.program[0])

    def project(self):
        """Return the folder of the train.py that trains."""
        return Path() if self.program[0] == "-m" else self.file().parent

    def code(self):
        """Return a hash of train.py with the files beside it and in common/, of the module with the
        files beside it, some of which it imports, and of the file that draws worlds."""
        project = self.project()
        beside = [*project.glob("*.py"), *project.glob("common/*.py")]
        return hash_of({DRAWING, *self.file().parent.glob("*.py"), *beside})

    def folder(self):
        """Return the folder where the command runs: here if it names its data, else its world. The
        world is drawn if it is not there."""
        if "--train_data" in self.text():
            return Path()
        world = OUT / f"world-{self.seed}-{hash_of([DRAWING])}"
        find_or_make_scenes(world / "scenes", seed=self.seed)
        return world

    def words(self, out_dir):
        """Return the arguments of Python. A run validates before its first step and at its end."""
        program = self.program
        if program[0] != "-m":
            program = [str(Path(program[0]).resolve())]
        options = self.with_seed(self.options)
        usual = ["--workers", "0", "--eval_every", str(10**9)]
        last = ["--learning_rate", f"{self.rate:.3g}", "--seed", str(self.seed)]
        return [*program, *usual, *options, *last, "--out_dir", out_dir]

    def probe_words(self, out_dir):
        """Return the arguments of Python that probe the last weights of the run."""
        fit, test = self.with_seed(self.probe)
        program = f"{self.project().resolve()}/eval.py"
        words = [program, "probe", "--checkpoint", f"{out_dir}/last.pt"]
        words += ["--train", fit, "--test", test, "--workers", "0"]
        return [*words, "--json", f"{out_dir}/probe.json"]

    def with_seed(self, words):
        return [word.replace("{seed}", str(self.seed)) for word in words]


def read_command(text, common=""):
    """Return the Command of a command line. common: options that it shares with another one. Its
    learning rate is the one that it names, or the default of this project's train.py."""
    words = shlex.split(f"{text} {common}")
    n = 2 if words[0] == "-m" else 1
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--learning_rate", type=float)
    found, options = parser.parse_known_args(words[n:])
    rate = found.learning_rate
    if rate is None:
        rate = train.make_parser().get_default("learning_rate")
        if any(word.startswith("--init_from") for word in options):
            rate = train.FINE_TUNING_RATE
    return Command(words[:n], options, rate).at(rate)  # rounded, as those that are tried


# -----------------------------------------------------------------------------
# One run

STARTED = []  # processes


def call(words, folder):
    """Run a Python command with one thread, in a folder. Return its last line. Raise InputError if
    the command fails, unless it has diverged."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    command = [sys.executable, *words]
    process = subprocess.Popen(command, cwd=folder, env=variables, text=True, **pipes)
    STARTED.append(process)
    output, _ = process.communicate()
    last_line = output.strip().rpartition("\n")[2]
    is_right = process.returncode == 0 or DIVERGED in last_line
    check(is_right, f"{shlex.join(words)}: exit code {process.returncode}: {last_line}")
    return last_line


def train_and_score(command):
    """Run a command. Return a run, a dict: what was run, scores, seconds of training, and what the
    log says of the machine. A run that has diverged has no scores."""
    facts = command.facts()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="run-", dir=OUT.resolve()) as out_dir:
        last_line = call(command.words(out_dir), command.folder())
        seconds = round(time.perf_counter() - start, 1)
        header, rows = read_log(f"{out_dir}/log.jsonl")
        scores = {}
        if DIVERGED not in last_line:
            scores = scores_of(rows[-1])  # a run ends with a validation
            check(scores, f"{command.text()} has no score. Add --val_data or --zeroshot_data.")
            if command.probe:
                call(command.probe_words(out_dir), command.folder())
                found = json.loads(Path(out_dir, "probe.json").read_text())
                scores |= {PROBE + name: score for name, score in found.items()}
    machine = {name: header[name] for name in ("device", "dtype", "torch", "commit", "date")}
    return {**facts, "scores": scores, "seconds": seconds, **machine}


def scores_of(row):
    """Return the scores of a validation, a row of a log, by name. R@k is the mean of both ways."""
    scores = {name: row["zeroshot"][folder] for folder, name in names_of(row["zeroshot"]).items()}
    ways = row.get("validation", {})
    for name, score in ways.get("image_to_text", {}).items():
        value = mean(way[name]["value"] for way in ways.values())
        scores[name] = {"value": value, "chance": score["chance"]}
    return scores


# -----------------------------------------------------------------------------
# Many runs


def key_of(facts):
    """Return the key of a run. facts: of a command, or of a run. Old runs have no entry `probe`."""
    names = ("command", "rate", "seed", "code")
    return (*(facts[name] for name in names), *facts.get("probe", ()))


def runs_of(commands, jobs):
    """Return the runs of commands, in their order. First run those that out_study/runs.jsonl lacks,
    `jobs` at a time, and add each one to that file as it ends."""
    OUT.mkdir(exist_ok=True)
    path = OUT / "runs.jsonl"
    path.touch()
    found = {key_of(run): run for run in map(json.loads, open(path))}
    keys = [key_of(command.facts()) for command in commands]
    todo = [command for command, key in zip(commands, keys) if key not in found]
    for command in todo:  # draw each world now, because two runs could draw it at once
        command.folder()
    pool = ThreadPool(jobs)
    try:
        for n, run in enumerate(pool.imap_unordered(train_and_score, todo), 1):
            found[key_of(run)] = run
            with open(path, "a") as file:
                file.write(json.dumps(run) + "\n")
            what = f"{run['command']}, rate {run['rate']}, seed {run['seed']}"
            check(key_of(run) in keys, f"{what}: the code has changed. Start again.")
            print(f"{n} of {len(todo)}: {what}: {goal(run):.1f} %, {run['seconds']} s")
    finally:  # stop what is left, also after a failure or a signal
        pool.terminate()  # runs that have not begun
        for process in STARTED:  # nothing happens to those that have ended
            process.terminate()
        pool.join()
    return [found[key] for key in keys]


# -----------------------------------------------------------------------------
# Scores, in percent


def value_of(run, name):
    """Return a score of a run in percent, or 0 if the run has diverged."""
    scores = run["scores"]
    if not scores:
        return 0.0
    check(name in scores, f"a run of {run['command']} has no score {name}")
    return 100 * scores[name]["value"]


def goal(run, name=None):
    """Return the score that a learning rate is judged by: the one with this name, or the mean of
    all but those of a probe."""
    if name is not None:
        return value_of(run, name)
    values = [value_of(run, name) for name in run["scores"] if not name.startswith(PROBE)]
    return mean(values or [0.0])


def choose(goals, default):
    """Return the default rate if its score is within a point of the best one, else the lowest rate
    whose score is. goals: {rate: score}."""
    good = [rate for rate, value in goals.items() if value >= max(goals.values()) - 1]
    return default if default in good else min(good)


def text_of(goals):
    return ", ".join(f"{rate:.3g}: {goals[rate]:.1f}" for rate in sorted(goals))


def interval(differences, quantile=None, overlap=0.0):
    """Return the mean of some differences, one for each seed, and half of its interval. quantile:
    that of Student's t, by default for 95 %; overlap: what is added to 1/n if seeds share data."""
    n = len(differences)
    quantile = quantile or QUANTILES[n - 2]
    return mean(differences), quantile * stdev(differences) * (1 / n + overlap) ** 0.5


def ahead(differences):
    """Return in how many of the seeds the difference is above 0, as "13 of 15"."""
    return f"{sum(difference > 0 for difference in differences)} of {len(differences)}"


def sign_flip(differences):
    """Return the p of the exact sign-flip test of some differences, one for each seed.

    If both sides were equally good, each difference could as well have the other sign. p is the
    share of all patterns of signs whose mean is at least as far from 0 as the one that was seen.
    """
    sums = torch.zeros(1, dtype=torch.float64)
    for difference in differences:
        sums = torch.cat([sums + difference, sums - difference])
    means = sums.abs() / len(differences)
    is_as_far = means >= abs(mean(differences)) - 1e-9
    return is_as_far.double().mean().item()


# -----------------------------------------------------------------------------
# The command


def best_rate(command, seeds, score, jobs):
    """Return the command at the learning rate that these seeds choose by a score, or by the mean of
    all scores if that is None."""
    rates = [command.rate * factor for factor in FACTORS]
    found = {}  # {rate: list of what its runs are judged by}
    while rates:
        tasks = [command.at(rate, seed) for rate in rates for seed in seeds]
        for task, run in zip(tasks, runs_of(tasks, jobs)):
            found.setdefault(task.rate, []).append(goal(run, score))
        goals = {rate: mean(values) for rate, values in found.items()}
        best = max(goals, key=goals.get)
        rates = {min(goals): [best / 2], max(goals): [best * 2]}.get(best, [])
    print(f"{command.text()}, rates tried: {text_of(goals)}")
    return command.at(choose(goals, command.rate))


def print_scores(a, b):
    """Print each score of two lists of runs, which have the same seeds."""
    print("\nin percent: a -> b, b - a with its 95 % interval, seeds in which b is ahead, exact p")
    print("p counts for one score that was named before the runs, if no seeds share data.\n")
    scores = max((run["scores"] for run in a + b), key=len)  # of a run that has not diverged
    width = max(map(len, scores), default=0) + 2
    for name, score in scores.items():
        first, second = [[value_of(run, name) for run in runs] for runs in (a, b)]
        differences = [y - x for x, y in zip(first, second)]
        middle, half = interval(differences)
        values = f"{mean(first):.1f} -> {mean(second):.1f}, {middle:+.1f} ± {half:.1f}"
        test = f"{ahead(differences)}, p {sign_flip(differences):.4f}"
        print(f"{name:{width}s}{values:30s}{test:22s}chance {100 * score['chance']:.1f}")


def seeds(text):
    """Return range(15, 30) for "15-29". A type for argparse."""
    first, _, last = text.partition("-")
    return range(int(first), int(last) + 1)


def read_options(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--a", required=True, metavar="COMMAND", help='such as "train.py --cls_weight 0"')
    add("--b", required=True, metavar="COMMAND", help='such as "../fork/train.py"')
    add("--common", default="", metavar="OPTIONS", help="options of both commands")
    which = dict(type=seeds, metavar="FIRST-LAST")
    # Eight seeds, because with five p cannot be below 0.0625.
    add("--seeds", default=range(5, 13), help="seeds that are scored (default 5-12)", **which)
    text = "seeds that choose the learning rate of a command that names none (without a value: 0-4)"
    add("--rates", nargs="?", default=(), const=range(5), help=text, **which)
    text = "score that chooses the rates, such as colour_shape (default: the mean of all)"
    add("--by", metavar="SCORE", help=text)
    text = "linear probe of the image tower: folders with a folder of images per class"
    add("--probe", nargs=2, default=(), metavar=("FIT", "TEST"), help=text)
    jobs = 1 if torch.cuda.is_available() else cores()
    text = "runs at a time (default: the cores, or 1 if there is a GPU)"
    add("--jobs", type=number(int, 1), default=jobs, help=text)
    args = parser.parse_args(argv)
    check(2 <= len(args.seeds) <= 20, "--seeds: give 2 to 20 seeds")
    check(not {*args.seeds} & {*args.rates}, "--seeds and --rates have a seed in common")
    return args


def main(argv):
    args = read_options(argv)
    sides = []
    for text in (args.a, args.b):
        command = read_command(text, args.common)
        if args.rates and "--learning_rate" not in f"{text} {args.common}":
            command = best_rate(command, args.rates, args.by, args.jobs)
        sides.append(command._replace(probe=tuple(args.probe)))
    tasks = [command.at(command.rate, seed) for seed in args.seeds for command in sides]
    runs = runs_of(tasks, args.jobs)  # a, b, a, b ...
    for command in sides:
        print(f"\n{command.text()}, at a learning rate of {command.rate:.3g}")
    print_scores(runs[::2], runs[1::2])


if __name__ == "__main__":
    run_command(main)
