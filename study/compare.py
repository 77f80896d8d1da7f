"""Does a change help? An experiment is a pair of command lines:

    python -m study.compare --a "train.py --cls_weight 0" --b "train.py" --common "--batch_size 8"
    python -m study.compare --a "train.py" --b "../fork/train.py --my_weight 0.1" --rates
    python -m study.compare --a "train.py" --b "-m study.no_idf" --probe
    python -m study.compare --a "train.py --cls_weight 0" --b "train.py" \\
        --common "--train_data 'pets/train-*.tar' --val_data 'pets/val-*.tar' --model tiny"

Both train with the same seeds. Each seed has a *world* of its own, drawn for it: shards to train on
and to validate on, and folders of classes. So differences are paired by seed, and their intervals
include the draw of the data. What a command does not say is as in a bare `python train.py`. With
--train_data a command brings shards of its own, and needs no world.

With --rates, four learning rates of each command are tried with all seeds. A seed takes the rate
that is best for the *other* seeds, so that no seed chooses its own, and the interval includes the
choice. While the best rate of all seeds is the lowest or the highest, one more is tried there.

Finished runs are lines of out_study/runs.jsonl, and of study/runs.jsonl, the published ones. A run
is known by its command, seed, world and code. So a comparison that was stopped goes on, and runs of
other code are never reported. The code is that of the program, of what it imports from its folder,
and of what draws the world, without comments and docstrings.
"""

import ast
import hashlib
import io
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
from contextlib import redirect_stdout
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import train
from cli import check, lock_folder, make_parser, number, run_command
from eval import DIVERGED
from scripts.scenes import OPTIONS as SCENES
from scripts.scenes import make_scenes
from study.objects import make_objects

PUBLISHED = Path(__file__).with_name("runs.jsonl")
FACTORS = (0.25, 0.5, 1, 2)  # of a command's own learning rate: those that --rates tries
MOST_RATES = 8
GOALS = ("R@1", "colour_shape", "object")  # a rate is judged by the mean of those that there are
DRAWN_BY = {"scenes": "scripts/scenes.py", "objects": "study/objects.py"}
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


def module_file(folder, name):
    return Path(folder, name.replace(".", "/") + ".py")


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)


def code_of(path, folder):
    """A hash of a program: of its file, of those in its folder that it imports, of those that they
    import, and so on, without comments and docstrings."""
    texts = {}
    todo = [path]
    while todo:
        file = todo.pop()
        if file in texts or not file.is_file():
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                del node.body[0]
            if isinstance(node, IMPORTS):
                module = getattr(node, "module", None)
                names = [alias.name for alias in node.names]
                names += [f"{module}.{name}" for name in names]  # b may be a module of a
                todo += [module_file(folder, name) for name in (f"{module}", *names)]
        texts[file] = f"{file.relative_to(folder)}\n{ast.unparse(tree)}\n"
    text = "".join(texts[file] for file in sorted(texts))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


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

    def code(self):
        """That of what draws it."""
        return code_of(Path(DRAWN_BY[self.kind()]), Path("."))

    def draw(self, out, seed):
        """The folder of this world, which is drawn if it is not there."""
        folder = out / re.sub(r"\W+", "-", f"{self} {seed} {self.code()}")
        if folder.exists():
            return folder
        if self.photographs:
            make_objects(folder, self.photographs, self.settings, seed)
        else:
            make_scenes(folder, settings=self.settings, seed=seed)
        return folder


class Command(NamedTuple):
    """A command line of this train.py, of a fork's, or of a module that calls it."""

    text: str  # as the user has written it
    program: list  # ["train.py"] or ["-m", "study.groups"]
    options: dict  # name: list of values, all that matter. WORLD stands for the folder of the world
    world: World  # or None if it has shards of its own

    def __str__(self):
        """The whole line. The options are sorted, so that equal commands are equal texts."""
        return " ".join([*self.program, *map(shlex.quote, words_of(self.options))])

    def folder(self):
        """Where its code is."""
        return Path(".") if self.program[0] == "-m" else Path(self.program[0]).parent

    def code(self):
        file = Path(self.program[0])
        if self.program[0] == "-m":
            file = module_file(".", self.program[1])
        code = code_of(file, self.folder())
        return f"{code}-{self.world.code()}" if self.world else code

    def rate(self):
        return float(self.options["--learning_rate"][0])

    def with_rate(self, rate):
        return self._replace(options={**self.options, "--learning_rate": [f"{rate:.3g}"]})


def words_of(options):
    words = []
    for name, values in sorted(options.items()):
        words += [name, *values]
    return words


