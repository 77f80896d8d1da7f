"""Does a change help? An experiment is a pair of command lines:

    python -m study.compare --a "train.py --cls_weight 0" --b "train.py" --common "--batch_size 8"
    python -m study.compare --a "train.py" --b "../fork/train.py --my_weight 0.1" --rates
    python -m study.compare --a "train.py" --b "-m study.no_idf" --seeds 10
    python -m study.compare --a "train.py --cls_weight 0" --b "train.py" \\
        --common "--train_data 'pets/train-*.tar' --val_data 'pets/val-*.tar' --model tiny"

Both train with the same seeds. Each seed has a *world* of its own, drawn for it: shards to train on
and to validate on, and folders of classes. So differences are paired by seed, and their intervals
include the draw of the data. Data, model, length and rate default to those of this project's
train.py at the same batch size, in a fork, too. With --train_data a command brings shards of its
own, and needs no world. The intervals then leave out the draw of the data, unless each seed has
shards of its own: {seed} in an option stands for the seed, as in --train_data 'fold{seed}/*.tar'.

With --rates the learning rate of a command is searched, unless the command names a
--learning_rate. Seeds 0 to 4 choose it: the rate with the best mean of their scores is taken for
all. Four rates are tried, and more of them, up to eight, as long as the lowest or the highest is
the best one. A list after --rates is tried as it is, and --search_seeds takes fewer seeds. What is
compared are the scores of other seeds, 5 and up, with or without --rates. They had no say in the
choice, so it does not flatter them.

Finished runs are lines of out_study/runs.jsonl. A run is known by its command, seed, world and
code. So a comparison that was stopped goes on, and runs of other code are never reported. Code is
the text of train.py and of the .py files beside it, of the module if there is one, and of
scripts/scenes.py. What a file of data contains is not looked at: give it another name when it
changes.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import redirect_stdout
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

import train
from cli import InputError, check, cores, make_parser, number, run_command
from eval import DIVERGED
from runtime import read_log, short_names
from scripts.scenes import OPTIONS as SCENES
from scripts.scenes import make_scenes

OUT = Path("out_study")  # worlds and runs
DRAWING = Path("scripts/scenes.py")  # what draws worlds
FIRST_SCORED = 5  # the seeds before it choose learning rates, and are never scored
FACTORS = (0.25, 0.5, 1, 2)  # of a command's own learning rate: those that --rates tries
MOST_RATES = 8
# A rate is judged by the mean of these scores, or of all if a run has none of them.
GOALS = {"R@1", "colour_shape", "type"}
KEY = ("command", "world", "seed", "code")  # what a run is known by
# What is kept of the header of a log.
FACTS = ("pairs", "parameters", "steps", "device", "dtype", "torch", "commit", "date")
# 95 % of the means of 2, 3, 4 ... differences lie within so many standard errors (Student's t).
QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010,
    2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930,
)  # fmt: skip

# -----------------------------------------------------------------------------
# Code


def hash_of(files):
    """A hash of what is in some files. Line ends are alike, whatever git has made of them."""
    texts = [file.read_text("utf-8") for file in sorted(files)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8]


@cache
def drawing_code():
    """A hash of the code that draws worlds. It is taken once, because this process goes on with
    what it has imported, whatever becomes of the file."""
    return hash_of([DRAWING])


# -----------------------------------------------------------------------------
# Worlds and commands


class Command(NamedTuple):
    """A command line of this train.py, of a fork's, or of a module that calls it."""

    text: str  # as the user has written it
    program: str  # "train.py" or "-m study.groups"
    module: Path  # the file of study.groups, or None
    train: Path  # the file of train.py
    options: dict  # name: list of values, all that matter. WORLD stands for the folder of the world
    settings: int  # of its world, or 0 if it has shards of its own
    seed: int = 0

    def __str__(self):
        return f"{self.text}, rate {self.rate():.3g}, seed {self.seed}"

    def line(self):
        """The whole line but for the seed. The options are sorted, so that equal commands are equal
        texts."""
        return f"{self.program} {shlex.join(words_of(self.options))}"

    def code(self):
        """Hashes of train.py with the files beside it, of the module, and of what draws the
        world."""
        core = hash_of(self.train.parent.glob("*.py"))
        module = hash_of([self.module]) if self.module else ""
        drawing = drawing_code() if self.settings else ""
        return f"{core}-{module}-{drawing}"

    def key(self, code):
        """The values of KEY, for a run of some code."""
        return self.line(), self.world(), self.seed, code

    def world(self):
        """What is drawn for each seed."""
        return f"scenes, {self.settings} settings" if self.settings else ""

    def draw(self):
        """The folder of its world. If it has one that is not there, it is drawn."""
        folder = OUT / f"scenes-{self.settings}-{self.seed}-{drawing_code()}"
        if self.settings and not folder.exists():
            make_scenes(folder, settings=self.settings, seed=self.seed)
        return folder

    def rate(self):
        return float(self.options["--learning_rate"][0])

    def at(self, rate, seed):
        options = {**self.options, "--learning_rate": [f"{rate:.3g}"]}
        return self._replace(options=options, seed=seed)


