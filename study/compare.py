"""Does a change help? An experiment is a pair of command lines:

    python -m study.compare --a "train.py --cls_weight 0" --b "train.py" --common "--batch_size 8"
    python -m study.compare --a "train.py" --b "../fork/train.py --my_weight 0.1" --rates
    python -m study.compare --a "train.py" --b "-m study.no_idf" --probe
    python -m study.compare --a "train.py --cls_weight 0" --b "train.py" \\
        --common "--train_data 'pets/train-*.tar' --val_data 'pets/val-*.tar' --model tiny"

Both train with the same seeds. Each seed has a *world* of its own, drawn for it: shards to train on
and to validate on, and folders of classes. So differences are paired by seed, and their intervals
include the draw of the data. Data, model, length and rate default to those of this project's
train.py at the same batch size, in a fork, too. With --train_data a command brings shards of its
own, and needs no world.

With --rates, four learning rates of each command are tried with all seeds. A seed takes the rate
that is best for the *other* seeds, so that no seed chooses its own, and the interval includes the
choice. While the best rate of all seeds is the lowest or the highest, one more is tried there, up
to eight.

Finished runs are lines of out_study/runs.jsonl. A run is known by its command, --probe, seed, world
and code. So a comparison that was stopped goes on, and runs of other code are never reported. Code
is that of the Python files beside train.py, of scripts/scenes.py there, of the module if there is
one, and of what draws the world, without comments and docstrings. What else a fork imports, and
what a file of data contains, is not looked at: give it another name when it changes.
"""

import ast
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from tqdm import tqdm

import train
from cli import check, lock_folder, make_parser, number, run_command
from data import cores
from eval import DIVERGED
from scripts.report import read_log
from scripts.scenes import OPTIONS as SCENES
from scripts.scenes import make_scenes
from study.objects import make_objects

FACTORS = (0.25, 0.5, 1, 2)  # of a command's own learning rate: those that --rates tries
MOST_RATES = 8
# A rate is judged by the mean of these scores, or of all if a run has none of them.
GOALS = {"R@1", "colour_shape", "object"}
# The code that draws a world.
DRAWN_BY = ("cli.py", "data.py", "superclip.py", "scripts/scenes.py", "study/objects.py")
# What a linear probe learns from, and what it is scored on.
PROBES = {
    "scenes": ("zeroshot/colour_shape", "zeroshot/held_out"),
    "objects": ("learn", "zeroshot/object"),
}
KEY = ("command", "world", "seed", "probe", "code")  # what a run is known by
# What is kept of the header of a log.
FACTS = ("pairs", "parameters", "steps", "device", "dtype", "torch", "commit", "date")
# 95 % of the means of 2, 3, 4 ... differences lie within so many standard errors (Student's t).
QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010,
    2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930,
)  # fmt: skip

# -----------------------------------------------------------------------------
# Code

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


@cache
def without_docstrings(text):
    """A Python file as a text -> its code without comments, docstrings and layout."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)


def code_of(files):
    """A hash of the code of some Python files."""
    codes = [without_docstrings(Path(file).read_text()) for file in files]
    return hashlib.sha256(repr(codes).encode()).hexdigest()[:8]


@cache
def drawing_code():
    """A hash of the code that draws worlds. It is taken once, because this process goes on with
    what it has imported, whatever becomes of the files."""
    return code_of(DRAWN_BY)


# -----------------------------------------------------------------------------
# Worlds and commands


class World(NamedTuple):
    """What is drawn for each seed: scenes, or photographs as study/objects.py has them."""

    settings: int = 256
    photographs: str = ""  # a folder

    def __str__(self):
        return f"{self.kind()}, {self.settings} settings {self.photographs}".strip()

    def kind(self):
        return "objects" if self.photographs else "scenes"

    def draw(self, out, seed):
        """The folder of this world, which is drawn if it is not there."""
        folder = out / re.sub(r"\W+", "-", f"{self} {seed} {drawing_code()}")
        if not folder.exists():
            if self.photographs:
                make_objects(folder, self.photographs, self.settings, seed)
            else:
                make_scenes(folder, settings=self.settings, seed=seed)
        return folder


class Command(NamedTuple):
    """A command line of this train.py, of a fork's, or of a module that calls it."""

    text: str  # as the user has written it
    program: str  # "train.py" or "-m study.groups"
    file: Path  # of the program
    folder: Path  # of its code
    options: dict  # name: list of values, all that matter. WORLD stands for the folder of the world
    world: World  # or None if it has shards of its own
    seed: int = 0
    probe: bool = False  # is a linear probe scored, too?

    def __str__(self):
        return f"{self.text}, rate {self.rate():.3g}, seed {self.seed}"

    def line(self):
        """The whole line but for the seed. The options are sorted, so that equal commands are equal
        texts."""
        return f"{self.program} {shlex.join(words_of(self.options))}"

    def code(self):
        """A hash of the code in its folder, of the module, and of what draws the world."""
        beside = [*sorted(self.folder.glob("*.py")), self.folder / "scripts/scenes.py"]
        drawing = drawing_code() if self.world else ""
        return f"{code_of(beside)}-{code_of([self.file])}-{drawing}"

    def rate(self):
        return float(self.options["--learning_rate"][0])

    def at(self, rate, seed, probe):
        options = {**self.options, "--learning_rate": [f"{rate:.3g}"]}
        return self._replace(options=options, seed=seed, probe=probe)


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