def options_of(words):
    """["--steps=9", "--captions", "a", "b"] -> {"--steps": ["9"], "--captions": ["a", "b"]}"""
    options = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            options[name] = [value] if equals else []
        else:
            options[name].append(word)
    return options


def defaults_of(options, world):
    """What train.py would fill in for some options, as options: those of a run in this world, or of
    one with shards of its own."""
    # what the other defaults depend on
    rules = options.keys() & {"--batch_size", "--train_data", "--init_from"}
    with redirect_stdout(io.StringIO()):  # it prints them
        args = train.parse(words_of({name: options[name] for name in rules}))
    defaults = {"--workers": ["0"], "--eval_every": [str(10**9)]}  # once more at the end
    for name in ("epochs", "learning_rate", *(SCENES if world else ())):
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        defaults[f"--{name}"] = [str(v).replace("scenes/", "WORLD/") for v in values]
    if world and world.photographs:
        defaults["--zeroshot_data"] = ["WORLD/zeroshot/object"]
    if "--steps" in options:
        del defaults["--epochs"]
    if "--init_from" in options:  # it knows the model
        defaults.pop("--model", None)
    return defaults


def read_command(text, common, world):
    """A command line, and the options that it shares with another one -> a Command."""
    words = shlex.split(text)
    n = 2 if words[0] == "-m" else 1
    options = options_of(shlex.split(common) + words[n:])
    if "--train_data" in options:
        world = None
    options = {**defaults_of(options, world), **options}
    command = Command(f"{text} {common}".strip(), words[:n], options, world)
    return command.with_rate(command.rate())


# -----------------------------------------------------------------------------
# One run


class Task(NamedTuple):
    """A run."""

    command: Command
    seed: int
    probe: bool  # is a linear probe scored, too?

    def __str__(self):
        return f"{self.command.text}, rate {self.command.rate():.3g}, seed {self.seed}"


RUNNING = set()  # processes


def call(words):
    """Run a Python command with one thread. Returns "", or if it has failed its last line."""
    process = subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    RUNNING.add(process)
    output, _ = process.communicate()
    RUNNING.discard(process)
    return output.strip().rpartition("\n")[2] if process.returncode else ""


def train_and_score(task, world, out_dir):
    """Train a model in out_dir, on the world in a folder. Returns a run: a dict of scores, seconds,
    and what the log says of the machine. A run that has diverged has no scores."""
    command = task.command
    options = {**command.options, "--seed": [str(task.seed)], "--out_dir": [out_dir]}
    words = [word.replace("WORLD/", f"{world}/") for word in words_of(options)]
    start = time.perf_counter()
    error = call([*command.program, *words])
    seconds = round(time.perf_counter() - start, 1)
    check(not error or DIVERGED in error, f"{task}: {error}")
    rows = [json.loads(line) for line in open(f"{out_dir}/log.jsonl")]
    header = rows[0]["header"]
    run = {"scores": {}, "seconds": seconds, **{name: header[name] for name in FACTS}}
    if not error:
        run["scores"] = scores_of([row for row in rows if "zeroshot" in row][-1])
        if task.probe:
            run["scores"] |= probe_scores(command, world, out_dir)
    return run


def scores_of(row):
    """The scores of a validation, a row of a log. R@1 is the mean of both ways."""
    scores = {}
    if "validation" in row:
        scores["R@1"] = {**row["validation"]["image_to_text"]["R@1"], "value": row["mean_r1"]}
    for folder, score in row["zeroshot"].items():
        scores[Path(folder).name] = score
    return scores


def probe_scores(command, world, out_dir):
    """Linear probes of the frozen class token and of the mean of the patch tokens."""
    learn, test = PROBES[command.world.kind()]
    options = {
        "--checkpoint": [f"{out_dir}/last.pt"],
        "--train": [f"{world}/{learn}"],
        "--test": [f"{world}/{test}"],
        "--workers": ["0"],
        "--json": [f"{out_dir}/probe.json"],
    }
    error = call([f"{command.folder()}/eval.py", "probe", *words_of(options)])
    check(not error, f"{command.text}: {error}")
    scores = json.loads(Path(out_dir, "probe.json").read_text())
    return {"probe": scores["class token"], "patch probe": scores["patch mean"]}


# -----------------------------------------------------------------------------
# Many runs


