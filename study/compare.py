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
import functools
import hashlib
import io
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from multiprocessing.pool import ThreadPool
from pathlib import Path
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
# What a linear probe learns from, and what it is scored on.
PROBES = {
    "scenes": ("zeroshot/colour_shape", "zeroshot/held_out"),
    "objects": ("learn", "zeroshot/object"),
}
# What is kept of the header of a log.
FACTS = ("pairs", "parameters", "steps", "device", "dtype", "torch", "commit", "date")

# -----------------------------------------------------------------------------
# Code


def module_file(folder, name):
    return Path(folder, name.replace(".", "/") + ".py")


def imported_names(path):
    """The modules that a file may import: "a" and "a.b" for "from a import b", because b may be a
    module, too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
            names.append(f"{node.module}")
    return names


def without_docstrings(path):
    """The code of a file as a text without comments, docstrings and layout."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        can_have_one = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if can_have_one and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)


def code_of(path, folder):
    """A hash of a program: of its file, of those in its folder that it imports, and so on."""
    found = set()
    todo = [path]
    while todo:
        file = todo.pop()
        if file.is_file() and file not in found:
            found.add(file)
            todo += [module_file(folder, name) for name in imported_names(file)]
    texts = [f"{file.relative_to(folder)}\n{without_docstrings(file)}\n" for file in sorted(found)]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:8]


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
        file = "study/objects.py" if self.photographs else "scripts/scenes.py"
        return code_of(Path(file), Path("."))

    def draw(self, out, seed):
        """The folder of this world, which is drawn if it is not there."""
        digest = hashlib.sha256(f"{self} {self.code()}".encode()).hexdigest()[:8]
        folder = out / f"{self.kind()}-{self.settings}-{seed}-{digest}"
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
    program: str  # "train.py" or "-m study.groups"
    options: dict  # name: list of values, all that matter. WORLD stands for the folder of the world
    world: World  # or None if it has shards of its own

    def __str__(self):
        """The whole line. The options are sorted, so that equal commands are equal texts."""
        return " ".join([self.program, *map(shlex.quote, words_of(self.options))])

    def folder(self):
        """Where its code is."""
        return Path(".") if self.program.startswith("-m ") else Path(self.program).parent

    def file(self):
        if self.program.startswith("-m "):
            return module_file(".", self.program[3:])
        return Path(self.program)

    def code(self):
        own = code_of(self.file(), self.folder())
        return f"{own}-{self.world.code()}" if self.world else own

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
            check(options, f"{word!r} is no option")
            options[name].append(word)
    return options


def defaults_of(options, world):
    """What train.py would fill in for some options, as options: those of a run in this world, or of
    one with shards of its own."""
    names = ["learning_rate"]
    if world:
        names += SCENES
    if "--steps" not in options:
        names.append("epochs")
    rules = ("--batch_size", "--train_data", "--init_from")  # what these defaults depend on
    given = {name: options[name] for name in rules if name in options}
    with redirect_stdout(io.StringIO()):  # it prints them
        args = train.parse(words_of(given))
    defaults = {"--workers": ["0"], "--eval_every": [str(10**9)]}  # once more at the end
    for name in names:
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        defaults[f"--{name}"] = [str(v).replace("scenes/", "WORLD/") for v in values]
    if world and world.photographs:
        defaults["--zeroshot_data"] = ["WORLD/zeroshot/object"]
    return defaults


def read_command(text, common="", world=World()):  # noqa: B008
    """A command line, and the options that it shares with another one -> a Command."""
    words = shlex.split(text.removeprefix("python "))
    n = 2 if words[:1] == ["-m"] else 1
    options = options_of(shlex.split(common) + words[n:])
    unwanted = options.keys() & {"--seed", "--out_dir", "--resume"}
    check(not unwanted, f"{text!r}: leave out {' and '.join(unwanted)}")
    if "--train_data" in options:
        world = None
    options = {**defaults_of(options, world), **options}
    command = Command(f"{text} {common}".strip(), " ".join(words[:n]), options, world)
    check(command.file().is_file(), f"{text!r}: there is no program {command.file()}")
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
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([sys.executable, *words], env=environ, text=True, **pipes)
    RUNNING.add(process)
    output, _ = process.communicate()
    RUNNING.discard(process)
    if process.returncode == 0:
        return ""
    return output.strip().rpartition("\n")[2] or f"exit code {process.returncode}"


