"""Two processes of one run: they do what one does, they refuse to differ, and they leave together.

Each is told by its environment that torchrun has started it. test_step.py compares gradients."""

import shutil
import signal

import pytest
import torch
from children import before, clock_jumps, finish, in_folder, in_step, receive, sleep
from runs import checkpoint_of, losses_of, short_run, steps_of, validations_of

import train

pytestmark = pytest.mark.usefixtures("smallest")

SELDOM = "--save_every", 100, "--eval_every", 100


def test_two_processes_do_what_one_does(children, shards, tmp_path):
    """The same weights, counts and log. Bad samples are replaced in the process that meets them,
    and all are counted. The rate is low, because Adam makes much of the smallest difference."""
    data_and_rate = "--train_data", shards / "bad-0.tar", "--learning_rate", 1e-5
    options = *data_and_rate, "--patch_dropout", 0.5
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
    for row, other_row in zip(
        losses_of(tmp_path / "one"), losses_of(tmp_path / "two"), strict=True
    ):
        assert other_row == pytest.approx(row, rel=1e-5)
    assert row["bad_samples"] > 0


# ---- processes that differ


def assert_both_are_refused(processes):
    for process in processes:
        code, printed = finish(process)
        assert code == 2
        assert "Traceback" not in printed
        assert "differ" in printed


OTHERS = {
    "another rate": ["--learning_rate", 1e-4],
    "another seed": ["--seed", 1],
}


@pytest.mark.parametrize("more", OTHERS.values(), ids=OTHERS)
def test_processes_with_other_options_do_not_start(children, shards, tmp_path, more):
    options = short_run(shards, tmp_path / "out")

    processes = children.train_two(options, other_options=[*options, *more])

    assert_both_are_refused(processes)
    assert not list((tmp_path / "out").glob("*.pt"))


@pytest.fixture
def two_machines(tmp_path):
    """The working folders of two machines that share no disk."""
    folders = (tmp_path / "here", tmp_path / "there")
    for folder in folders:
        folder.mkdir()
    return folders


def test_processes_with_other_data_do_not_start(children, shards, two_machines, tmp_path):
    here, there = two_machines
    shutil.copy(shards / "train-0.tar", here / "train-0.tar")
    shutil.copy(shards / "bad-0.tar", there / "train-0.tar")
    options = short_run(shards, "out", "--train_data", "train-0.tar", "--batch_size", 16)
    options += ["--vocab", str(shards / "vocab.tiktoken")]

    processes = children.train_two(options, in_folder(here), other_preparations=[in_folder(there)])

    assert_both_are_refused(processes)


def test_processes_at_other_steps_do_not_start(children, shards, whole_run, two_machines):
    """The other machine has no last.pt, and would begin at the first step."""
    here, there = two_machines
    shutil.copytree(whole_run, here / "out")
    options = short_run(shards, "out", "--resume", "--steps", 14)
    (there / "out").mkdir()
    before = (here / "out" / "last.pt").read_bytes()

    processes = children.train_two(options, in_folder(here), other_preparations=[in_folder(there)])

    assert_both_are_refused(processes)
    assert (here / "out" / "last.pt").read_bytes() == before


# ---- one of them gets a signal, or dies


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_one_of_them_stops_both(children, shards, tmp_path, number):
    """They leave together, with the code of the signal: as soon as one has left with such a code,
    torchrun ends the others, and here rank 0 still saves."""
    out = tmp_path / "out"
    options = short_run(shards, out, *SELDOM)
    slow_save = before("os.fsync", 1, sleep(0.5))
    first, second = children.train_two(
        options, slow_save, other_preparations=[in_step(5, receive(number))]
    )

    other_code, _ = finish(second)
    is_saved = (out / "last.pt").exists()
    code, printed = finish(first)

    assert (code, other_code) == (128 + number, 128 + number), printed
    assert is_saved
    assert checkpoint_of(out)["step"] == 5


def test_a_run_of_two_goes_on_with_one(children, shards, whole_run, tmp_path):
    out = tmp_path / "out"
    options = short_run(shards, out)
    for process in children.train_two(options, in_step(5, receive(signal.SIGTERM))):
        finish(process)

    train.main([*options, "--resume"])

    assert steps_of(validations_of(out)) == [4, 8, 12]
    ours = losses_of(whole_run)
    for row, other_row in zip(ours, losses_of(out), strict=True):
        assert other_row["loss"] == pytest.approx(row["loss"], rel=1e-3)


def test_if_one_dies_the_other_saves_its_last_whole_step(children, shards, tmp_path):
    """Only the token counts may be one batch ahead."""
    options = short_run(shards, tmp_path / "out", *SELDOM)
    dies = in_step(6, receive(signal.SIGKILL))
    first, _ = children.train_two(options, other_preparations=[dies])

    code, printed = finish(first)

    assert code == 2
    assert "Traceback" not in printed
    saved = checkpoint_of(tmp_path / "out")
    assert saved["step"] == 5
    assert saved["model"]["num_captions"] in (5 * 16, 6 * 16)


def test_rank_0_saves_after_fifteen_minutes_without_asking_the_other(children, shards, tmp_path):
    """The clock of the other one does not jump, and no weight depends on it."""
    out = tmp_path / "out"
    options = short_run(shards, out, *SELDOM)
    first, second = children.train_two(
        options, in_step(6, clock_jumps(16 * 60)), in_step(9, receive(signal.SIGKILL))
    )

    finish(first)
    finish(second)

    assert checkpoint_of(out)["step"] == 6