def words_of(options):
    words = []
    for name, values in sorted(options.items()):
        words += [name, *values]
    return words


def options_of(words):
    """["--steps", "9", "--captions", "a", "b"] -> {"--steps": ["9"], "--captions": ["a", "b"]}"""
    options = {}
    for word in words:
        if word.startswith("--"):
            name = word
            options[name] = []
        else:
            check(options, f"{word!r} stands before any option")
            options[name].append(word)
    return options


def defaults_of(options):
    """What train.py would fill in for some options, as options: those of a run in a world, or of
    one with shards of its own."""
    # what the other defaults depend on
    rules = options.keys() & {"--batch_size", "--cls_weight", "--train_data", "--init_from"}
    with redirect_stdout(None):  # it prints them
        args = train.parse(words_of({name: options[name] for name in rules}))
    defaults = {"--workers": ["0"], "--eval_every": [str(10**9)]}  # once more at the end
    for name in ("epochs", "learning_rate", *SCENES):
        value = getattr(args, name)
        if value:  # None and [] are no words, and --workers 0 is there already
            values = value if isinstance(value, list) else [value]
            defaults[f"--{name}"] = [str(v).replace("scenes/", "WORLD/") for v in values]
    if "--steps" in options:
        del defaults["--epochs"]
    return defaults


def words_in(text):
    """A command line as words. "--steps=9" is two. Raises InputError if a quote is left open."""
    try:
        return shlex.split(re.sub(r"(--\w+)=", r"\1 ", text))
    except ValueError as error:
        raise InputError(f"{text!r} is no command line: {error}") from error


def read_command(text, common, settings):
    """A command line, and the options that it shares with another one -> a Command."""
    words = words_in(text)
    check(words, 'a command is empty: give one such as "train.py"')
    n = 1
    file = Path(words[0])
    module = None
    if words[0] == "-m":
        check(len(words) > 1, f"{text!r}: -m needs the name of a module")
        n = 2
        file = Path("train.py")
        module = Path(words[1].replace(".", "/") + ".py")
    check((module or file).is_file(), f"{text!r}: there is no program {module or file}")
    options = options_of(words_in(common) + words[n:])
    chosen = options.keys() & {"--seed", "--out_dir"}
    check(not chosen, f"{text!r}: leave out --seed and --out_dir, which a comparison chooses")
    return Command(
        text=f"{text} {common}".strip(),
        program=shlex.join(words[:n]),
        module=module,
        train=file,
        options={**defaults_of(options), **options},
        settings=0 if "--train_data" in options else settings,
    )


# -----------------------------------------------------------------------------
# One run


STARTED = []  # processes


def call(words):
    """Run a Python command with one thread. Returns "", or if it has failed its exit code and the
    last line that it printed."""
    process = subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
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


def train_and_score(command, world, out_dir):
    """Train a model in out_dir, on the world in a folder. Returns a run: a dict of scores, seconds,
    and what the log says of the machine. A run that has diverged has no scores."""
    words = []
    for word in words_of(command.options):
        words.append(word.replace("WORLD/", f"{world}/").replace("{seed}", str(command.seed)))
    words += ["--seed", str(command.seed), "--out_dir", out_dir]
    start = time.perf_counter()
    error = call([*shlex.split(command.program), *words])
    seconds = round(time.perf_counter() - start, 1)
    check(not error or DIVERGED in error, f"{command}: {error}")
    header, rows = read_log(f"{out_dir}/log.jsonl")
    run = {"scores": {}, "seconds": seconds, **{name: header[name] for name in FACTS}}
    if not error:
        run |= scores_of(rows[-1])  # a run ends with a validation
        has_score = len(run["scores"]) > 0
        check(has_score, f"{command}: nothing is scored without --val_data or --zeroshot_data")
    return run


def scores_of(row):
    """What a run keeps of a validation, a row of a log: scores by name, where R@k is the mean of
    both ways, each way with its interval, and the loss."""
    names = short_names(row["zeroshot"])
    scores = {names[folder]: score for folder, score in row["zeroshot"].items()}
    ways = row.get("validation", {})
    for name, score in ways.get("image_to_text", {}).items():
        value = mean(way[name]["value"] for way in ways.values())
        scores[name] = {"value": value, "chance": score["chance"]}
    return {"scores": scores, "ways": ways, "loss": row.get("val_contrastive_loss")}


# -----------------------------------------------------------------------------
# Many runs


