"""Test a run from its first step to its last. It learns, is validated, and keeps its best model. A
checkpoint that was saved before a failure stays."""

import errno
import itertools
import math
import os
import re
import shutil
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from children import before, finish, hook, killed
from material import cases, checkpoint_of, error_of, result_of, rows_of, short_run

import eval as evaluation
import train
from common.run import make_folder, read_log
from superclip import PRESETS, SuperCLIP

WAYS = {
    "SigLIP's loss": "--loss sigmoid",
    "fewer patches": "--patch_dropout 0.5",
    "other captions": "--captions json.captions txt",
    "words of other captions": "--label_captions json.captions",
    "bfloat16": "--dtype bfloat16",
    "float16": "--dtype float16",
    "whole pictures": "--crop_area 1",
}


@cases("options", WAYS)
def test_other_ways_to_train_learn_too(whole_run, shards, tmp_path, options, device):
    """Each way has other losses than a run without the option."""
    torch.compiler.reset()  # for a GPU: torch compiles a function eight times at most
    options = f"--val_data none --device {device} {options}"
    train.main(short_run(shards, tmp_path, *options.split()))

    first, *_, last = rows_of(tmp_path, "loss")
    assert first["loss"] != pytest.approx(rows_of(whole_run, "loss")[0]["loss"], rel=1e-5)
    assert last["loss"] < first["loss"] - 1


# ---- its data


@pytest.mark.parametrize("context_length", [8, 100])
def test_captions_have_the_context_length_of_the_model(shards, monkeypatch, context_length):
    """A longer caption than the text tower reads would end the run. A longer context would stay
    empty."""
    monkeypatch.setitem(PRESETS, "tiny", {**PRESETS["tiny"], "context_length": context_length})
    options, _ = train.parse(["--train_data=x", "--model=tiny"])

    _, tokenizer, _ = train.build_model(Namespace(**options), [shards / "train-0.tar"])

    assert tokenizer("a red square").shape == (1, context_length)


def test_a_row_has_the_share_of_pairs_that_replace_a_bad_sample(shards, tmp_path):
    """Every batch has all 40 pairs of the shard, and two of them are bad."""
    options = "--train_data", shards / "bad-0.tar", "--batch_size", 40, "--steps", 4
    train.main(short_run(shards, tmp_path, *options))

    _, rows = read_log(tmp_path / "log.jsonl")
    assert [row["bad_samples"] for row in rows if "loss" in row] == [0.05, 0.05]


# ---- its folder


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        folders = [*pool.map(make_folder, 8 * [Namespace(resume=None, out_dir=None)])]

    names = ["out", *(f"out_{number}" for number in range(2, 9))]
    assert sorted(map(str, folders)) == names


# ---- its validations, and its end


@pytest.mark.parametrize("option", ["--captions", "--val_captions"])
def test_one_checkpoint_has_one_score(shards, tmp_path, capsys, option):
    """eval.py gives the score of the last validation, even after training in bfloat16."""
    train.main(short_run(shards, tmp_path, "--dtype", "bfloat16", option, "json.captions"))

    argv = ["retrieval", "--checkpoint", tmp_path / "last.pt", "--data", shards / "val-0.tar"]
    argv += ["--workers", 0, "--device", "cpu"]
    result, _ = result_of(capsys, evaluation.main, tmp_path / "scores.json", *argv)

    row = rows_of(tmp_path, "validation")[-1]
    assert result == {name: row[name] for name in result}  # also the loss, in groups like batches


def test_a_validation_logs_the_mean_of_both_ways_and_the_loss_in_groups_like_batches(whole_run):
    """The mean chooses best.pt."""
    first, *rows = rows_of(whole_run, "validation")

    for row in rows:
        there, back = (scores["R@1"]["value"] for scores in row["validation"].values())
        assert (row["mean_r1"], row["val_group"]) == (pytest.approx((there + back) / 2), 16)
    assert first["val_contrastive_loss"] == pytest.approx(math.log(16), abs=1)  # a guess
    assert rows[-1]["val_contrastive_loss"] < first["val_contrastive_loss"]


def test_zero_shot_is_scored_at_every_validation_even_without_pairs(
    shards, folders, tmp_path, capsys
):
    """Without validation pairs the last model is the best, and the run says so."""
    options = "--val_data", "none", "--zeroshot_data", folders
    train.main(short_run(shards, tmp_path, *options))

    rows = rows_of(tmp_path, "zeroshot")
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert [row["zeroshot"][str(folders)]["n"] for row in rows] == [12] * 4
    assert checkpoint_of(tmp_path, "best.pt")["step"] == 12
    assert "--val_data" in capsys.readouterr().out


