"""A signal stops a run after the step that it is in, and nothing is lost: resumed, the run ends
with the bits of one that nothing has interrupted. A run that was stopped ends with 128 + the number
of the signal, so that `train && next` does not go on."""

import signal
from functools import partial

import pytest
from children import before, finish, in_step, lose_readers, receive
from material import assert_ends_like, checkpoint_of, short_run, steps_of, validations_of

import train

pytestmark = pytest.mark.usefixtures("smallest")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_step_stops_the_run_after_it(children, shards, whole_run, tmp_path, number):
    """Ctrl-C, a scheduler and the end of a terminal send it to loading processes, too. These are
    needed until the run has left its loop."""
    options = short_run(shards, tmp_path / "out", "--workers", 1)
    process = children.start("train", options, in_step(6, receive(number)))

    code, printed = finish(process)

    assert code == 128 + number, printed
    assert "--resume" in printed
    assert checkpoint_of(tmp_path / "out")["step"] == 6
    train.main([*options, "--resume"])
    assert_ends_like(tmp_path / "out", whole_run)


def test_ctrl_c_is_not_lost_although_it_has_ended_tee(children, shards, tmp_path):
    """As in `python train.py 2>&1 | tee log`."""
    stop = in_step(6, receive(signal.SIGINT))
    process = children.start("train", short_run(shards, tmp_path), lose_readers(1, 2), stop)

    code, _ = finish(process)

    assert code == 128 + signal.SIGINT
    assert checkpoint_of(tmp_path)["step"] == 6


def test_a_run_whose_reader_leaves_goes_on(children, shards, tmp_path):
    """As in `python train.py | head`."""
    process = children.start("train", short_run(shards, tmp_path), lose_readers(1))

    code, _ = finish(process)

    assert code == 0
    assert checkpoint_of(tmp_path)["step"] == 12


def test_nohup_is_heeded(children, shards, tmp_path):
    ignored = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    hang_up = in_step(6, receive(signal.SIGHUP))
    process = children.start("train", short_run(shards, tmp_path), ignored, hang_up)

    code, printed = finish(process)

    assert code == 0, printed
    assert checkpoint_of(tmp_path)["step"] == 12


# When a signal comes, the step that is saved, and the validations before the run stops
MOMENTS = {
    "before a validation": (in_step(4, receive(signal.SIGTERM)), 4, [0]),
    "in a validation": (before("eval.retrieval", 2, receive(signal.SIGTERM)), 5, [0, 4]),
    "before the last validation": (in_step(12, receive(signal.SIGTERM)), 12, [0, 4, 8]),
}


@pytest.mark.parametrize("moment, step, validations", MOMENTS.values(), ids=MOMENTS)
def test_a_validation_that_is_due_is_left_to_the_resumed_run(
    children, shards, whole_run, tmp_path, moment, step, validations
):
    """It may take longer than a scheduler waits."""
    options = short_run(shards, tmp_path / "out")

    code, printed = finish(children.start("train", options, moment))

    assert code == 128 + signal.SIGTERM, printed
    assert checkpoint_of(tmp_path / "out")["step"] == step
    assert steps_of(validations_of(tmp_path / "out")) == validations
    train.main([*options, "--resume"])
    assert_ends_like(tmp_path / "out", whole_run)
