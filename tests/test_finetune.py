"""Fine-tuning: --init_from takes weights, vocabulary and model from a checkpoint, and goes on."""

import shutil

import numpy as np
import pytest
import torch
from material import COLOURS, png, write_shard
from runs import checkpoint_of, short_run, validations_of

import train

pytestmark = pytest.mark.usefixtures("smallest")

COUNTS = {"token_counts", "num_captions"}  # what a run adds to whatever its rate is


@pytest.fixture
def tune(whole_run, shards, tmp_path):
    """tune(*options): fine-tune the model of the whole run. Returns the new last.pt."""

    def tune(*options):
        options = short_run(
            shards, tmp_path / "out", "--init_from", whole_run / "best.pt", *options
        )
        train.main(options)
        return checkpoint_of(tmp_path / "out")

    return tune


def test_with_a_rate_of_0_the_weights_stay(whole_run, tune):
    before = checkpoint_of(whole_run, "best.pt")

    after = tune("--learning_rate", 0)

    same = {name for name, x in before["model"].items() if torch.equal(x, after["model"][name])}
    assert same == before["model"].keys() - COUNTS
    assert after["model"]["num_captions"] == before["model"]["num_captions"] + 12 * 16


def test_the_vocabulary_and_the_model_come_along(whole_run, tune, shards, tmp_path):
    """Even to shards that lie beside no vocabulary, or beside another one."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(shards / "train-0.tar", bare)
    before = checkpoint_of(whole_run, "best.pt")

    after = tune("--steps", 1, "--train_data", bare / "train-0.tar")

    assert after["vocab"] == before["vocab"]
    assert after["config"] == before["config"]


def test_the_checkpoint_is_scored_before_the_first_step(whole_run, tune, tmp_path):
    """Training may harm the model, and then best.pt is the one from which it has started."""
    before = checkpoint_of(whole_run, "best.pt")

    tune("--steps", 1)

    first, *_ = validations_of(tmp_path / "out")
    assert first["step"] == 0
    assert first["mean_r1"] == before["mean_r1"]


FROZEN = {
    "the image tower": ("visual.", ["--freeze", "image"]),
    "the text tower": ("text.", ["--freeze", "text"]),
    "the text tower, in micro-batches": ("text.", ["--freeze", "text", "--micro_batch_size", 4]),
}


@pytest.mark.parametrize("prefix, options", FROZEN.values(), ids=FROZEN)
def test_a_frozen_tower_keeps_its_weights(whole_run, tune, prefix, options):
    """With its projection. All else is trained, the head, too."""
    before = checkpoint_of(whole_run, "best.pt")["model"]

    after = tune("--steps", 2, *options)

    same = {name for name, x in before.items() if torch.equal(x, after["model"][name])}
    frozen = {name for name in before if name.startswith(prefix)}
    assert same == frozen
    trained = before.keys() - frozen - COUNTS
    assert len(after["optimizer"]["state"]) == len(trained)


def test_the_head_can_be_left_out(tune):
    after = tune("--steps", 1, "--cls_weight", 0)

    assert not [name for name in after["model"] if "head" in name or name in COUNTS]


def test_a_new_head_learns_at_the_usual_rate(shards, tune, tmp_path):
    """It has nothing to lose. The weights that are there stay, at a rate of 0."""
    clip = tune("--steps", 1, "--cls_weight", 0)
    more = "--init_from", tmp_path / "out" / "last.pt", "--learning_rate", 0

    train.main(short_run(shards, tmp_path / "new", *more))

    new = checkpoint_of(tmp_path / "new")
    assert all(torch.equal(new["model"][name], x) for name, x in clip["model"].items())
    assert new["model"]["head.linear.bias"].abs().max() > 0
    assert new["arguments"]["head_learning_rate"] == 5e-4  # for --resume


# The captions of a shard, how many of their words the checkpoint has, and is another way named?
CAPTIONS = {
    "all known": ("a red square", "100%", False),
    "two of three": ("a red circle", "67%", False),
    "one of three": ("ein rotes thing", "33%", True),
}


@pytest.mark.parametrize("caption, share, is_warned", CAPTIONS.values(), ids=CAPTIONS)
def test_the_words_that_the_vocabulary_has_are_counted(
    tune, tmp_path, capsys, caption, share, is_warned
):
    picture = png(COLOURS["red"], np.random.default_rng(0))
    pairs = [{"png": picture, "txt": caption.encode()}] * 20
    write_shard(tmp_path / "train-0.tar", pairs)

    tune("--steps", 1, "--train_data", tmp_path / "train-0.tar")

    printed = capsys.readouterr().out
    assert share in printed
    assert ("scripts.vocab" in printed) == is_warned