def defaults_of(options, world):
    """What train.py would fill in for some options, as options: those of a run in this world, or of
    one with shards of its own."""
    # what the other defaults depend on
    rules = options.keys() & {"--batch_size", "--train_data", "--init_from"}
    with redirect_stdout(None):  # it prints them
        args = train.parse(words_of({name: options[name] for name in rules}))
    defaults = {"--workers": ["0"], "--eval_every": [str(10**9)]}  # once more at the end
    for name in ("epochs", "learning_rate", *SCENES):
        value = getattr(args, name)
        if value:  # None and [] are no words, and --workers 0 is there already
            values = value if isinstance(value, list) else [value]
            defaults[f"--{name}"] = [str(v).replace("scenes/", "WORLD/") for v in values]
    if world and world.photographs:
        defaults["--zeroshot_data"] = ["WORLD/zeroshot/object"]
    if "--steps" in options:
        del defaults["--epochs"]
    return defaults


def words_in(text):
    """A command line as words. "--steps=9" is two."""
    return shlex.split(re.sub(r"(--\w+)=", r"\1 ", text))


def read_command(text, common, world):
    """A command line, and the options that it shares with another one -> a Command."""
    words = words_in(text) or [""]
    n = 1
    file = Path(words[0])
    folder = file.parent
    if words[0] == "-m":
        n = 2
        folder = Path(".")
        file = Path(words[1].replace(".", "/") + ".py")
    check(file.is_file(), f"{text!r}: there is no program {file}")
    options = options_of(words_in(common) + words[n:])
    chosen = options.keys() & {"--seed", "--out_dir"}
    check(not chosen, f"{text!r}: leave out --seed and --out_dir, which a comparison chooses")
    if "--train_data" in options:
        world = None
    options = {**defaults_of(options, world), **options}
    return Command(f"{text} {common}".strip(), " ".join(words[:n]), file, folder, options, world)


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
    words = [word.replace("WORLD/", f"{world}/") for word in words_of(command.options)]
    words += ["--seed", str(command.seed), "--out_dir", out_dir]
    start = time.perf_counter()
    error = call([*command.program.split(), *words])
    seconds = round(time.perf_counter() - start, 1)
    check(not error or DIVERGED in error, f"{command}: {error}")
    header, rows = read_log(f"{out_dir}/log.jsonl")
    run = {"scores": {}, "seconds": seconds, **{name: header[name] for name in FACTS}}
    if not error:
        run["scores"] = scores_of(rows[-1])  # a run ends with a validation
        if command.probe:
            run["scores"] |= probe_scores(command, world, out_dir)
    return run


def scores_of(row):
    """The scores of a validation, a row of a log. R@1 is the mean of both ways."""
    scores = {}
    if "validation" in row:
        chance = row["validation"]["image_to_text"]["R@1"]["chance"]
        scores["R@1"] = {"value": row["mean_r1"], "chance": chance}
    for folder, score in row["zeroshot"].items():
        scores[Path(folder).name] = score
    return scores


def probe_scores(command, world, out_dir):
    """A linear probe of the frozen class token."""
    learn, test = PROBES[command.world.kind()]
    found = Path(out_dir, "probe.json")
    words = [command.folder / "eval.py", "probe", "--checkpoint", Path(out_dir, "last.pt")]
    words += ["--train", world / learn, "--test", world / test, "--workers", "0", "--json", found]
    error = call(words)
    check(not error, f"{command}: {error}")
    return {"probe": json.loads(found.read_text())["class token"]}


# -----------------------------------------------------------------------------
# Many runs


