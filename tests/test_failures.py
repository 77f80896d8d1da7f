"""Failures around a run: a sentence says why it ends, and what was saved before stays."""

import errno
import math
import os
import time
from functools import partial

import pytest
from children import hook
from material import checkpoint_of, error_of, short_run

import train
from superclip import SuperCLIP


@pytest.fixture
def in_step(monkeypatch):
    """in_step(number, act): the step of this number starts with act()."""
    monkeypatch.setattr(SuperCLIP, "forward", SuperCLIP.forward)  # which comes back after the test
    return partial(hook, "superclip.SuperCLIP.forward")


def break_disk(*_):
    raise OSError(errno.EIO, "a broken disk")


def test_at_most_ten_minutes_are_lost(in_step, shards, tmp_path, monkeypatch, capsys):
    clock = time.monotonic
    in_step(3, lambda: monkeypatch.setattr(time, "monotonic", lambda: clock() + 550))
    in_step(6, lambda: monkeypatch.setattr(time, "monotonic", lambda: clock() + 610))
    in_step(9, break_disk)

    message = error_of(capsys, train.main, *short_run(shards, tmp_path, "--eval_every", 100))

    assert "broken disk" in message
    assert checkpoint_of(tmp_path)["step"] == 6


def test_a_full_disk_leaves_the_last_whole_checkpoint(
    in_step, shards, tmp_path, monkeypatch, capsys
):
    in_step(6, lambda: monkeypatch.setattr(os, "fsync", break_disk))

    message = error_of(capsys, train.main, *short_run(shards, tmp_path))

    assert "broken disk" in message
    assert checkpoint_of(tmp_path)["step"] == 4
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("log_every", [1, 100])
def test_weights_that_are_not_finite_are_not_saved(
    shards, tmp_path, monkeypatch, capsys, log_every
):
    rates = iter([1, 1, 1, 1, 1, math.inf, 1, 1])
    monkeypatch.setattr(train, "learning_rate_factor", lambda *_: next(rates))
    options = short_run(shards, tmp_path, "--log_every", log_every)

    message = error_of(capsys, train.main, *options)

    assert "--learning_rate" in message
    assert checkpoint_of(tmp_path)["step"] == 4
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
