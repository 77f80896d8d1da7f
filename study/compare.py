"""Does a change help? An experiment is a pair of command lines:

    python -m study.compare --a "train.py --cls_weight 0" --b "train.py" --common "--batch_size 8"
    python -m study.compare --a "train.py" --b "../fork/train.py --my_weight 0.1" --rates
    python -m study.compare --a "train.py" --b "-m study.no_idf" --seeds 10
    python -m study.compare --a "train.py --cls_weight 0" --b "train.py" \\
        --common "--train_data 'pets/train-*.tar' --val_data 'pets/val-*.tar' --model tiny"

Both train with the same seeds. Each seed has a *world* of its own, built-in scenes that are drawn
for it, in a folder where the command then runs. (So paths in its options must be absolute.)
Differences are paired by seed, and their intervals include the draw of the data. A command with
--train_data needs no world. {seed} in its options stands for the seed, as in --train_data
'fold{seed}/*.tar', so that data can be split anew for each.

With --rates four learning rates are tried for each side: a quarter, a half, once and twice its own,
which is the one that it names, or the default. Seeds 0 to 4 choose. A side keeps its own rate if
the mean of all scores there is within a point of the best, else it takes the lowest rate that is.
If the best rate is the lowest or the highest one, name it, and search again. What is compared are
the scores of other seeds, 5 and up, so the choice does not flatter them. A run that diverges scores
0.

Finished runs are lines of out_study/runs.jsonl. A run is known by its command, rate, seed and code,
which is the text of train.py and of the .py files beside it, of the module if there is one, and of
scenes.py. So a comparison that was stopped goes on, and runs of other code are never
reported. Give a file of data another name when it changes.
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
from contextlib import suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

import train
from checkpoint import DIVERGED
from cli import InputError, check, cores, make_parser, number, run_command
from log import read_log, short_names
from scenes import make_scenes

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out_study")  # worlds and runs
DRAWING = Path("scenes.py")  # what draws worlds
FIRST_SCORED = 5  # the seeds before it choose learning rates, and are never scored
FACTORS = (0.25, 0.5, 1, 2)
# 95 % of the means of 2, 3, 4 ... differences lie within so many standard errors (Student's t).
QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010,
    2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930,
)  # fmt: skip

# -----------------------------------------------------------------------------
# Commands


def hash_of(files):
    """A hash of what is in some files. Line ends are alike, whatever git has made of them."""
    text = "\0".join(file.read_text("utf-8") for file in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def has_option(words, name):
    return any(word.partition("=")[0] == name for word in words)


class Command(NamedTuple):
    """A command line of this train.py, of a fork's, or of a module that calls it."""

    program: list  # ["train.py"] or ["-m", "study.no_idf"]
    file: Path  # of the program
    options: list  # words, without the learning rate
    rate: float
    seed: int = 0

    def __str__(self):
        return f"{self.text()}, rate {self.rate:.3g}, seed {self.seed}"

    def text(self):
        return shlex.join([*self.program, *self.options])

    def has_world(self):
        return not has_option(self.options, "--train_data")

    def code(self):
        """A hash of train.py with the files beside it, of the module, and of what draws worlds."""
        core = self.file.parent if len(self.program) == 1 else Path()
        return hash_of({*core.glob("*.py"), self.file, DRAWING})

    def world(self):
        """The folder of its world, which holds a folder scenes. It is drawn if it is not there."""
        folder = OUT / f"world-{self.seed}-{hash_of([DRAWING])}"
        if not (folder / "scenes").exists():
            make_scenes(folder / "scenes", seed=self.seed)
        return folder

    def at(self, rate, seed=0):
        return self._replace(rate=float(f"{rate:.3g}"), seed=seed)

    def words(self, out_dir):
        """What Python is called with. A run validates before its first step and after its last."""
        first = self.program
        if len(first) == 1:
            first = [str(self.file.resolve())]
        options = [word.replace("{seed}", str(self.seed)) for word in self.options]
        usual = ["--workers", "0", "--eval_every", str(10**9)]
        last = ["--learning_rate", f"{self.rate:.3g}", "--seed", str(self.seed)]
        return [*first, *usual, *options, *last, "--out_dir", out_dir]


def default_rate(options):
    """The learning rate of this project's train.py, in a fork, too."""
    if has_option(options, "--init_from"):
        return train.FINE_TUNING_RATE
    return train.make_parser().get_default("learning_rate")


