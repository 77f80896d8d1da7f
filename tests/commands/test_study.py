"""Test the study: how two commands are compared, and what the experiments train with."""

import copy
import importlib
import json
import re
import shutil
import signal
import subprocess
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from material import cases, run, small_model

import superclip
import train
from common import scenes
from common.cli import InputError
from common.tokenizer import Tokenizer
from study import compare, shuffled

# ---- compare


def test_an_interval_is_students():
    """The differences 1, 2, 3 have a standard deviation of 1. Student's t is 4.303."""
    assert compare.interval([1, 2, 3]) == pytest.approx((2, 4.303 / 3**0.5), rel=1e-3)


def test_the_sign_flip_test_counts_all_patterns_of_signs():
    """Of 16 patterns, those with the sum 6 or more are the two of 1 + 2 + 3 with 0 added or taken,
    and their opposites."""
    assert compare.sign_flip([1, 2, 3, 0]) == 4 / 16
    assert compare.sign_flip([-1, 2, 3, 4]) == 4 / 16  # 8 and 10, and their opposites


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Let a comparison train in this process, because a new one would take seconds to import torch.
    Return a list, to which each training adds the name of its folder."""
    trained = []

    class Popen:
        def __init__(self, words, stdout, **_):
            trained.append(Path(stdout.name).parent.name)
            with redirect_stdout(stdout), redirect_stderr(stdout):
                self.returncode = run(train.main, *words[2:])

        def poll(self):
            return self.returncode

    # Replace Popen here alone, because a training calls git.
    stub = SimpleNamespace(Popen=Popen, DEVNULL=None, STDOUT=None)
    monkeypatch.setattr(compare, "subprocess", stub)
    monkeypatch.chdir(tmp_path)
    return trained


@pytest.fixture
def options(shards, folders):
    """Return the options of a run of two steps."""
    data = f"--train_data {shards}/train-*.tar --val_data {shards}/val-*.tar"
    return f"{data} --zeroshot_data {folders} --steps 2 --model tiny --batch_size 8 --no-compile"


def test_a_comparison_prints_every_score_and_goes_on_after_it_was_stopped(
    options, folders, trained, capsys
):
    """A run that diverges counts as 0. Before the second call, a-5 is missing, and a-6 looks as if
    the comparison was killed when a-6 had trained."""
    large = "--learning_rate 1e12 --weight_decay 1e12"
    sides = ["--a", f"train.py {options}", "--b", f"train.py {large} {options}"]
    Path("out_study/compare").mkdir(parents=True)  # there is another comparison
    Path("train.py").touch()  # its training is a call of train.main

    compare.main([*sides, "--seeds", "5-6", "--jobs", "1"])

    printed = capsys.readouterr().out
    assert all(name in printed for name in ("R@1", "R@10", folders.name))
    assert "count as 0: b-5 b-6" in printed
    assert re.search(r"R@10 .* 0\.0 .* 0 of 2", printed), printed
    assert trained == ["a-5", "b-5", "a-6", "b-6"]
    folder = Path("out_study/compare_2")
    kept = {file.name for file in (folder / "a-5").iterdir()}
    assert kept == {"log.jsonl", "output.txt", "scores.json"}
    shutil.rmtree(folder / "a-5")
    shutil.rmtree(folder / "a-6")
    last = f"--seed 6 --eval_every {10**9} --out_dir {folder}/a-6"
    train.main(f"{options} {last}".split())
    trained.clear()
    capsys.readouterr()

    compare.main(["--resume", str(folder)])

    table = printed.partition("in percent")[2]
    assert trained == ["a-5", "a-6"]
    assert capsys.readouterr().out.partition("in percent")[2] == table


FAILS = "raise SystemExit('error: no such file')"
WAITS = """
import os
import time
from pathlib import Path

Path("started.tmp").write_text(str(os.getpid()))
Path("started.tmp").rename("started")
time.sleep(120)
"""
ENDS = {  # case -> a signal or None, and what the comparison raises
    "a training fails": (None, InputError),
    "Ctrl-C": (signal.SIGINT, KeyboardInterrupt),
    "a scheduler": (signal.SIGTERM, SystemExit),
}


@cases("number, error", ENDS)
def test_a_comparison_that_ends_early_ends_the_trainings_that_it_has_started(
    number, error, monkeypatch, tmp_path
):
    """The other training would take minutes."""
    monkeypatch.chdir(tmp_path)
    for path, text in (("a/train.py", WAITS), ("b/train.py", FAILS)):
        Path(path).parent.mkdir()
        Path(path).write_text(text)
    started = []

    def note(*args, popen=subprocess.Popen, **options):
        started.append(popen(*args, **options))
        return started[-1]

    def wait(seconds, sleep=time.sleep):
        while not Path("started").exists():
            sleep(seconds)
        if number:
            signal.raise_signal(number)

    monkeypatch.setattr(subprocess, "Popen", note)
    monkeypatch.setattr(time, "sleep", wait)
    commands = [f"{side}/train.py --train_data none" for side in "ab"]

    with pytest.raises(error):
        compare.main(["--a", commands[0], "--b", commands[1], "--jobs", "2"])

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert len(started) == 2 and all(process.poll() is not None for process in started)


TRAINS = """
import json
import sys

