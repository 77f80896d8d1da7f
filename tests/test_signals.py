"""A signal stops a run after the step that it is in, and nothing is lost: resumed, the run ends
with the bits of one that nothing has interrupted. A run that was stopped ends with 128 + the number
of the signal, so that `train && next` does not go on."""

import os
import signal
from functools import partial

import pytest
from children import before, finish, in_step, receive
from material import (
    assert_ends_like,
    cases,
    checkpoint_of,
    rows_of,
    short_run,
    steps_of,
    write_captions,
)

import train


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_step_stops_the_run_after_it(children, shards, tmp_path, number):
    """Ctrl-C, a scheduler and the end of a terminal send it to loading processes, too. These are
    needed until the run has left its loop."""
    options = short_run(shards, tmp_path, "--workers", 1)

    code, printed = finish(children.start("train", options, in_step(6, receive(number))))

    assert code == 128 + number, printed
    assert printed.count("Ctrl-\\") == 1  # the loading process is silent
    assert "--resume" in printed
    assert checkpoint_of(tmp_path)["step"] == 6


# When a signal comes, the step that is saved, and the validations before the run stops
MOMENTS = {
    "before a validation": (in_step(4, receive(signal.SIGTERM)), 4, [0]),
    "in a validation": (before("eval.retrieval", 2, receive(signal.SIGTERM)), 5, [0, 4]),
    "before the last validation": (in_step(12, receive(signal.SIGTERM)), 12, [0, 4, 8]),
}


@cases("moment, step, validations", MOMENTS)
def test_a_validation_that_is_due_is_left_to_the_resumed_run(
    children, shards, whole_run, tmp_path, moment, step, validations
):
    """It may take longer than a scheduler waits."""
    options = short_run(shards, tmp_path)

    code, printed = finish(children.start("train", options, moment))

    assert code == 128 + signal.SIGTERM, printed
    assert checkpoint_of(tmp_path)["step"] == step
    assert steps_of(rows_of(tmp_path, "zeroshot")) == validations
    train.main([*options, "--resume"])
    assert_ends_like(tmp_path, whole_run)


def lose_readers():
    """Nobody reads standard output and standard error any more."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.dup2(writing, 2)


def test_a_run_saves_though_ctrl_c_has_ended_the_tee_that_read_it(children, shards, tmp_path):
    stop = in_step(6, receive(signal.SIGINT))

    process = children.start("train", short_run(shards, tmp_path), lose_readers, stop)

    assert finish(process)[0] == 130
    assert checkpoint_of(tmp_path)["step"] == 6


def test_nohup_lets_a_run_outlive_its_terminal(children, shards, tmp_path):
    ignore_hangups = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    hangup = in_step(6, receive(signal.SIGHUP))

    process = children.start("train", short_run(shards, tmp_path), ignore_hangups, hangup)

    assert finish(process)[0] == 0
    assert checkpoint_of(tmp_path)["step"] == 12


# ---- a command that is no run yet

POOLS = {  # a command, and what it calls while its processes work
    "it draws": ("scripts.scenes", "scripts.scenes.progress"),
    "it indexes": ("scripts.vocab", "data.progress"),
}


@cases("command, function", POOLS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_command_leaves_nothing_behind(children, tmp_path, command, function, number):
    """No process, and no half of a folder. Its processes do not get the signal."""
    options = ["--out", tmp_path / "scenes"]
    if command == "scripts.vocab":
        options = [write_captions(tmp_path / "0.tar", "a red thing")]
    before_it = sorted(tmp_path.iterdir())
    stop = before(function, 1, partial(signal.raise_signal, number))

    process = children.start(command, options, stop)

    code, printed = finish(process)
    assert code == 128 + number, printed
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert {*tmp_path.iterdir()} == {*before_it, process.output}