class Side(NamedTuple):
    """What was run of one command of an experiment."""

    command: Command
    tried: dict  # learning rate: its runs, one of each seed

    def goals(self):
        """{learning rate: a number of each seed, by which it is judged}"""
        return {rate: [goal(run) for run in runs] for rate, runs in self.tried.items()}

    def rates(self):
        """The rate of each seed, chosen by the others."""
        n = len(next(iter(self.tried.values())))
        return [best_rate(self.goals(), seed) for seed in range(n)]

    def runs(self):
        """The run of each seed, at its rate."""
        return [self.tried[rate][seed] for seed, rate in enumerate(self.rates())]

    def all_runs(self):
        return [run for runs in self.tried.values() for run in runs]

    def seconds(self):
        """The mean time of these runs, as a text."""
        return f"{mean(run['seconds'] for run in self.runs()):.0f}"


class Study:
    """Finished runs, and how to make others."""

    def __init__(self, out, jobs, *paths):
        """out: folder of worlds; jobs: runs at a time, or 0 to read only: then the code of a
        program is the one that has run last; paths: files of runs, of which the first one grows."""
        self.out = out
        self.jobs = jobs
        self.path = paths[0]
        self.runs = {}
        self.codes = {}  # of programs in worlds
        for path in paths:
            path.touch()
            for run in map(json.loads, open(path)):
                self.runs[tuple(run[name] for name in KEY)] = run
                if jobs == 0:
                    self.codes[run["program"], run["world"]] = run["code"]

    def key(self, task):
        """The values of KEY, which tell a run from others."""
        command = task.command
        program = " ".join(command.program)
        world = str(command.world or "")
        if (program, world) not in self.codes:
            self.codes[program, world] = command.code()
        return str(command), world, task.seed, task.probe, self.codes[program, world]

    def run(self, task_and_world):
        """Run a task in the folder of its world. Returns the task and its run."""
        task, world = task_and_world
        with tempfile.TemporaryDirectory(prefix="run-", dir=self.out) as out_dir:
            run = train_and_score(task, world, out_dir)
        key = dict(zip(KEY, self.key(task)))
        check(task.command.code() == key["code"], f"{task}: its code has changed meanwhile")
        return task, {**key, "program": " ".join(task.command.program), **run}

    def work(self, tasks):
        """Run some tasks, each once."""
        pairs = []
        for task in {self.key(task): task for task in tasks}.values():
            world = task.command.world
            pairs.append((task, world and world.draw(self.out, task.seed)))
        with ThreadPool(self.jobs) as pool, tqdm(total=len(pairs), unit="run", smoothing=0) as bar:
            try:
                for task, run in pool.imap_unordered(self.run, pairs):
                    self.runs[self.key(task)] = run
                    with open(self.path, "a") as file:
                        file.write(json.dumps(run) + "\n")
                    tqdm.write(f"{task}: {text_of(run)}, {run['seconds']} s")
                    bar.update()
            finally:  # after a failure, Ctrl-C or a kill
                pool.terminate()  # what has not begun
                for process in [*RUNNING]:
                    process.terminate()
                pool.join()

    def look(self, command, seeds, search, probe):
        """What there is of a side of an experiment, and the list of tasks that it needs next."""
        rates = [command.rate() * factor for factor in (FACTORS if search else (1,))]
        while True:
            tried = {}
            missing = []
            for rate in sorted(rates):
                tasks = [Task(command.with_rate(rate), seed, probe) for seed in range(seeds)]
                tried[rate] = [self.runs.get(self.key(task)) for task in tasks]
                missing += [task for task, run in zip(tasks, tried[rate]) if run is None]
            side = Side(command, tried)
            if missing or not search or not next_rates(side.goals()):
                return side, missing
            rates += next_rates(side.goals())

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
            self.work(todo)


# -----------------------------------------------------------------------------
# Scores, in percent


def value_of(run, name):
    """A score of a run. One that has diverged scores 0."""
    return 100 * run["scores"].get(name, {"value": 0.0})["value"]


def goal(run):
    """What a learning rate is judged by."""
    values = [value_of(run, name) for name in GOALS if name in run["scores"]]
    return mean(values or [0.0])


def has_learned(run):
    """Does a model name the colour and shape of most objects?"""
    return value_of(run, "colour_shape") > 50


def text_of(run):
    scores = [f"{name} {value_of(run, name):.1f}" for name in run["scores"]]
    return ", ".join(scores) or "diverged, scored 0"


# -----------------------------------------------------------------------------
# Which learning rate? Goals are a dict {rate: a number of each seed}.


def best_rate(goals, without=None):
    """The rate with the best mean over the seeds, or over all but one. Of equal ones it is the
    lowest."""

    def total(rate):
        return sum(value for seed, value in enumerate(goals[rate]) if seed != without)

    return max(sorted(goals), key=total)


