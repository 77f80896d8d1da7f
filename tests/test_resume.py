"""Whatever ends a run, --resume goes on from its last save and ends with the bits of a run that
nothing has interrupted. A validation that is missing comes first, and none is made twice."""

import shutil
import signal

import pytest
import torch
from children import before, finish, in_step, receive
from material import error_of
from runs import (
    all_rows,
    assert_ends_like,
    change_arguments,
    checkpoint_of,
    header_of,
    losses_of,
    short_run,
    steps_of,
    validations_of,
    write_old_log,
)

import train

pytestmark = pytest.mark.usefixtures("smallest")

# ---- killed

killed = receive(signal.SIGKILL)
# The moments of a kill, and the step from which the run then goes on. os.fsync and os.replace are
# called once for each checkpoint: last.pt at step 3 and 4, best.pt at 4, last.pt at 6 ...
MOMENTS = {
    "before anything is saved": (in_step(3, killed), 0),
    "in a step": (in_step(6, killed), 4),
    "as last.pt is written": (before("os.fsync", 4, killed), 4),
    "before last.pt gets its name": (before("os.replace", 4, killed), 4),
    "between the save and the validation": (before("eval.encode_shards", 1, killed), 4),
    "in a validation": (before("eval.retrieval", 2, killed), 8),
    "as best.pt is written": (before("os.fsync", 3, killed), 4),
    "in the last validation": (before("eval.retrieval", 3, killed), 12),
}


@pytest.mark.parametrize("moment, step", MOMENTS.values(), ids=MOMENTS)
def test_a_killed_run_ends_as_if_it_had_not_been(
    children, shards, whole_run, tmp_path, moment, step
):
    out = tmp_path / "out"
    options = short_run(shards, out)
    code, _ = finish(children.train(options, moment))
    assert code == -signal.SIGKILL

    train.main([*options, "--resume"])

    assert_ends_like(out, whole_run)
    assert steps_of(row for row in all_rows(out) if "header" in row) == [0, step]
    assert steps_of(validations_of(out)) == [4, 8, 12]
    assert not list(out.glob(".*.tmp"))


def test_a_kill_between_a_validation_and_best_pt_loses_no_model(children, shards, tmp_path):
    options = short_run(shards, tmp_path / "out", "--steps", 4, "--save_every", 4)
    process = children.train(options, before("os.fsync", 2, killed))  # the first is that of last.pt
    finish(process)

    train.main([*options, "--resume"])

    assert checkpoint_of(tmp_path / "out", "best.pt")["step"] == 4


def test_a_validation_of_an_older_run_does_not_count(children, shards, tmp_path):
    """A log may hold the rows of a run whose checkpoints have been deleted."""
    options = short_run(shards, tmp_path, "--steps", 4)
    train.main(options)
    (tmp_path / "last.pt").unlink()
    (tmp_path / "best.pt").unlink()
    finish(children.train(options, before("eval.retrieval", 1, killed)))

    train.main([*options, "--resume"])

    assert steps_of(validations_of(tmp_path)) == [4, 4]


# ---- what --resume may change


def test_a_complete_run_stays_as_it_is(copied_run, whole_run, shards):
    before = (copied_run / "last.pt").read_bytes()

    train.main(short_run(shards, copied_run, "--resume"))

    assert (copied_run / "last.pt").read_bytes() == before
    assert_ends_like(copied_run, whole_run)


def test_a_run_goes_on_with_another_length_batch_and_rate(copied_run):
    """Twelve steps of 16 pairs are 24 of 8. What is not given stays as it was."""
    more = "--batch_size 8 --steps 30 --learning_rate 1e-4 --warmup_steps 2".split()

    train.main(["--resume", "--out_dir", str(copied_run), *more])

    saved = checkpoint_of(copied_run)
    assert saved["step"] == 30
    assert saved["samples"] == 240
    assert saved["model"]["num_captions"] == 240
    assert saved["arguments"]["learning_rate"] == 1e-4
    assert saved["arguments"]["save_every"] == 3
    first, *_, last = [row for row in losses_of(copied_run) if row["step"] > 24]
    assert first["step"] == 26
    assert last["samples"] == 240
    assert last["learning_rate"] == pytest.approx(1e-4 * train.learning_rate_factor(29, 2, 30))


def test_a_run_that_is_already_longer_is_refused(copied_run, shards, capsys):
    options = short_run(shards, copied_run, "--resume", "--steps", 11)

    assert "--steps 11" in error_of(capsys, train.main, *options)


VALIDATIONS = {
    "the same": ([], True),
    "other captions": (["--val_captions", "json.captions"], False),
    "other shards": (["--val_data", "bad-0.tar"], False),
}


@pytest.mark.parametrize("more, is_kept", VALIDATIONS.values(), ids=VALIDATIONS)
def test_a_score_on_other_validation_data_does_not_compare(
    copied_run, shards, monkeypatch, more, is_kept
):
    """The score of best.pt is raised by hand: on the same data, nothing beats it."""
    monkeypatch.chdir(shards)
    best = checkpoint_of(copied_run, "best.pt")
    torch.save({**best, "mean_r1": 1.1}, copied_run / "best.pt")

    train.main(short_run(shards, copied_run, *more, "--steps", 13, "--resume"))

    best = checkpoint_of(copied_run, "best.pt")
    assert (best["mean_r1"] == 1.1) == is_kept


# ---- the folder


def test_a_copied_run_goes_on_in_the_copy(whole_run, tmp_path, monkeypatch):
    """--resume takes neither the folder from the checkpoint, nor Weights & Biases."""
    before = {path.name: path.read_bytes() for path in whole_run.iterdir()}
    shutil.copytree(whole_run, tmp_path / "out")
    change_arguments(tmp_path / "out", wandb="a project")
    monkeypatch.chdir(tmp_path)

    train.main(["--resume", "--steps", "14"])

    saved = checkpoint_of("out")
    assert saved["step"] == 14
    assert saved["arguments"]["out_dir"] == "out"
    assert saved["arguments"]["wandb"] is None
    assert {path.name: path.read_bytes() for path in whole_run.iterdir()} == before


def test_without_any_checkpoint_resume_starts_the_run(shards, tmp_path):
    """A scheduler repeats its command, and may have killed the run before its first save."""
    write_old_log(tmp_path)

    train.main(short_run(shards, tmp_path, "--resume"))

    assert checkpoint_of(tmp_path)["step"] == 12
    assert header_of(tmp_path) == "of an older run"


def test_without_any_checkpoint_and_without_data_resume_is_refused(tmp_path, capsys):
    assert "last.pt" in error_of(capsys, train.main, "--resume", "--out_dir", tmp_path)


FILES = {  # which are there, and how much of each
    "best.pt alone": {"best.pt": ("best.pt", 1)},
    "weights alone": {"best.pt": ("best.pt", 1), "last.pt": ("best.pt", 1)},
    "half of a file": {"best.pt": ("best.pt", 1), "last.pt": ("last.pt", 0.5)},
}


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_what_cannot_be_resumed_is_refused_and_kept(whole_run, shards, tmp_path, capsys, files):
    for name, (source, share) in files.items():
        content = (whole_run / source).read_bytes()
        (tmp_path / name).write_bytes(content[: int(share * len(content))])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}

    message = error_of(capsys, train.main, *short_run(shards, tmp_path, "--resume"))

    assert "last.pt" in message
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")} == before
