"""A signal stops a run after the step or the validation that it is in, and nothing is lost:
resumed, the run ends with the bits of one that nothing has interrupted. A run that was stopped ends
with 128 + the number of the signal, so that `train && next` does not go on."""

import signal

import pytest
from children import (
    before,
    check_loaders_live,
    clock_jumps,
    finish,
    group_receives,
    ignoring,
    in_step,
    lose_readers,
    one_after_another,
    receive,
)
from runs import assert_ends_like, checkpoint_of, short_run, steps_of, validations_of

import train

pytestmark = pytest.mark.usefixtures("smallest")

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
IDS = [number.name for number in SIGNALS]
# A run that only a signal makes save, with a step for --resume to come back to.
SELDOM = "--save_every", 100


@pytest.fixture
def assert_nothing_is_lost(shards, whole_run):
    """Resumes a stopped run, and compares its end with that of the whole one."""

    def assert_nothing_is_lost(out):
        train.main(short_run(shards, out, *SELDOM, "--resume"))
        assert_ends_like(out, whole_run)
        assert steps_of(validations_of(out)) == [4, 8, 12]

    return assert_nothing_is_lost


# ---- in a step


@pytest.mark.parametrize("number", SIGNALS, ids=IDS)
def test_a_signal_in_a_step_stops_the_run_after_it(
    children, shards, tmp_path, assert_nothing_is_lost, number
):
    process = children.train(
        short_run(shards, tmp_path / "out", *SELDOM), in_step(6, receive(number))
    )

    code, printed = finish(process)

    assert code == 128 + number, printed
    assert "--resume" in printed
    assert checkpoint_of(tmp_path / "out")["step"] == 6
    assert_nothing_is_lost(tmp_path / "out")


@pytest.mark.parametrize("number", SIGNALS, ids=IDS)
def test_loading_processes_survive_it(children, shards, tmp_path, number):
    """Ctrl-C, a scheduler and the end of a terminal send it to them, too, some of them twice. They
    are needed until the run has left its loop."""
    everybody_twice = one_after_another(group_receives(number, number), check_loaders_live)
    options = short_run(shards, tmp_path / "out", *SELDOM, "--workers", 1)
    process = children.train(options, in_step(3, everybody_twice))

    code, printed = finish(process)

    assert code == 128 + number, printed
    assert printed.count("stops after this step") == 1
    assert checkpoint_of(tmp_path / "out")["step"] == 3


NO_READERS = {
    "of stderr": lose_readers(2),
    "of both": lose_readers(1, 2),  # 2>&1 | tee: Ctrl-C ends tee first
}


@pytest.mark.parametrize("readers_leave", NO_READERS.values(), ids=NO_READERS)
def test_a_signal_is_not_lost_without_a_reader(
    children, shards, tmp_path, assert_nothing_is_lost, readers_leave
):
    process = children.train(
        short_run(shards, tmp_path / "out", *SELDOM),
        readers_leave,
        in_step(6, receive(signal.SIGINT)),
    )

    code, _ = finish(process)

    assert code == 128 + signal.SIGINT
    assert checkpoint_of(tmp_path / "out")["step"] == 6
    assert_nothing_is_lost(tmp_path / "out")


def test_a_run_whose_reader_leaves_goes_on(children, shards, tmp_path):
    """As in `python train.py | head`."""
    process = children.train(short_run(shards, tmp_path / "out"), lose_readers(1))

    code, _ = finish(process)

    assert code == 0
    assert checkpoint_of(tmp_path / "out")["step"] == 12


def test_nohup_is_heeded(children, shards, tmp_path):
    process = children.train(
        short_run(shards, tmp_path / "out"),
        ignoring(signal.SIGHUP),
        in_step(6, receive(signal.SIGHUP)),
    )

    code, printed = finish(process)

    assert code == 0, printed
    assert checkpoint_of(tmp_path / "out")["step"] == 12


# ---- in a validation, or before it