def read_command(text, common=""):
    """A command line, and the options that it shares with another one -> a Command."""
    words = shlex.split(f"{text} {common}")
    n = 1
    file = Path(words[0])
    if words[0] == "-m":
        n = 2
        file = Path(words[1].replace(".", "/") + ".py")
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--learning_rate", type=float)
    found, options = parser.parse_known_args(words[n:])
    rate = found.learning_rate
    if rate is None:
        rate = default_rate(options)
    return Command(words[:n], file, options, rate).at(rate)  # rounded, as those that are tried


# -----------------------------------------------------------------------------
# One run

STARTED = []  # processes


def call(words, folder):
    """Run a Python command with one thread, in a folder. Returns "", or if it has failed its exit
    code and the last line that it printed."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    STARTED.append(process)
    output, _ = process.communicate()
    if process.returncode == 0:
        return ""
    last_line = output.strip().rpartition("\n")[2]
    return f"exit code {process.returncode}: {last_line}"


def train_and_score(command, out_dir):
    """Train a model in out_dir. Returns a run: a dict of scores, seconds, and what the log says of
    the machine. A run that has diverged has no scores."""
    folder = command.world() if command.has_world() else Path()
    start = time.perf_counter()
    error = call(command.words(out_dir), folder)
    seconds = round(time.perf_counter() - start, 1)
    check(not error or DIVERGED in error, f"{command}: {error}")
    header, rows = read_log(f"{out_dir}/log.jsonl")
    facts = {name: header[name] for name in ("device", "dtype", "torch", "commit", "date")}
    scores = {} if error else scores_of(rows[-1])  # a run ends with a validation
    return {"scores": scores, "seconds": seconds, **facts}


def scores_of(row):
    """The scores of a validation, a row of a log, by name. R@k is the mean of both ways."""
    names = short_names(row["zeroshot"])
    scores = {names[folder]: score for folder, score in row["zeroshot"].items()}
    ways = row.get("validation", {})
    for name, score in ways.get("image_to_text", {}).items():
        value = mean(way[name]["value"] for way in ways.values())
        scores[name] = {"value": value, "chance": score["chance"]}
    return scores


# -----------------------------------------------------------------------------
# Many runs


class NotRun(InputError):
    """Something was asked for that has no run yet."""


class Study:
    """Finished runs by key, and those that are wanted."""

    def __init__(self, path, any_code=False):
        """path: the file of runs, which grows; any_code: find runs of other code, too."""
        self.path = path
        self.any_code = any_code
        self.runs = {}  # of equal ones the newest
        self.wanted = []  # commands
        path.parent.mkdir(exist_ok=True)
        path.touch()
        for line in open(path):
            self.add(json.loads(line))

    def add(self, run):
        code = None if self.any_code else run["code"]
        self.runs[run["command"], run["rate"], run["seed"], code] = run

    def key(self, command):
        code = None if self.any_code else command.code()
        return command.text(), command.rate, command.seed, code

    def find(self, commands):
        """The runs of commands. Those without one become wanted, and then this raises NotRun."""
        missing = [command for command in commands if self.key(command) not in self.runs]
        if missing:
            self.wanted += missing
            raise NotRun(f"this has not been run: {missing[0]}")
        return [self.runs[self.key(command)] for command in commands]

    def search(self, command, rates, seeds):
        """Learning rates of a command -> {rate: its runs, one for each seed}, the lowest first."""
        tasks = [command.at(rate, seed) for rate in sorted(rates) for seed in seeds]
        tried = {}
        for task, run in zip(tasks, self.find(tasks)):
            tried.setdefault(task.rate, []).append(run)
        return tried

    def answer(self, questions, jobs):
        """Calls functions that find runs, and runs what they want, so many at a time, until they
        find it. Returns their answers."""
        while True:
            self.wanted = []
            answers = []
            for question in questions:
                with suppress(NotRun):
                    answers.append(question())
            if not self.wanted:
                return answers
            self.work(self.wanted, jobs)

    def run(self, command):
        """Run a command. Returns its run."""
        code = command.code()
        with tempfile.TemporaryDirectory(prefix="run-", dir=OUT.resolve()) as out_dir:
            found = train_and_score(command, out_dir)
        check(command.code() == code, f"{command}: its code has changed meanwhile")
        key = {"command": command.text(), "rate": command.rate, "seed": command.seed, "code": code}
        return {**key, **found}

    def work(self, commands, jobs):
        """Run commands, and keep each run as it ends."""
        todo = [*{self.key(command): command for command in commands}.values()]
        todo.sort(key=lambda command: (command.seed, command.rate))  # a busy hour slows all sides
        for command in todo:  # before two runs draw the same
            if command.has_world():
                command.world()
        pool = ThreadPool(jobs)
        try:
            for n, run in enumerate(pool.imap_unordered(self.run, todo), 1):
                self.add(run)
                with open(self.path, "a") as file:
                    file.write(json.dumps(run) + "\n")
                print(
                    f"{n} of {len(todo)}: {run['command']}, rate {run['rate']:.3g}, "
                    f"seed {run['seed']}: {goal(run):.1f} %, {run['seconds']} s"
                )
        finally:  # after a failure, Ctrl-C or a kill
            pool.terminate()  # what has not begun
            for process in STARTED:  # nothing happens to those that have ended
                process.terminate()
            pool.join()


class Side(NamedTuple):
    """What was run of one command of an experiment."""

    command: Command  # at its rate
    tried: dict  # learning rate: its runs, one for each seed that chooses. {} without a search
    runs: list  # one for each seed that is scored


def side_of(study, text, args):
    """One side of an experiment with these options. Raises NotRun."""
    command = read_command(text, args.common)
    tried = {}
    if args.rates:
        rates = [command.rate * factor for factor in FACTORS]
        tried = study.search(command, rates, range(FIRST_SCORED))
        command = command.at(choose(goals_of(tried), command.rate))
    seeds = range(FIRST_SCORED, FIRST_SCORED + args.seeds)
    return Side(command, tried, study.find([command.at(command.rate, seed) for seed in seeds]))


# -----------------------------------------------------------------------------
# Scores, in percent


def value_of(run, name):
    """A score of a run in percent. One that it does not have, as after it has diverged, is 0."""
    return 100 * run["scores"].get(name, {"value": 0.0})["value"]


def goal(run):
    """What a learning rate is judged by: the mean of all scores."""
    return mean([value_of(run, name) for name in run["scores"]] or [0.0])


def goals_of(tried, goal=goal):
    """{rate: its runs} -> {rate: what it is judged by, in percent}."""
    return {rate: mean(map(goal, runs)) for rate, runs in tried.items()}


def text_of(goals):
    return ", ".join(f"{rate:.3g}: {value:.1f}" for rate, value in goals.items())


def choose(goals, default):
    """The default rate if it is within a point of the best one, else the lowest one that is."""
    good = [rate for rate, value in goals.items() if value >= max(goals.values()) - 1]
    return default if default in good else min(good)


def interval(differences, quantile=None, overlap=0.0):
    """The mean of some differences, one for each seed, and half of its interval. quantile: that of
    Student's t, by default for 95 %; overlap: what adds to 1/n where seeds share data."""
    n = len(differences)
    if quantile is None:
        quantile = QUANTILES[n - 2]
    return mean(differences), quantile * stdev(differences) * (1 / n + overlap) ** 0.5