def train_and_score(task, world, out_dir):
    """Train a model in out_dir, on the world in a folder. Returns a run: a dict of scores, seconds,
    and what the log says of the machine. A run that has diverged has no scores."""
    command = task.command
    options = {**command.options, "--seed": [str(task.seed)], "--out_dir": [out_dir]}
    words = [word.replace("WORLD/", f"{world}/") for word in words_of(options)]
    start = time.perf_counter()
    error = call([*command.program.split(), *words])
    seconds = time.perf_counter() - start
    check(not error or DIVERGED in error, f"{task}: {error}")
    rows = [json.loads(line) for line in open(f"{out_dir}/log.jsonl")]
    scores = {}
    if not error:
        scores = last_scores(rows)
        if task.probe:
            scores |= probe_scores(command, world, out_dir)
    for score in scores.values():
        del score["interval"]  # of one run, and not of the seeds
    header = rows[0]["header"]
    facts = {name: header[name] for name in FACTS}
    return {"scores": scores, "seconds": round(seconds, 1), **facts}


def last_scores(rows):
    """The scores of the last validation in a log. R@k are means of both ways."""
    row = [row for row in rows if "zeroshot" in row][-1]
    scores = {}
    if "validation" in row:
        one_way, other_way = row["validation"].values()
        for name, score in one_way.items():
            mean = (score["value"] + other_way[name]["value"]) / 2
            scores[name] = {**score, "value": mean}
    for folder, score in row["zeroshot"].items():
        scores[Path(folder).name] = score
    return scores


def probe_scores(command, world, out_dir):
    """Linear probes of the frozen class token and of the mean of the patch tokens."""
    learn, test = PROBES[command.world.kind()]
    found = f"{out_dir}/probe.json"
    words = [f"{command.folder()}/eval.py", "probe", "--workers", "0", "--json", found]
    words += ["--checkpoint", f"{out_dir}/last.pt"]
    words += ["--train", f"{world}/{learn}", "--test", f"{world}/{test}"]
    error = call(words)
    check(not error, f"{command.text}: {error}")
    scores = json.loads(Path(found).read_text())
    return {"probe": scores["class token"], "patch probe": scores["patch mean"]}


# -----------------------------------------------------------------------------
# Many runs


class Unfinished(Exception):
    """A run is missing, and nothing is to be run."""


class Side(NamedTuple):
    """What was run of one command of an experiment."""

    command: Command
    tried: dict  # learning rate: its runs, one of each seed

    def goals(self):
        """{learning rate: a number of each seed, by which it is judged}"""
        return {rate: [goal(run) for run in runs] for rate, runs in self.tried.items()}

    def rates(self):
        """The rate of each seed."""
        return rates_of_seeds(self.goals())

    def runs(self):
        """The run of each seed, at its rate."""
        return [self.tried[rate][seed] for seed, rate in enumerate(self.rates())]


class Study:
    """Finished runs, and how to make others."""

    def __init__(self, out, jobs, *paths):
        """out: folder of worlds; jobs: runs at a time, or 0 to read only: then the code of a
        program is the one that has run last; paths: files of runs, of which the first one grows."""
        self.out = out
        self.jobs = jobs
        self.path = paths[0]
        self.runs = []
        self.codes = {}  # of programs in worlds
        for path in paths:
            if path.exists():
                self.runs += [json.loads(line) for line in path.read_text().splitlines()]
        if jobs == 0:
            for run in self.runs:
                self.codes[run["program"], run["world"]] = run["code"]

    def key(self, task):
        """What tells a run from others, as a dict."""
        command = task.command
        world = str(command.world or "")
        if (command.program, world) not in self.codes:
            self.codes[command.program, world] = command.code()
        return {
            "command": str(command),
            "world": world,
            "seed": task.seed,
            "probe": task.probe,
            "code": self.codes[command.program, world],
        }

    def find(self, task):
        """The finished run of a task, or None."""
        key = self.key(task)
        return next((run for run in self.runs if key.items() <= run.items()), None)

    def run(self, task_and_world):
        """Run a task in the folder of its world. Returns the task and its run."""
        task, world = task_and_world
        with tempfile.TemporaryDirectory(prefix="run-", dir=self.out) as out_dir:
            run = train_and_score(task, world, out_dir)
        key = self.key(task)
        check(task.command.code() == key["code"], f"{task}: its code has changed meanwhile")
        return task, {**key, "program": task.command.program, **run}

    def work(self, tasks):
        """Run those of some tasks that are not finished."""
        todo = {}
        for task in tasks:
            if self.find(task) is None:
                todo[str(self.key(task))] = task  # both commands may share a run
        if todo and self.jobs == 0:
            raise Unfinished
        pairs = []
        for task in todo.values():
            world = task.command.world
            pairs.append((task, world and world.draw(self.out, task.seed)))
        bar = tqdm(total=len(pairs), unit="run", smoothing=0, disable=not pairs)
        with ThreadPool(max(1, self.jobs)) as pool:
            try:
                for task, run in pool.imap_unordered(self.run, pairs):
                    self.runs.append(run)
                    with open(self.path, "a") as file:
                        file.write(json.dumps(run) + "\n")
                    tqdm.write(f"{task}: {text_of(run)}")
                    bar.update()
            finally:  # after a failure, Ctrl-C or a kill
                pool.terminate()  # what has not begun
                for process in [*RUNNING]:
                    process.terminate()
                pool.join()
                bar.close()

    def experiment(self, pair, seeds, search, probe=False):
        """Run a pair of commands with each seed, at their own rates or at those that a search
        tries. Returns a list of two Sides."""
        factors = FACTORS if search else (1,)
        grids = [[command.rate() * factor for factor in factors] for command in pair]
        while True:
            todo = []
            sides = []
            for command, rates in zip(pair, grids):
                side = Side(command, {})
                for rate in sorted(rates):
                    kind = command.with_rate(rate)
                    side.tried[rate] = [Task(kind, seed, probe) for seed in range(seeds)]
                    todo += side.tried[rate]
                sides.append(side)
            self.work(todo)
            is_complete = True
            for side, rates in zip(sides, grids):
                for rate, tasks in side.tried.items():
                    side.tried[rate] = [self.find(task) for task in tasks]
                more = next_rate(side.goals()) if search else None
                if more is not None:
                    rates.append(more)
                    is_complete = False
            if is_complete:
                return sides


