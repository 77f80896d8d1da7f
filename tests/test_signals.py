"""Test that a signal ends a command, with all its processes, and without a trace. With --resume a
run then goes on from its last save."""

import os
import signal
import time
from functools import partial

import pytest
from children import before, finish, in_step, receive
from material import assert_ends_like, checkpoint_of, short_run, write_captions

import train


def assert_nothing_runs(process):
    """Assert that a few seconds after the end of a process its group has no process."""
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a process is left")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_without_a_trace(children, shards, whole_run, tmp_path, number):
    """The signal reaches loading processes, too. The run prints one line, and its exit code is 130.
    The resumed run ends with the bits of a run that nothing has interrupted."""
    options = short_run(shards, tmp_path, "--workers", 1)
    process = children.start("train", options, in_step(6, receive(number)))

    code, printed = finish(process)

    assert code == 130, printed
    assert printed.count("stopped by a signal") == 1
    assert "Traceback" not in printed
    assert checkpoint_of(tmp_path)["step"] == 4
    assert_nothing_runs(process)
    train.main([*options, "--resume"])
    assert_ends_like(tmp_path, whole_run)


def test_a_drawing_that_is_stopped_leaves_nothing(children, tmp_path):
    process = children.start("common.scenes", ["--out", tmp_path / "scenes"])
    while not [*tmp_path.glob(".scenes-*/scenes/*.tar")]:
        assert process.is_alive()
        time.sleep(0.01)

    os.kill(process.pid, signal.SIGTERM)

    code, printed = finish(process)
    assert code == 130, printed
    assert not [*tmp_path.glob(".scenes-*")]
    assert_nothing_runs(process)


def test_no_process_outlives_a_command_that_is_killed(children, tmp_path):
    """Only the command gets the signal, and not the processes that it has started."""
    shard = write_captions(tmp_path / "0.tar", "a red thing")
    stop = before("common.index.progress", 1, partial(signal.raise_signal, signal.SIGTERM))

    process = children.start("scripts.vocab", [shard], stop)

    code, printed = finish(process)
    assert code == 130, printed
    assert "Traceback" not in printed
    assert_nothing_runs(process)