class Side(NamedTuple):
    """What was run of one command of an experiment."""

    command: Command
    tried: dict  # learning rate: its runs, one of each seed

    def values(self, measure):
        """{learning rate: what a function of a run returns, for each seed}"""
        return {rate: [*map(measure, runs)] for rate, runs in self.tried.items()}

    def rates(self):
        """The rate of each seed, chosen by the others."""
        goals = self.values(goal)
        n = len(next(iter(goals.values())))
        return [best_rate(goals, seed) for seed in range(n)]

    def runs(self):
        """The run of each seed, at its rate."""
        return [self.tried[rate][seed] for seed, rate in enumerate(self.rates())]

    def seconds(self):
        """The time of its fastest run that has not diverged, as a text: others may have had a busy
        neighbour."""
        runs = [run for runs in self.tried.values() for run in runs if run["scores"]]
        return f"{min((run['seconds'] for run in runs), default=0):.0f}"


class Study:
    """Finished runs, and how to make others."""

    def __init__(self, out, jobs, path):
        """out: folder of worlds; jobs: runs at a time, or 0, which only reads the runs of the code
        that has run last; path: the file of runs, which grows."""
        self.out = out
        self.jobs = jobs
        self.path = path
        self.runs = {}
        self.codes = {}  # of programs in worlds
        if jobs:
            path.touch()
        runs = [*map(json.loads, open(path))]
        for run in runs:
            self.runs[tuple(run[name] for name in KEY)] = run
            # the part of train.py and the files beside it
            if run["code"][:8] == runs[-1]["code"][:8]:
                self.codes[run["program"], run["world"]] = run["code"]

    def key(self, command):
        """The values of KEY, which tell a run from others."""
        world = str(command.world or "")
        code = command.code() if self.jobs else self.codes.get((command.program, world))
        return command.line(), world, command.seed, command.probe, code

    def run(self, task):
        """Run a task: a command, its key, and the folder of its world. Returns the command and its
        run."""
        command, key, world = task
        with tempfile.TemporaryDirectory(prefix="run-", dir=self.out) as out_dir:
            run = train_and_score(command, world, out_dir)
        check(self.key(command) == key, f"{command}: its code has changed meanwhile")
        return command, {**dict(zip(KEY, key)), "program": command.program, **run}

    def work(self, commands):
        """Run some commands, each once."""
        tasks = []
        for command in {self.key(command): command for command in commands}.values():
            folder = command.world and command.world.draw(self.out, command.seed)
            tasks.append((command, self.key(command), folder))
        pool = ThreadPool(self.jobs)
        done = pool.imap_unordered(self.run, tasks)
        try:
            for command, run in tqdm(done, total=len(tasks), unit="run", smoothing=0):
                self.runs[tuple(run[name] for name in KEY)] = run
                with open(self.path, "a") as file:
                    file.write(json.dumps(run) + "\n")
                tqdm.write(f"{command}: {goal(run):.1f} % in {run['seconds']} s")
        finally:  # after a failure, Ctrl-C or a kill
            pool.terminate()  # what has not begun
            for process in STARTED:  # nothing happens to those that have ended
                process.terminate()
            pool.join()

    def look(self, command, seeds, search, probe):
        """What there is of a side of an experiment, and the list of commands that it needs next."""
        rates = [command.rate() * factor for factor in (FACTORS if search else (1,))]
        while True:
            tried = {}
            missing = []
            for rate in sorted(rates):
                commands = [command.at(rate, seed, probe) for seed in range(seeds)]
                tried[rate] = [self.runs.get(self.key(command)) for command in commands]
                missing += [c for c, run in zip(commands, tried[rate]) if run is None]
            side = Side(command, tried)
            more = next_rates(side.values(goal)) if search and not missing else []
            if not more:
                return side, missing
            rates += more

    def experiment(self, pair, seeds, search, probe):
        """Run a pair of commands with each seed, at their own rates or at those that a search
        tries. Returns their Sides, or None if runs are missing and none may be made."""
        while True:
            looks = [self.look(command, seeds, search, probe) for command in pair]
            todo = looks[0][1] + looks[1][1]
            if not todo:
                return [side for side, _ in looks]
            if self.jobs == 0:
                return None
            # by rate and seed, so that a busy hour slows both sides
            self.work(sorted(todo, key=lambda command: (command.rate(), command.seed)))


# -----------------------------------------------------------------------------
# Scores, in percent


def value_of(run, name):
    """A score of a run. One that it does not have, as after it has diverged, is 0."""
    return 100 * run["scores"].get(name, {"value": 0.0})["value"]


def goal(run):
    """What a learning rate is judged by."""
    names = GOALS & run["scores"].keys() or run["scores"]
    return mean([value_of(run, name) for name in names] or [0.0])


def has_learned(run):
    """Does a model name the colour and shape of most objects?"""
    return value_of(run, "colour_shape") > 50


# -----------------------------------------------------------------------------
# Which learning rate? Goals are a dict {rate: a number of each seed}, the lowest rate first.