class Side(NamedTuple):
    """What was run of one command of an experiment."""

    command: Command  # at its rate
    tried: dict  # learning rate: its runs, one for each seed that chooses. {} without a search
    runs: list  # one for each seed that is scored

    def seconds(self):
        """The time of its fastest run that has not diverged, as a text: others may have had a busy
        neighbour."""
        times = [run["seconds"] for run in self.runs if run["scores"]]
        return f"{min(times, default=0):.0f}"


class Missing(Exception):
    """Its argument is a list of commands, which have to run before there is an answer."""


class Study:
    """Finished runs, and how to make others."""

    def __init__(self, jobs, path):
        """jobs: runs at a time; path: the file of runs, which grows."""
        self.jobs = jobs
        self.path = path
        self.runs = {}
        path.touch()
        for line in open(path):
            self.add(json.loads(line))

    def add(self, run):
        self.runs[tuple(run[name] for name in KEY)] = run

    def run(self, command):
        """Run a command. Returns its run."""
        code = command.code()
        world = command.draw()
        with tempfile.TemporaryDirectory(prefix="run-", dir=OUT) as out_dir:
            found = train_and_score(command, world, out_dir)
        check(command.code() == code, f"{command}: its code has changed meanwhile")
        key = dict(zip(KEY, command.key(code)))
        return {**key, "text": command.text, "rate": command.rate(), **found}

    def work(self, commands):
        """Run some commands, and keep each run as it ends."""
        for command in commands:  # before two runs draw the same
            command.draw()
        pool = ThreadPool(self.jobs)
        try:
            for n, run in enumerate(pool.imap_unordered(self.run, commands), 1):
                self.add(run)
                with open(self.path, "a") as file:
                    file.write(json.dumps(run) + "\n")
                print(
                    f"{n} of {len(commands)}: {run['text']}, rate {run['rate']:.3g}, "
                    f"seed {run['seed']}: {goal(run):.1f} %, {run['seconds']} s"
                )
        finally:  # after a failure, Ctrl-C or a kill
            pool.terminate()  # what has not begun
            for process in STARTED:  # nothing happens to those that have ended
                process.terminate()
            pool.join()

    def find(self, command, rates, seeds, code):
        """{rate: the run of each seed} of a command. Raises Missing."""
        found = defaultdict(list)
        missing = []
        for rate, seed in itertools.product(rates, seeds):
            task = command.at(rate, seed)
            key = task.key(code)
            if key in self.runs:
                found[rate].append(self.runs[key])
            else:
                missing.append(task)
        if missing:
            raise Missing(missing)
        return found

    def side(self, command, args, code):
        """A side of an experiment with these options. Raises Missing if there are runs to be made
        first."""
        rate = command.rate()
        tried = {}
        if args.rates is not None and not re.search(r"--learning_rate\b", command.text):
            rates = [rate * factor for factor in args.rates or FACTORS]
            while rates:
                tried |= self.find(command, rates, range(args.search_seeds), code)
                rates = next_rates(goals_of(tried)) if args.rates == [] else []
            rate = best_rate(goals_of(tried))
            is_scored = any(run["scores"] for run in tried[rate])
            check(is_scored, f"{command.text} has diverged at all rates from {min(tried):.3g} on")
        scored = range(FIRST_SCORED, FIRST_SCORED + args.seeds)
        runs = self.find(command, [rate], scored, code)[rate]
        return Side(command.at(rate, FIRST_SCORED), tried, runs)

    def experiment(self, args):
        """Run what is missing of an experiment with these options. Returns its two Sides."""
        while True:
            sides = []
            todo = []
            for command in pair_of(args):
                try:
                    sides.append(self.side(command, args, command.code()))
                except Missing as missing:
                    todo += missing.args[0]
            if not todo:
                return sides
            # by seed and rate, so that a busy hour slows both sides
            self.work(sorted(todo, key=lambda command: (command.seed, command.rate())))


# -----------------------------------------------------------------------------
# Scores, in percent


def value_of(run, name):
    """A score of a run. One that it does not have, as after it has diverged, is 0. The loss is the
    only one that is not in percent."""
    if name == "loss":
        return run.get("loss") or math.nan
    return 100 * run["scores"].get(name, {"value": 0.0})["value"]


def goal(run):
    """What a learning rate is judged by."""
    names = GOALS & run["scores"].keys() or run["scores"]
    return mean([value_of(run, name) for name in names] or [0.0])


# -----------------------------------------------------------------------------
# Which learning rate?


def goals_of(tried):
    """{rate: its runs} -> {rate: what it is judged by, for each seed}, the lowest rate first."""
    return {rate: [*map(goal, tried[rate])] for rate in sorted(tried)}


def best_rate(goals):
    """The rate with the best mean over the seeds. Of equal ones it is the lowest."""
    return max(goals, key=lambda rate: mean(goals[rate]))