# -----------------------------------------------------------------------------
# Scores, in percent


def value_of(run, name):
    """A score of a run. One that has diverged scores 0."""
    return 100 * run["scores"].get(name, {"value": 0.0})["value"]


def goal(run):
    """What a learning rate is judged by."""
    values = [value_of(run, name) for name in GOALS if name in run["scores"]]
    return statistics.mean(values or [0.0])


def text_of(run):
    scores = [f"{name} {value_of(run, name):.1f}" for name in run["scores"]]
    return f"{', '.join(scores) or 'diverged, scored 0'} ({run['seconds']:.0f} s)"


def mean_seconds(runs):
    return statistics.mean(run["seconds"] for run in runs)


# -----------------------------------------------------------------------------
# Which learning rate? Goals are a dict {rate: a number of each seed}.


def best_rate(goals):
    """The rate with the best mean. Of equal ones it is the lowest."""
    return max(sorted(goals), key=lambda rate: statistics.mean(goals[rate]))


def rates_of_seeds(goals):
    """The rate of each seed: the one with the best mean over all other seeds."""
    n = len(next(iter(goals.values())))
    rates = []
    for seed in range(n):
        others = {rate: row[:seed] + row[seed + 1 :] for rate, row in goals.items()}
        rates.append(best_rate(others))
    return rates


def next_rate(goals):
    """The rate that a search has to try next, or None if it has seen enough."""
    best = best_rate(goals)
    if len(goals) == MOST_RATES:
        return None
    if best == min(goals):
        return best / 2
    if best == max(goals):
        return best * 2
    return None


def rate_rows(side):
    """What is to be known of each rate that was tried, a list of texts: the rate, the mean that it
    is judged by, for how many seeds it was taken, how many of them learned the objects (colour +
    shape above half), how many diverged."""
    taken = side.rates()
    rows = []
    for rate, runs in side.tried.items():
        mean = statistics.mean(map(goal, runs))
        learned = sum(value_of(run, "colour_shape") > 50 for run in runs)
        diverged = sum(not run["scores"] for run in runs)
        counts = [f"{count} of {len(runs)}" for count in (taken.count(rate), learned, diverged)]
        rows.append([f"{rate:.3g}", f"{mean:.1f}", *counts])
    return rows


# -----------------------------------------------------------------------------
# Differences


def chance_of(t, n):
    """The probability that a mean of n differences is t standard errors from 0, or farther, if
    there is none: both tails of Student's distribution with n - 1 degrees of freedom. For the angle
    x with t = sqrt(n - 1) tan x, its density is proportional to cos(x) ** (n - 2)."""

    def area(low, steps=2000):
        width = (math.pi / 2 - low) / steps
        return width * sum(math.cos(low + (i + 0.5) * width) ** (n - 2) for i in range(steps))

    return area(math.atan(t / math.sqrt(n - 1))) / area(0)