def test_after_a_signal_a_validation_that_is_due_is_left_to_the_resumed_run(
    children, shards, tmp_path, assert_nothing_is_lost
):
    """It may take longer than a scheduler waits."""
    process = children.train(
        short_run(shards, tmp_path / "out"), in_step(4, receive(signal.SIGTERM))
    )

    finish(process)

    assert checkpoint_of(tmp_path / "out")["step"] == 4
    assert validations_of(tmp_path / "out") == []
    assert_nothing_is_lost(tmp_path / "out")


def test_a_signal_in_a_validation_stops_the_run_after_it(
    children, shards, tmp_path, assert_nothing_is_lost
):
    process = children.train(
        short_run(shards, tmp_path / "out"),
        before("eval.retrieval", 1, receive(signal.SIGTERM)),
    )

    code, printed = finish(process)

    assert code == 128 + signal.SIGTERM, printed
    assert checkpoint_of(tmp_path / "out")["step"] == 4
    assert steps_of(validations_of(tmp_path / "out")) == [4]
    assert_nothing_is_lost(tmp_path / "out")


def test_within_three_seconds_a_second_signal_is_the_same_one(children, shards, tmp_path):
    """torchrun passes on what a scheduler has sent to all processes."""
    again = one_after_another(receive(signal.SIGTERM), clock_jumps(2), receive(signal.SIGTERM))
    process = children.train(
        short_run(shards, tmp_path / "out"), before("eval.retrieval", 1, again)
    )

    code, printed = finish(process)

    assert code == 128 + signal.SIGTERM, printed
    assert steps_of(validations_of(tmp_path / "out")) == [4]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_later_signal_ends_the_run_at_once(
    children, shards, tmp_path, assert_nothing_is_lost, second
):
    """Even then nothing is lost, because the save comes before the validation."""
    again = one_after_another(receive(signal.SIGTERM), clock_jumps(4), receive(second))
    process = children.train(
        short_run(shards, tmp_path / "out"), before("eval.retrieval", 1, again)
    )

    code, printed = finish(process)

    assert code == 128 + second, printed
    assert checkpoint_of(tmp_path / "out")["step"] == 4
    assert validations_of(tmp_path / "out") == []
    assert_nothing_is_lost(tmp_path / "out")


def test_even_the_validation_before_the_first_step_is_made_up_for(
    children, whole_run, shards, tmp_path
):
    """Fine-tuning begins with one, because training may harm the model."""
    options = short_run(shards, tmp_path / "out", "--init_from", whole_run / "last.pt")
    kill = receive(signal.SIGKILL)
    finish(children.train(options, before("eval.retrieval", 1, kill)))
    assert checkpoint_of(tmp_path / "out")["step"] == 0

    train.main([*options, "--resume"])

    assert steps_of(validations_of(tmp_path / "out")) == [0, 4, 8, 12]


END = {
    "in the last step": in_step(12, receive(signal.SIGTERM)),
    "in the last save": before("eval.encode_shards", 3, receive(signal.SIGTERM)),
    "in the last validation": before("eval.retrieval", 3, receive(signal.SIGTERM)),
}


@pytest.mark.parametrize("moment", END.values(), ids=END)
def test_a_run_that_is_done_ends_well_all_the_same(children, shards, whole_run, tmp_path, moment):
    code, printed = finish(children.train(short_run(shards, tmp_path / "out"), moment))

    assert code == 0, printed
    assert_ends_like(tmp_path / "out", whole_run)


# ---- without a signal


def test_a_run_saves_when_fifteen_minutes_have_passed(children, shards, tmp_path):
    """Once another process has died, this one can only wait, and is killed in the end."""
    process = children.train(
        short_run(shards, tmp_path / "out", *SELDOM, "--eval_every", 100),
        in_step(3, clock_jumps(14 * 60)),
        in_step(6, clock_jumps(2 * 60)),
        in_step(9, receive(signal.SIGKILL)),
    )

    finish(process)

    assert checkpoint_of(tmp_path / "out")["step"] == 6