def best_rate(goals, without=None):
    """The rate with the best mean over the seeds, or over all but one. Of equal ones it is the
    lowest."""

    def total(rate):
        return sum(value for seed, value in enumerate(goals[rate]) if seed != without)

    return max(goals, key=total)


def next_rates(goals):
    """A list of the rate that a search has to try next, empty if it has seen enough."""
    best = best_rate(goals)
    if len(goals) == MOST_RATES or min(goals) < best < max(goals):
        return []
    return [best / 2 if best == min(goals) else best * 2]


def rate_texts(side):
    """What is to be known of each rate that was tried: the mean that it is judged by, and numbers
    of seeds."""
    texts = []
    taken = side.rates()
    for rate, runs in side.tried.items():
        counts = {
            "learned": sum(map(has_learned, runs)),
            "diverged": sum(not run["scores"] for run in runs),
            "taken": taken.count(rate),
        }
        notes = "".join(f", {n} {what}" for what, n in counts.items() if n)
        texts.append(f"{rate:.2e}: {mean(map(goal, runs)):.1f}{notes}")
    return texts


# -----------------------------------------------------------------------------
# Differences


class Interval(NamedTuple):
    """A mean of differences, and half of its 95 % interval."""

    mean: float
    half: float

    def __str__(self):
        return f"{self.mean:+.1f} ± {self.half:.1f}"

    def excludes_0(self):
        return abs(self.mean) > self.half


def interval(differences):
    """The interval of the mean of some differences, one for each seed."""
    n = len(differences)
    half = QUANTILES[n - 2] * stdev(differences) / n**0.5
    return Interval(mean(differences), half)


def means(sides, name):
    """The means of a score over the seeds of both sides."""
    return [mean(value_of(run, name) for run in side.runs()) for side in sides]


def gaps(sides, name):
    """b - a in a score, for each seed."""
    a, b = [side.runs() for side in sides]
    return [value_of(y, name) - value_of(x, name) for x, y in zip(a, b)]


def difference(sides, name):
    """The interval of b - a in a score."""
    return interval(gaps(sides, name))


# -----------------------------------------------------------------------------
# The command


def print_sides(sides):
    for side in sides:
        print(f"\n{side.command.text}, learning rates tried: {len(side.tried)}")
        print("rate: mean of the scores that it is judged by, numbers of seeds")
        print(*rate_texts(side), sep="\n")
    # of a run that has not diverged
    scores = max((run["scores"] for side in sides for run in side.runs()), key=len)
    print(f"\n{len(scores)} scores are compared, in percent, as means over the seeds\n")
    print("                chance       a       b   b - a, 95 % interval")
    for name, score in scores.items():
        found = difference(sides, name)
        note = "excludes 0 (uncorrected)" if found.excludes_0() else ""
        levels = "{:8.1f}{:8.1f}{:8.1f}".format(100 * score["chance"], *means(sides, name))
        print(f"{name:14s}{levels}   {found!s:15s} {note}")
    print("seconds               {:>8s}{:>8s}".format(*map(Side.seconds, sides)))


def make_options():
    """The parser of an experiment."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--a", required=True, metavar="COMMAND", help='such as "train.py --cls_weight 0"')
    add("--b", required=True, metavar="COMMAND", help='such as "../fork/train.py"')
    add("--common", default="", metavar="OPTIONS", help="options of both")
    add("--seeds", type=number(int, 2, 20), default=5, help="seeds of each (default 5)")
    add("--rates", action="store_true", help="search the learning rate of both: four or more")
    add("--probe", action="store_true", help="score a linear probe, too")
    add("--settings", type=number(int, 1, 256), default=256, help="of the world (default 256)")
    add("--photographs", default="", metavar="DIR", help="of the world: see study/objects.py")
    text = "runs at a time (default: the cores; give fewer on a GPU)"
    add("--jobs", type=number(int, 1), default=cores(), help=text)
    add("--out", type=Path, default="out_study", help="folder of worlds (default out_study)")
    return parser


def run_experiment(study, args):
    """Do what the options of an experiment say. Returns its two Sides."""
    world = World(args.settings, args.photographs)
    pair = [read_command(text, args.common, world) for text in (args.a, args.b)]
    drawn = all(command.world for command in pair)
    check(drawn or not args.probe, "--probe needs a drawn world, which --train_data replaces")
    return study.experiment(pair, args.seeds, args.rates, args.probe)


def open_out(out):
    """Make the folder of a study, and let a kill end its runs as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out.mkdir(parents=True, exist_ok=True)
    lock_folder(out)


def main(argv):
    args = make_options().parse_args(argv)
    open_out(args.out)
    study = Study(args.out, args.jobs, args.out / "runs.jsonl")
    print_sides(run_experiment(study, args))


if __name__ == "__main__":
    run_command(main)