@functools.cache
def quantile(n):
    """So many standard errors around a mean of n make a 95 % interval, by bisection."""
    low = 0.0
    high = 20.0
    for _ in range(40):
        middle = (low + high) / 2
        if chance_of(middle, n) > 0.05:
            low = middle
        else:
            high = middle
    return low


class Difference(NamedTuple):
    """Two means, and the mean of n differences with its standard error."""

    a: float
    b: float
    mean: float
    error: float
    n: int

    def __str__(self):
        return f"{self.mean:+.1f} ± {self.half():.1f}"

    def half(self):
        """Half of the 95 % interval."""
        return quantile(self.n) * self.error

    def excludes_0(self):
        return abs(self.mean) > self.half()

    def p(self):
        """The probability of such a mean, or of a larger one, if there is no difference."""
        return chance_of(abs(self.mean) / max(self.error, 1e-9), self.n)


def difference(one, other, name):
    """Compare a score of two lists of runs, paired by seed."""
    a = [value_of(run, name) for run in one]
    b = [value_of(run, name) for run in other]
    differences = [y - x for x, y in zip(a, b)]
    n = len(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    return Difference(
        statistics.mean(a), statistics.mean(b), statistics.mean(differences), error, n
    )


# -----------------------------------------------------------------------------
# The command


def print_rates(side):
    print(f"\nlearning rates of {side.command.text}")
    print("rate        mean   taken by   objects learned by   diverged (scored 0)")
    for row in rate_rows(side):
        print("{:10s}{:>6s}   {:8s}   {:18s}   {}".format(*row))
    best = best_rate(side.goals())
    print(f"{best:.3g} is the best of {len(side.tried)} rates tried")


def print_sides(sides):
    one, other = [side.runs() for side in sides]
    scores = max((run["scores"] for run in one + other), key=len)  # of one that has not diverged
    print(f"\na: {sides[0].command.text}\nb: {sides[1].command.text}")
    print(f"{len(one)} seeds, in percent. {len(scores)} scores are compared, and the intervals are")
    print("not corrected for their number.\n")
    print(f"{'':14s}{'chance':>8s}{'a':>8s}{'b':>8s}   b - a")
    for name, score in scores.items():
        found = difference(one, other, name)
        note = "excludes 0 (uncorrected)" if found.excludes_0() else ""
        chance = 100 * score["chance"]
        print(f"{name:14s}{chance:8.1f}{found.a:8.1f}{found.b:8.1f}   {str(found):15s} {note}")
    print(f"{'seconds':22s}{mean_seconds(one):8.0f}{mean_seconds(other):8.0f}")
    for name, runs in zip("ab", (one, other)):
        diverged = sum(not run["scores"] for run in runs)
        if diverged > 0:
            print(f"{diverged} of these runs of {name} diverged, and score 0")


def add_shared(parser):
    """Options that plan.py has, too."""
    jobs = 1 if torch.cuda.is_available() else data.cores()
    text = "runs at a time (default: the cores, or 1 with a GPU)"
    parser.add_argument("--jobs", type=number(int, 1), default=jobs, help=text)
    text = "folder of worlds and of what is running (default out_study)"
    parser.add_argument("--out", type=Path, default="out_study", metavar="DIR", help=text)


def open_out(out):
    """Make the folder of a study, and let a kill end its runs as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out.mkdir(parents=True, exist_ok=True)
    lock_folder(out)


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--a", required=True, metavar="COMMAND", help='such as "train.py --cls_weight 0"')
    add("--b", required=True, metavar="COMMAND", help='such as "../fork/train.py"')
    add("--common", default="", metavar="OPTIONS", help="options of both")
    add("--seeds", type=number(int, 2), default=5, help="runs of each, two or more (default 5)")
    add("--rates", action="store_true", help="search the learning rate of both, four rates each")
    add("--probe", action="store_true", help="score a linear probe, too")
    add("--settings", type=number(int, 1, 256), default=256, help="of the world (default 256)")
    text = "draw a world of photographs: see study/objects.py"
    add("--photographs", default="", metavar="DIR", help=text)
    add_shared(parser)
    args = parser.parse_args(argv)
    world = World(args.settings, args.photographs)
    pair = [read_command(text, args.common, world) for text in (args.a, args.b)]
    open_out(args.out)
    study = Study(args.out, args.jobs, args.out / "runs.jsonl", PUBLISHED)
    sides = study.experiment(pair, args.seeds, args.rates, args.probe)
    if args.rates:
        for side in sides:
            print_rates(side)
    print_sides(sides)


if __name__ == "__main__":
    run_command(main)
