"""A last.pt from a stranger: whatever it holds, --resume ends with one sentence and exit code 2,
and nothing is written where the user has not asked for it."""

import pytest
import torch
from material import error_of
from runs import change_arguments, change_checkpoint, checkpoint_of

import train

pytestmark = pytest.mark.usefixtures("smallest")


def error_of_resuming(capsys, out):
    """The sentence with which such a run ends."""
    return error_of(capsys, train.main, "--resume", "--out_dir", out)


ARGUMENTS = {
    "a batch without pairs": {"batch_size": 0},
    "a batch that is a text": {"batch_size": "many"},
    "an unknown model": {"model": "nope"},
    "a rate that is a text": {"learning_rate": "x"},
    "a rate that is no number": {"learning_rate": float("nan")},
    "a rate that is a dict": {"learning_rate": {"a": 1}},
    "an infinite weight decay": {"weight_decay": float("inf")},
    "a negative number of steps": {"steps": -3},
    "a billion processes": {"workers": 1e9},
    "an unknown dtype": {"dtype": "int8"},
    "an unknown device": {"device": "meta"},
    "a name that is no option": {"evil": 1},
    "the beginning of a name": {"log_ever": 1},
    "a name that is a number": {5: 1},
    "a name without letters": {"": 1},
    "a request for help": {"help": True},
    "a switch without a switch": {"model": True},
    "captions that are a number": {"captions": 5},
    "captions that are a list of numbers": {"captions": [5]},
    "data that are a number": {"train_data": 5},
    "no data": {"train_data": None},
    "another image size": {"image_size": 32},
    "another context": {"context_length": 8},
    "another loss": {"loss": "sigmoid"},
    "another head": {"cls_weight": 0.0},
    "an option within a list": {"captions": ["txt", "--help"]},
}


@pytest.mark.parametrize("changes", ARGUMENTS.values(), ids=ARGUMENTS)
def test_hostile_options_end_with_a_sentence(copied_run, capsys, changes):
    """A run with honest ones would have two more steps to take."""
    arguments = checkpoint_of(copied_run)["arguments"]
    change_checkpoint(copied_run, arguments={**arguments, "steps": 14, **changes})

    error_of_resuming(capsys, copied_run)


def test_a_list_cannot_hold_another_folder(copied_run, tmp_path, capsys):
    captions = ["txt", f"--out_dir={tmp_path}/elsewhere"]
    change_arguments(copied_run, captions=captions)

    error_of_resuming(capsys, copied_run)

    assert not (tmp_path / "elsewhere").exists()


ENTRIES = {
    "options that are a number": {"arguments": 5},
    "no options": {"arguments": {}},
    "fewer than no samples": {"samples": -64},
    "samples that are a text": {"samples": "x"},
    "half a sample": {"samples": 0.5},
    "an optimizer that is a list": {"optimizer": []},
    "an optimizer without a state": {"optimizer": {}},
    "a state that is a number": {"optimizer": {"state": 5}},
    "a scaler that is a number": {"scaler": 5},
    "another fingerprint": {"data_fingerprint": None},
}


@pytest.mark.parametrize("changes", ENTRIES.values(), ids=ENTRIES)
def test_hostile_entries_end_with_a_sentence(copied_run, capsys, changes):
    change_checkpoint(copied_run, **changes)

    assert str(copied_run) in error_of_resuming(capsys, copied_run)


def test_a_hostile_loss_scale_ends_with_a_sentence(copied_run, capsys):
    change_arguments(copied_run, dtype="float16")
    change_checkpoint(copied_run, scaler={"scale": "x"})

    error_of_resuming(capsys, copied_run)


MOMENTS = {
    "another shape": lambda moment: moment.flatten()[:1].clone(),
    "another dtype": lambda moment: moment.double(),
    "another stride": lambda moment: torch.zeros(1).expand(moment.shape),
    "not finite": lambda moment: moment.fill_(torch.nan),
    "a number": lambda moment: 5,
}


def change_moments(out, parameter, change):
    """Changes the first moments of a parameter, which is named by its number."""
    optimizer = checkpoint_of(out)["optimizer"]
    state = dict(optimizer["state"].get(parameter, optimizer["state"][0]))
    state["exp_avg"] = change(state["exp_avg"])
    optimizer["state"][parameter] = state
    change_checkpoint(out, optimizer=optimizer)


@pytest.mark.parametrize("change", MOMENTS.values(), ids=MOMENTS)
def test_moments_that_do_not_fit_are_refused(copied_run, capsys, change):
    """The kernel of AdamW reads and writes as many numbers as the parameter has."""
    matrix = 1
    change_moments(copied_run, matrix, change)

    assert "optimizer" in error_of_resuming(capsys, copied_run)


def test_more_samples_than_the_run_has_are_refused(copied_run, capsys):
    change_checkpoint(copied_run, samples=10**15)

    assert "--steps" in error_of_resuming(capsys, copied_run)


def test_moments_of_an_unknown_parameter_are_refused(copied_run, capsys):
    change_moments(copied_run, 999, lambda moment: moment)

    assert "optimizer" in error_of_resuming(capsys, copied_run)


def test_the_groups_of_the_file_are_not_used(copied_run):
    """They hold rates and decays, and a given --learning_rate counts."""
    optimizer = checkpoint_of(copied_run)["optimizer"]
    optimizer["param_groups"] = [{"params": [0], "lr": 1e30, "maximize": True}]
    change_checkpoint(copied_run, optimizer=optimizer)

    train.main(["--resume", "--out_dir", str(copied_run), "--steps", "14"])

    assert checkpoint_of(copied_run)["step"] == 14
