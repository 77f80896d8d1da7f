"""Fine-tuning: --init_from takes weights, vocabulary and model from a checkpoint, and goes on."""

import shutil

import pytest
import torch
from material import checkpoint_of, short_run, validations_of
from one_step import ForkedSuperCLIP

import train
from superclip import SuperCLIPConfig

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


def equal_names(model, other):
    """The names of the tensors that are equal in both, dicts by name."""
    return {name for name in model.keys() & other if torch.equal(model[name], other[name])}


def test_with_a_rate_of_0_the_weights_stay(whole_run, tune):
    """Those of the head, too, which has the rate of the rest."""
    before = checkpoint_of(whole_run, "best.pt")["model"]

    after = tune("--learning_rate", 0)["model"]

    assert equal_names(after, before) == before.keys() - COUNTS
    assert after["num_captions"] == before["num_captions"] + 12 * 16


def test_the_head_can_have_a_rate_of_its_own(whole_run, tune):
    before = checkpoint_of(whole_run, "best.pt")["model"]

    after = tune("--steps", 1, "--head_learning_rate", 0)["model"]

    assert equal_names(after, before) == {name for name in before if name.startswith("head.")}


def test_the_vocabulary_and_the_model_come_along(whole_run, tune, shards, tmp_path):
    """Even to shards that lie beside no vocabulary."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(shards / "train-0.tar", bare)
    before = checkpoint_of(whole_run, "best.pt")

    after = tune("--steps", 1, "--train_data", bare / "train-0.tar")

    assert after["vocab"] == before["vocab"]
    assert after["config"] == before["config"]


def test_the_checkpoint_is_scored_before_the_first_step(whole_run, tune, tmp_path):
    before = checkpoint_of(whole_run, "best.pt")

    tune("--steps", 1)

    first, *_ = validations_of(tmp_path / "out")
    assert first["step"] == 0
    assert first["mean_r1"] == before["best_r1"]


FROZEN = {
    "the image tower": ("visual.", ["--freeze", "image"]),
    "the text tower": ("text.", ["--freeze", "text"]),
    "the text tower, in micro-batches": ("text.", ["--freeze", "text", "--micro_batch_size", 4]),
}


@pytest.mark.parametrize("prefix, options", FROZEN.values(), ids=FROZEN)
def test_a_frozen_tower_keeps_its_weights(whole_run, tune, prefix, options):
    """With its projection. All else is trained, the head, too."""
    before = checkpoint_of(whole_run, "best.pt")["model"]

    after = tune("--steps", 2, *options)["model"]

    assert equal_names(after, before) == {name for name in before if name.startswith(prefix)}


def test_the_head_can_be_left_out(tune):
    after = tune("--steps", 1, "--cls_weight", 0)

    assert not [name for name in after["model"] if "head" in name or name in COUNTS]


def test_what_the_checkpoint_lacks_learns_at_the_usual_rate(whole_run, tune, monkeypatch):
    """It has nothing to lose. What is there stays, at a rate of 0, and so does the head. Adam's
    first step is as long as the rate."""
    before = checkpoint_of(whole_run, "best.pt")
    monkeypatch.setattr(train, "SuperCLIP", ForkedSuperCLIP)
    torch.manual_seed(0)
    fresh = ForkedSuperCLIP(SuperCLIPConfig(**before["config"]))

    after = tune("--steps", 1, "--learning_rate", 0)["model"]

    assert equal_names(after, before["model"]) == before["model"].keys() - COUNTS
    step = (after["second.bias"] - fresh.second.bias).abs().item()
    assert step == pytest.approx(5e-4, rel=0.01)


def test_a_new_head_learns_at_the_usual_rate(shards, tune, tmp_path):
    clip = tune("--steps", 1, "--cls_weight", 0)["model"]
    more = "--init_from", tmp_path / "out" / "last.pt", "--learning_rate", 0, "--steps", 1

    train.main(short_run(shards, tmp_path / "new", *more))

    new = checkpoint_of(tmp_path / "new")["model"]
    assert equal_names(new, clip) == clip.keys()
    bias = new["head.linear.bias"]  # it starts at zeros
    assert bias.abs().max().item() == pytest.approx(5e-4, rel=0.01)
