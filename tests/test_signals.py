"""Test that a signal ends a command at once. The command prints one line, and its exit code is 128
plus the number of the signal, so that `train && next` stops, too. With --resume a run then goes on
from its last save."""

import os
import signal
from functools import partial

import pytest
from children import before, finish, in_step, receive
from material import assert_ends_like, cases, checkpoint_of, short_run, write_captions

import train


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_in_one_line(children, shards, whole_run, tmp_path, number):
    """The signal reaches loading processes, too, which print nothing. The resumed run ends with the
    bits of a run that nothing has interrupted."""
    options = short_run(shards, tmp_path, "--workers", 1)

    code, printed = finish(children.start("train", options, in_step(6, receive(number))))

    assert code == 128 + number, printed
    assert printed.count("stopped by a signal") == 1
    assert "Traceback" not in printed
    assert checkpoint_of(tmp_path)["step"] == 4
    train.main([*options, "--resume"])
    assert_ends_like(tmp_path, whole_run)


def test_nohup_lets_a_run_outlive_its_terminal(children, shards, tmp_path):
    ignore_hangups = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    hangup = in_step(6, receive(signal.SIGHUP))

    process = children.start("train", short_run(shards, tmp_path), ignore_hangups, hangup)

    assert finish(process)[0] == 0
    assert checkpoint_of(tmp_path)["step"] == 12


# ---- a command that does not train

POOLS = {  # case -> a command, and a function that it calls while its processes work
    "it draws": ("common.scenes", "common.scenes.progress"),
    "it indexes": ("scripts.vocab", "common.shards.progress"),
}


@cases("command, function", POOLS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_command_leaves_nothing_behind(children, tmp_path, command, function, number):
    """No process is left, and no unfinished folder. Only the command gets the signal, and not the
    processes that it has started."""
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
