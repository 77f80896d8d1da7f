"""Two processes of one run: they do what one does, they refuse to differ, and they leave together.

Each is told by its environment that torchrun has started it. test_step.py compares gradients."""

import os
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from children import before, finish, in_step, receive
from material import checkpoint_of, losses_of, short_run, steps_of, validations_of

import train

pytestmark = pytest.mark.usefixtures("smallest")


@pytest.mark.parametrize("options", [[], ["--micro_batch_size", 4]], ids=["plain", "micro"])
def test_two_processes_do_what_one_does(children, shards, tmp_path, options):
    """The same weights, counts and log. Bad samples are replaced in the process that meets them.
    The rate is low, because Adam makes much of the smallest difference."""
    options = ["--train_data", shards / "bad-0.tar", "--learning_rate", 1e-5, *options]
    options += ["--patch_dropout", 0.5]
    train.main(short_run(shards, tmp_path / "one", *options))

    first, second = children.train_two(short_run(shards, tmp_path / "two", *options))

    code, printed = finish(first)
    other_code, other_printed = finish(second)
    assert (code, other_code) == (0, 0), printed
    assert "step " in printed
    assert "step " not in other_printed  # one speaks for both
    ours = checkpoint_of(tmp_path / "one")["model"]
    theirs = checkpoint_of(tmp_path / "two")["model"]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    rows = zip(losses_of(tmp_path / "one"), losses_of(tmp_path / "two"), strict=True)
    for row, other_row in rows:
        assert other_row == pytest.approx(row, rel=1e-5)


# ---- processes that differ


def assert_both_are_refused(processes):
    for process in processes:
        code, printed = finish(process)
        assert code == 2
        assert "Traceback" not in printed
        assert "differ" in printed


@pytest.fixture
def two_machines(whole_run, shards, tmp_path):
    """The working folders of two machines that share no disk. Both have training data."""
    folders = (tmp_path / "here", tmp_path / "there")
    for folder in folders:
        folder.mkdir()
        shutil.copy(shards / "train-0.tar", folder)
    return folders


def start_on(children, two_machines, options, other_options=None):
    here, there = two_machines
    return children.train_two(
        options,
        partial(os.chdir, here),
        other_options=other_options,
        other_preparations=[partial(os.chdir, there)],
    )


def test_processes_with_other_options_do_not_start(children, shards, tmp_path):
    options = short_run(shards, tmp_path / "out")

    processes = children.train_two(options, other_options=[*options, "--seed", 1])

    assert_both_are_refused(processes)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_processes_with_other_data_do_not_start(children, shards, two_machines):
    _, there = two_machines
    shutil.copy(shards / "bad-0.tar", there / "train-0.tar")
    options = short_run(shards, "out", "--train_data", "train-0.tar")
    options += ["--vocab", str(shards / "vocab.tiktoken")]

    processes = start_on(children, two_machines, options)

    assert_both_are_refused(processes)


@pytest.mark.parametrize("steps", [12, 14])
def test_processes_that_do_not_see_one_last_pt_do_not_start(
    children, shards, whole_run, two_machines, steps
):
    """The other machine has none, and would begin at the first step."""
    here, there = two_machines
    shutil.copytree(whole_run, here / "out")
    options = short_run(shards, "out", "--resume", "--steps", steps)
    (there / "out").mkdir()
    last = (here / "out" / "last.pt").read_bytes()

    processes = start_on(children, two_machines, options)

    assert_both_are_refused(processes)
    assert (here / "out" / "last.pt").read_bytes() == last


# ---- one of them gets a signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_one_of_them_stops_both(children, shards, whole_run, tmp_path, number):
    """They leave together, with the code of the signal: as soon as one has left with such a code,
    torchrun ends the others, and here rank 0 still saves. One process can go on for both."""
    out = tmp_path / "out"
    options = short_run(shards, out)
    slow_save = before("os.fsync", 1, partial(time.sleep, 0.5))
    first, second = children.train_two(
        options, slow_save, other_preparations=[in_step(3, receive(number))]
    )

    other_code, _ = finish(second)
    is_saved = (out / "last.pt").exists()
    code, printed = finish(first)

    assert (code, other_code) == (128 + number, 128 + number), printed
    assert is_saved
    assert checkpoint_of(out)["step"] == 3
    train.main([*options, "--resume"])
    assert steps_of(validations_of(out)) == [0, 4, 8, 12]
    for row, other_row in zip(losses_of(whole_run), losses_of(out), strict=True):
        assert other_row["loss"] == pytest.approx(row["loss"], rel=1e-3)