def cell(sides, name):
    """Both means of a score, and the interval of their difference b - a, as a text."""
    a, b = [[value_of(run, name) for run in side.runs] for side in sides]
    middle, half = interval([y - x for x, y in zip(a, b)])
    return f"{mean(a):.1f} -> {mean(b):.1f}, {middle:+.1f} ± {half:.1f}"


# -----------------------------------------------------------------------------
# The command


def print_sides(sides):
    for side in sides:
        print(f"\n{side.command.text()}, at a learning rate of {side.command.rate:.3g}")
        if side.tried:
            print("tried:", text_of(goals_of(side.tried)))
    print("\nin percent: a -> b, and b - a with its 95 % interval\n")
    # of a run that has not diverged
    scores = max((run["scores"] for side in sides for run in side.runs), key=len)
    for name, score in scores.items():
        print(f"{name:14s}{cell(sides, name):36s} chance {100 * score['chance']:.1f}")


def make_options():
    """The parser of an experiment."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--a", required=True, metavar="COMMAND", help='such as "train.py --cls_weight 0"')
    add("--b", required=True, metavar="COMMAND", help='such as "../fork/train.py"')
    add("--common", default="", metavar="OPTIONS", help="options of both")
    text = f"number of seeds, of which {FIRST_SCORED} is the first (default 5)"
    add("--seeds", type=number(int, 2, 20), default=5, help=text)
    text = "let seeds 0 to 4 choose one of four learning rates for each side"
    add("--rates", action="store_true", help=text)
    text = "runs at a time (default: the cores, or 1 if there is a GPU)"
    add("--jobs", type=number(int, 1), default=default_jobs(), help=text)
    return parser


def default_jobs():
    return 1 if torch.cuda.is_available() else cores()


def main(argv):
    args = make_options().parse_args(argv)
    study = Study(OUT / "runs.jsonl")
    questions = [partial(side_of, study, text, args) for text in (args.a, args.b)]
    print_sides(study.answer(questions, args.jobs))


if __name__ == "__main__":
    run_command(main)
