"""Test the study: how two commands are compared, and what the experiments train with."""

import importlib
import re
import signal
import subprocess
import time
from itertools import product
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from material import cases, rows_of

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
    """The slow formula makes each of the 2**8 patterns. A tie is not ahead."""
    differences = [3.1, -0.5, 0.0, 2.2, 0.7, -1.1, 4.0, 0.7]
    sums = [
        abs(sum(sign * x for sign, x in zip(signs, differences)))
        for signs in product((1, -1), repeat=8)
    ]

    p = compare.sign_flip(differences)

    assert p == mean(x >= sum(differences) - 1e-6 for x in sums)
    assert compare.sign_flip([1, 2, 3, 4]) == 2 / 2**4  # this pattern and its opposite
    assert compare.ahead(differences) == "5 of 8"


@pytest.fixture
def trained(children, monkeypatch, tmp_path):
    """Fork the trainings of a comparison, because each new process would take seconds to import
    torch. Return a list, to which each of them adds the name of its folder."""
    trained = []

    class Popen:
        def __init__(self, words, stdout, **_):
            self.process = children.start(Path(words[1]).stem, words[2:])
            self.output = Path(stdout.name)
            trained.append(self.output.parent.name)

        def poll(self):
            self.returncode = self.process.exitcode
            if self.returncode is not None:
                self.output.write_text(self.process.output.read_text())
            return self.returncode

    monkeypatch.setattr(subprocess, "Popen", Popen)
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
    """A run that diverges counts as 0. Before the second call we let one run look unfinished."""
    large = "--learning_rate 1e12 --weight_decay 1e12"
    sides = ["--a", f"train.py {options}", "--b", f"train.py {large} {options}"]
    Path("out_study/compare").mkdir(parents=True)  # there is another comparison

    compare.main([*sides, "--seeds", "5-6", "--jobs", "1"])

    printed = capsys.readouterr().out
    assert all(name in printed for name in ("R@1", "R@10", folders.name))
    assert "count as 0: b-5, b-6" in printed
    assert re.search(r"R@10 .* 0\.0 .* 0 of 2", printed), printed
    assert trained == ["a-5", "b-5", "a-6", "b-6"]
    folder = Path("out_study/compare_2")
    assert {file.name for file in (folder / "a-5").iterdir()} == KEPT
    (folder / "a-6" / "scores.json").unlink()
    trained.clear()

    compare.main(["--resume", str(folder)])

    table = printed.partition("in percent")[2]
    assert trained == ["a-6"]
    assert capsys.readouterr().out.partition("in percent")[2] == table


KEPT = {"log.jsonl", "output.txt", "scores.json"}
FAILS = "raise SystemExit('error: no such file')"
WAITS = """
import time
from pathlib import Path

Path("started").touch()
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


# ---- experiments


@pytest.fixture
def restored(monkeypatch):
    """After the test, restore the functions that an experiment has replaced."""
    for owner, name in ((superclip, "classification_loss"), (superclip, "idf")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.fixture
def replaced(restored, monkeypatch):
    """Let train.main train nothing."""
    monkeypatch.setattr(train, "main", lambda argv: argv)


TOKENIZER = Tokenizer(scenes.vocabulary())
V = TOKENIZER.vocab_size
RED, STAR = TOKENIZER.encode("red star")
LOGITS = torch.randn(V)
LOG_P = LOGITS.log_softmax(dim=0)
# Experiment: its loss for the caption "red star". Its words weigh ln 4 and ln 2 by IDF.
EXPERIMENTS = {
    "no_idf": -(LOG_P[RED] + LOG_P[STAR]) / 2,
    "some_words --hears colours": -LOG_P[RED],
    "some_words --hears shapes": -LOG_P[STAR],
    "yes_no": F.softplus(LOGITS[1:-2]).sum() - LOGITS[RED] - LOGITS[STAR],
}


def first_row(main, options, scenes_folder, out):
    """Train two steps with main(argv). Return what the first step logs."""
    data = f"--train_data {scenes_folder}/train-*.tar --val_data none --captions json.long"
    run = f"{data} --model tiny --batch_size 8 --steps 2 --log_every 1 --workers 0 --device cpu"
    main([*options, *run.split(), "--dtype", "float32", "--out_dir", str(out)])
    return rows_of(out, "loss")[0]


@pytest.mark.parametrize("command", EXPERIMENTS)
def test_an_experiment_trains_with_its_own_loss(command, restored, scenes_folder, tmp_path):
    """In the first step the weights are still equal, so only the loss of the head differs."""
    name, *options = command.split()
    experiment = importlib.import_module(f"study.{name}")
    token_counts = torch.full((V,), 7)
    token_counts[RED], token_counts[STAR] = 1, 3

    plain = first_row(train.main, [], scenes_folder, tmp_path / "plain")
    row = first_row(experiment.main, options, scenes_folder, tmp_path / "experiment")

    token_weights = superclip.idf(torch.tensor(7), token_counts)
    loss = superclip.classification_loss(LOGITS[None], TOKENIZER(["red star"], 8), token_weights)
    torch.testing.assert_close(loss, EXPERIMENTS[command])
    assert row["contrastive_loss"] == plain["contrastive_loss"]
    assert row["classification_loss"] != plain["classification_loss"]


def test_the_control_is_asked_for_the_words_of_another_pair(replaced):
    """The three captions consist of the words 1, 2 and 3. The tokens 4 and 5 are start and end."""
    captions = torch.tensor([[4, 1, 2, 5], [4, 3, 5, 0], [4, 1, 5, 0]])
    logits, weights = torch.rand(3, 6), torch.rand(6)
    expected = superclip.classification_loss(logits, captions[[1, 2, 0]], weights)

    shuffled.main([])

    assert superclip.classification_loss(logits, captions, weights) == expected