def next_rates(goals):
    """A list of the rate that a search has to try next, empty if it has seen enough."""
    best = best_rate(goals)
    if len(goals) == MOST_RATES or min(goals) < best < max(goals):
        return []
    return [best / 2] if best == min(goals) else [best * 2]


def rate_texts(side):
    """What is to be known of each rate that was tried: the mean that it is judged by, and for how
    many seeds it was taken, learned the objects, diverged."""
    texts = []
    for rate, runs in side.tried.items():
        taken = side.rates().count(rate)
        learned = sum(map(has_learned, runs))
        diverged = sum(not run["scores"] for run in runs)
        average = mean(map(goal, runs))
        texts.append(f"{rate:.3g}: {average:.1f} ({taken}, {learned}, {diverged})")
    return texts


# -----------------------------------------------------------------------------
# Differences


class Difference(NamedTuple):
    """Two means, and the mean of the differences with half of its 95 % interval and its standard
    error."""

    chance: float
    a: float
    b: float
    mean: float
    half: float
    error: float

    def __str__(self):
        return f"{self.mean:+.1f} ± {self.half:.1f}"

    def excludes_0(self):
        return abs(self.mean) > self.half


def difference(sides, name):
    """Compare a score of two sides, paired by seed."""
    a, b = [[value_of(run, name) for run in side.runs()] for side in sides]
    differences = [y - x for x, y in zip(a, b)]
    n = len(differences)
    chance = 100 * known_scores(sides)[name]["chance"]
    error = stdev(differences) / math.sqrt(n)
    half = QUANTILES[n - 2] * error
    return Difference(chance, mean(a), mean(b), mean(differences), half, error)


def known_scores(sides):
    """The scores of a run that has not diverged."""
    return max((run["scores"] for side in sides for run in side.runs()), key=len)


# -----------------------------------------------------------------------------
# The command


LINE = "{:14s}{:>8s}{:>8s}{:>8s}   {:16s} {}"


def print_sides(sides):
    for side in sides:
        print(f"\n{side.command.text}: the best of {len(side.tried)} rates tried")
        print("rate: mean of R@1 and a zero-shot score (seeds that it was taken for,")
        print("seeds that learned the objects, seeds that diverged and score 0)")
        print(*rate_texts(side), sep="\n")
    scores = known_scores(sides)
    print(f"\n{len(scores)} scores are compared, in percent, as means over the seeds\n")
    print(LINE.format("", "chance", "a", "b", "b - a", ""))
    for name in scores:
        found = difference(sides, name)
        levels = [f"{level:.1f}" for level in found[:3]]
        note = "excludes 0 (uncorrected)" if found.excludes_0() else ""
        print(LINE.format(name, *levels, str(found), note))
    print(LINE.format("seconds", "", *map(Side.seconds, sides), "", ""))


def make_options():
    """The parser of an experiment."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--a", required=True, metavar="COMMAND", help='such as "train.py --cls_weight 0"')
    add("--b", required=True, metavar="COMMAND", help='such as "../fork/train.py"')
    add("--common", default="", metavar="OPTIONS", help="options of both")
    add("--seeds", type=number(int, 2, 20), default=5, help="runs of each (default 5)")
    add("--rates", action="store_true", help="search the learning rate of both, four rates each")
    add("--probe", action="store_true", help="score a linear probe, too")
    add("--settings", type=number(int, 1, 256), default=256, help="of the world (default 256)")
    text = "draw a world of photographs: see study/objects.py"
    add("--photographs", default="", metavar="DIR", help=text)
    add_shared(parser)
    return parser


def add_shared(parser):
    """Options that plan.py has, too."""
    jobs = 1 if torch.cuda.is_available() else data.cores()
    text = "runs at a time (default: the cores, or 1 with a GPU)"
    parser.add_argument("--jobs", type=number(int, 1), default=jobs, help=text)
    text = "folder of worlds and of what is running (default out_study)"
    parser.add_argument("--out", type=Path, default="out_study", metavar="DIR", help=text)


def run_experiment(study, args):
    """Do what the options of an experiment say. Returns its two Sides."""
    world = World(args.settings, args.photographs)
    pair = [read_command(text, args.common, world) for text in (args.a, args.b)]
    return study.experiment(pair, args.seeds, args.rates, args.probe)


def open_out(out):
    """Make the folder of a study, and let a kill end its runs as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out.mkdir(parents=True, exist_ok=True)
    lock_folder(out)


def main(argv):
    args = make_options().parse_args(argv)
    open_out(args.out)
    study = Study(args.out, args.jobs, args.out / "runs.jsonl", PUBLISHED)
    print_sides(run_experiment(study, args))


if __name__ == "__main__":
    run_command(main)