[data, folder] = [sys.argv[sys.argv.index(name) + 1] for name in ("--train_data", "--out_dir")]
header = {"commit": "old", "device": "cpu", "dtype": "float32", "torch": "2"}
row = {"step": 1, "zeroshot": {"shape": {"value": len(open(data).read()) / 100, "chance": 0.1}}}
with open(f"{folder}/log.jsonl", "w") as log:
    print(json.dumps({"step": 0, "header": header}), file=log)
    print(json.dumps(row), file=log)
"""


OLD = {"commit": "old", "device": "cpu", "dtype": "float32", "torch": "2"}
NEW = {**OLD, "commit": "new"}
HALF = {**OLD, "dtype": "float16"}
MIXTURES = {  # case -> {run: its headers, if not OLD alone}, what differs, and in which runs
    "code that changed": ({"a-6": [NEW]}, "commit", ["old: a-5", "new: a-6"]),
    "a resumed run": ({"b-5": [OLD, NEW], "b-6": [NEW]}, "commit", ["old: b-5", "new: b-5 b-6"]),
    "a fork": ({"b-5": [NEW], "b-6": [NEW]}, "", []),
    "sides": ({"b-5": [HALF], "b-6": [HALF]}, "dtype", ["float32: a-5 a-6", "float16: b-5 b-6"]),
}


@cases("headers, fact, lines", MIXTURES)
def test_a_warning_below_the_table_names_what_runs_do_not_share(
    headers, fact, lines, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAINS)
    command = "train.py --train_data train.py"
    compare.main(["--a", command, "--b", command, "--seeds", "5-6", "--jobs", "4"])
    assert "WARNING" not in capsys.readouterr().out
    for name, several in headers.items():
        rows = [json.dumps({"step": 0, "header": header}) for header in several]
        Path("out_study/compare", name, "log.jsonl").write_text("\n".join(rows))

    compare.main(["--resume", "out_study/compare"])

    warning = capsys.readouterr().out.partition("WARNING")[2]
    assert fact in warning
    assert [line.strip() for line in warning.splitlines()[1:]] == lines


# ---- experiments

TOKENIZER = Tokenizer(scenes.vocabulary())
RED, STAR = TOKENIZER.encode("red star")
IMAGES = torch.arange(3 * 3 * 16 * 16).view(3, 3, 16, 16) % 256
# Experiment: the loss of the head for the caption "red star". x: its logits, p: their log softmax
EXPERIMENTS = {
    "no_idf": lambda x, p: -(p[RED] + p[STAR]) / 2,
    "some_words --hears colours": lambda x, p: -p[RED],
    "some_words --hears shapes": lambda x, p: -p[STAR],
    "yes_no": lambda x, p: F.softplus(x[1:-2]).sum() - x[RED] - x[STAR],
}


@pytest.fixture
def model(monkeypatch):
    """Return a model in training. Let train.main train nothing, and after the test restore what an
    experiment has replaced or added."""
    monkeypatch.setattr(train, "main", lambda argv: argv)
    monkeypatch.setattr(train, "OPTIONS", {**train.OPTIONS})
    for name in ("classification_loss", "idf"):
        monkeypatch.setattr(superclip, name, getattr(superclip, name))
    return small_model(vocab_size=TOKENIZER.vocab_size).train()


@pytest.mark.parametrize("command", EXPERIMENTS)
def test_an_experiment_trains_with_its_own_loss(command, model):
    """After this batch, IDF gives "red" the weight ln 4, and "star" ln 2."""
    name, *options = command.split()
    model.num_captions.fill_(6)
    model.token_counts.fill_(6)
    model.token_counts[RED], model.token_counts[STAR] = 0, 2
    images = IMAGES[:1].byte()
    [logits] = model.word_logits(images)

    rest = importlib.import_module(f"study.{name}").main([*options, "--steps", "2"])

    losses = model(images, TOKENIZER(["red star"], 8))
    expected = EXPERIMENTS[command](logits, logits.log_softmax(dim=0))
    torch.testing.assert_close(losses["classification_loss"], expected)
    assert rest == [*options, "--steps", "2"]


def test_the_control_is_asked_for_the_words_of_the_next_pair(model):
    images = IMAGES.byte()
    tokens = TOKENIZER(["a red star", "a blue ring", "a cross"], 8)
    expected = copy.deepcopy(model)(images, tokens, label_tokens=tokens[[1, 2, 0]])

    shuffled.main([])

    assert model(images, tokens) == expected