def end_of(goals):
    """If the best rate is the lowest or the highest one that was tried: "lowest" or "highest".
    Otherwise None."""
    rates = [*goals]
    best = best_rate(goals)
    if best == rates[0]:
        return "lowest"
    if best == rates[-1]:
        return "highest"
    return None


def next_rates(goals):
    """A list of the rates that a search has to try next. It goes on beyond an end that is best."""
    rates = [*goals]
    end = end_of(goals)
    if end is None or len(rates) >= MOST_RATES:
        return []
    return [rates[0] / 2] if end == "lowest" else [rates[-1] * 2]


def rates_text(tried):
    """What each rate that was tried is judged by, as a mean over the seeds."""
    goals = goals_of(tried)
    texts = {rate: f"{rate:.2e}: {mean(values):.1f}" for rate, values in goals.items()}
    best = best_rate(goals)
    texts[best] += ", chosen"
    end = end_of(goals)
    if end is not None:  # a better rate may lie beyond
        texts[best] += f", the {end} tried"
    return "; ".join(texts.values())


# -----------------------------------------------------------------------------
# Differences


def interval(differences, digits=1):
    """The mean of some differences, one for each seed, and half of its 95 % interval, as a text. It
    is in bold if the interval excludes 0, but never with two seeds, and never if the differences
    are all the same: scores are coarse, so that happens by chance."""
    n = len(differences)
    middle = mean(differences)
    sd = torch.tensor(differences).std().item()  # NaN if a run has no loss
    half = QUANTILES[n - 2] * sd / n**0.5
    text = f"{middle:+.{digits}f} ± {half:.{digits}f}"
    excludes_zero = n >= 3 and half > 0 and abs(middle) > half
    return f"**{text}**" if excludes_zero else text


def cell(sides, name):
    """Both means of a score, and the interval of their difference b - a, as a text."""
    digits = 3 if name == "loss" else 1
    a, b = [[value_of(run, name) for run in side.runs] for side in sides]
    gain = interval([y - x for x, y in zip(a, b)], digits)
    return f"{mean(a):.{digits}f} -> {mean(b):.{digits}f}, {gain}"


# -----------------------------------------------------------------------------
# The command


def print_sides(sides):
    for side in sides:
        print(f"\n{side.command.text}, at a learning rate of {side.command.rate():.3g}")
        if side.tried:
            print("tried:", rates_text(side.tried))
        diverged = sum(not run["scores"] for run in side.runs)
        if diverged:
            print(f"{diverged} of its {len(side.runs)} runs have diverged, and score 0.")
    print("\nin percent, a -> b, and b - a with its 95 % interval: ** marks one that excludes 0,")
    print("as one in twenty does by chance\n")
    # of a run that has not diverged
    scores = max((run["scores"] for side in sides for run in side.runs), key=len)
    for name, score in scores.items():
        print(f"{name:14s}{cell(sides, name):36s} chance {100 * score['chance']:.1f}")
    print(f"{'loss':14s}{cell(sides, 'loss')}")
    print("seconds       {} -> {}".format(*map(Side.seconds, sides)))


def make_options():
    """The parser of an experiment."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--a", required=True, metavar="COMMAND", help='such as "train.py --cls_weight 0"')
    add("--b", required=True, metavar="COMMAND", help='such as "../fork/train.py"')
    add("--common", default="", metavar="OPTIONS", help="options of both")
    text = f"seeds of each that are scored, from {FIRST_SCORED} on (default 5)"
    add("--seeds", type=number(int, 2, 20), default=5, help=text)
    text = (
        "search the learning rate of each command that names none: at four rates or more around "
        "its default, or at these factors of it and no others"
    )
    add("--rates", type=number(float, 0), nargs="*", metavar="FACTOR", help=text)
    text = f"seeds that choose a rate (default {FIRST_SCORED})"
    add("--search_seeds", type=number(int, 1, FIRST_SCORED), default=FIRST_SCORED, help=text)
    add("--settings", type=number(int, 1, 256), default=256, help="of the world (default 256)")
    text = "runs at a time (default: the cores, or 1 if there is a GPU)"
    add("--jobs", type=number(int, 1), help=text)
    return parser


def pair_of(args):
    """The two commands of an experiment with these options."""
    return [read_command(text, args.common, args.settings) for text in (args.a, args.b)]


def open_study(jobs, path):
    """A study that draws its worlds in OUT. A kill ends its runs as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    OUT.mkdir(exist_ok=True)
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else cores()
    return Study(jobs, path)


def main(argv):
    args = make_options().parse_args(argv)
    print_sides(open_study(args.jobs, OUT / "runs.jsonl").experiment(args))


if __name__ == "__main__":
    run_command(main)