def test_a_bare_run_draws_scenes(scenes_folder, tmp_path, monkeypatch, capsys):
    """The run trains on one side of the folder of scenes, and validates on the other side. The last
    validation prints the captions of two pictures, and what the head says about them. Before the
    first step the head has counted no captions, so it says nothing. The name of the folder could
    be a pattern."""
    folder = tmp_path / "a[1]"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "find_or_make_scenes", partial(shutil.copytree, scenes_folder))

    train.main(["--steps=1", "--workers=0", "--device=cpu"])

    assert checkpoint_of("out")["header"]["pairs"] == 40
    assert len(re.findall('^"', capsys.readouterr().out, re.M)) == 2


# ---- failures: a message says why a run ends, and what was saved before stays


@pytest.fixture
def in_step(monkeypatch):
    """Return a function in_step(number, act). It lets the step of this number begin with act()."""
    monkeypatch.setattr(SuperCLIP, "forward", SuperCLIP.forward)  # to restore it after the test
    return partial(hook, "superclip.SuperCLIP.forward")


def fill_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_at_most_ten_minutes_are_lost(in_step, shards, tmp_path, monkeypatch, capsys):
    """Step 5 takes a minute and makes a save due. Step 6 takes 40 seconds. The save follows the row
    of both, and takes an hour. Neither this row nor the next has the speed of the save: they have
    32 pairs in 100 seconds, and then at once. Then the disk is full."""
    clock = time.perf_counter

    def move_clock(seconds):
        monkeypatch.setattr(time, "perf_counter", lambda: clock() + seconds)

    in_step(1, lambda: monkeypatch.setattr(os, "fsync", lambda file: move_clock(3600)))
    in_step(3, partial(move_clock, 550))
    in_step(5, partial(move_clock, 610))
    in_step(6, partial(move_clock, 650))
    in_step(9, lambda: monkeypatch.setattr(os, "fsync", fill_disk))

    with pytest.raises(OSError, match="No space left"):
        train.main(short_run(shards, tmp_path, "--eval_every", 100))

    assert checkpoint_of(tmp_path)["step"] == 6
    assert not list(tmp_path.glob(".*.tmp"))
    _, rows = read_log(tmp_path / "log.jsonl")  # of a validation and the steps 2, 4, 6 and 8
    assert rows[3]["images_per_second"] == pytest.approx(32 / 100, abs=0.05)
    assert rows[4]["images_per_second"] > 1


def lack_memory():
    raise RuntimeError("unable to allocate shared memory")


SEND = "torch.UntypedStorage._share_fd_cpu_"
LOST = {  # case -> how a loading process loses a batch, the exit codes, and what is printed
    "killed": (before("data.Pairs.collate", 3, killed), {1, 2}, ""),  # torch has two errors for it
    "it cannot send": (before(SEND, 3, lack_memory), {2}, "--workers"),
}


@cases("loss, expected, named", LOST)
def test_a_lost_batch_ends_the_run(children, shards, tmp_path, loss, expected, named):
    """Docker gives 64 MB of shared memory. If a batch needs more, torch waits for it for ever."""
    options = short_run(shards, tmp_path, "--workers", 1)

    code, printed = finish(children.start("train", options, loss))

    assert code in expected, printed
    assert named in printed.splitlines()[-1]


@pytest.mark.parametrize("log_every", [1, 100])
def test_weights_that_are_not_finite_are_not_saved(
    shards, tmp_path, monkeypatch, capsys, log_every
):
    rates = iter([1, 1, 1, 1, 1, math.inf, 1, 1])
    monkeypatch.setattr(train, "learning_rate_factor", lambda *_: next(rates))
    options = short_run(shards, tmp_path, "--log_every", log_every)

    message = error_of(capsys, train.main, *options)

    assert "--learning_rate" in message and "--dtype" in message
    assert checkpoint_of(tmp_path)["step"] == 4
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


@pytest.mark.parametrize("last", [2, 12])
def test_float16_survives_a_step_that_overflows_but_not_all(
    shards, tmp_path, monkeypatch, capsys, last
):
    """Steps overflow from the second to the last one of these. Each halves the scale of 8. Their
    losses are null in the log, because JSON has no infinity."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=8))
    forward = SuperCLIP.forward
    steps = itertools.count(1)

    def overflow(*args, **options):
        losses = forward(*args, **options)
        if 2 <= next(steps) <= last:
            losses["loss"] = losses["loss"] * math.inf
        return losses

    monkeypatch.setattr(SuperCLIP, "forward", overflow)
    options = short_run(shards, tmp_path, "--dtype", "float16")
    if last == 2:
        train.main(options)
    else:
        assert "not finite" in error_of(capsys, train.main, *options)

    rows = rows_of(tmp_path, "loss")
    assert rows[-1]["step"] == (12 if last == 2 else 2)
    assert rows[0]["loss"] is None
