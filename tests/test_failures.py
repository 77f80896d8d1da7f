"""Failures around a run: a sentence says why it ends, and what was saved before stays."""

import errno
import os
import shutil
import time

import pytest
from material import checkpoint_of, error_of, sample, short_run, write_shard, write_vocabulary

import train
from superclip import SuperCLIP

pytestmark = pytest.mark.usefixtures("smallest")


@pytest.fixture
def in_step(monkeypatch):
    """in_step(number, act): the step of this number first does something else."""
    acts = {}
    forward = SuperCLIP.forward
    steps = iter(range(1, 1000))

    def forward_after_act(*args, **options):
        acts.get(next(steps), list)()
        return forward(*args, **options)

    monkeypatch.setattr(SuperCLIP, "forward", forward_after_act)
    return acts.__setitem__


def fail():
    raise OSError(errno.EIO, "a broken disk")


def test_at_most_ten_minutes_are_lost(in_step, shards, tmp_path, monkeypatch, capsys):
    clock = time.monotonic
    in_step(3, lambda: monkeypatch.setattr(time, "monotonic", lambda: clock() + 590))
    in_step(6, lambda: monkeypatch.setattr(time, "monotonic", lambda: clock() + 610))
    in_step(9, fail)

    message = error_of(capsys, train.main, *short_run(shards, tmp_path, "--eval_every", 100))

    assert "broken disk" in message
    assert checkpoint_of(tmp_path)["step"] == 6


def test_nothing_is_lost_in_a_validation_that_fails(in_step, shards, folders, tmp_path, capsys):
    in_step(2, lambda: shutil.rmtree(folders))
    options = short_run(shards, tmp_path / "out", "--zeroshot_data", folders)

    message = error_of(capsys, train.main, *options)

    assert str(folders) in message
    assert checkpoint_of(tmp_path / "out")["step"] == 4


def test_a_full_disk_leaves_the_last_whole_checkpoint(
    in_step, shards, tmp_path, monkeypatch, capsys
):
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    in_step(6, lambda: monkeypatch.setattr(os, "fsync", fsync))

    message = error_of(capsys, train.main, *short_run(shards, tmp_path))

    assert "No space left" in message
    assert checkpoint_of(tmp_path)["step"] == 4
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("log_every", [1, 100])
def test_weights_that_are_not_finite_are_not_saved(shards, tmp_path, capsys, log_every):
    train.main(short_run(shards, tmp_path, "--steps", 3))
    before = (tmp_path / "last.pt").read_bytes()

    options = short_run(shards, tmp_path, "--resume", "--learning_rate", 1e30)
    message = error_of(capsys, train.main, *options, "--log_every", log_every)

    assert "--learning_rate" in message
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_named_and_replaced(shards, tmp_path, capfd, workers):
    """Four in an epoch of 40 pairs. A loading process names each once."""
    options = "--train_data", shards / "bad-0.tar", "--batch_size", 8, "--steps", 5

    train.main(short_run(shards, tmp_path, *options, "--workers", workers))

    named = capfd.readouterr().err
    for key in ("0003", "0011", "0020", "0030"):
        assert 1 <= named.count(f"{key}:") <= max(1, workers)
    assert checkpoint_of(tmp_path)["model"]["num_captions"] == 40


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_finds_no_good_sample_ends(tmp_path, capsys, workers):
    shard = write_shard(tmp_path / "bad.tar", [{**sample(i), "png": b"x"} for i in range(16)])
    write_vocabulary(tmp_path)
    options = f"--train_data {shard} --val_data none --out_dir {tmp_path}/out --model tiny"
    options += f" --batch_size 16 --steps 12 --workers {workers} --device cpu"

    message = error_of(capsys, train.main, *options.split())

    assert "a hundred bad samples" in message
