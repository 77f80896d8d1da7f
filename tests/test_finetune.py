"""Test fine-tuning: a run with --init_from begins with the model and vocabulary of a checkpoint."""

import pytest
import torch
from material import checkpoint_of, rows_of, short_run, small_model, write_checkpoint

import train
from common import run as runs

COUNTS = {"token_counts", "num_captions"}  # each run counts anew, at any learning rate


@pytest.fixture
def tune(whole_run, shards, tmp_path):
    """Return tune(*options), which fine-tunes the model of the whole run, and returns last.pt."""
    start = short_run(shards, tmp_path / "out", "--init_from", whole_run / "best.pt")

    def tune(*options):
        train.main([*start, *map(str, options)])
        return checkpoint_of(tmp_path / "out")

    return tune


def test_with_a_rate_of_0_the_weights_stay(whole_run, tune, tmp_path):
    """The weights of the head stay, too, because it is not new and has the same learning rate. The
    first score is that of the checkpoint, before any training."""
    before = checkpoint_of(whole_run, "best.pt")

    after = tune("--learning_rate", 0)["model"]

    rows = rows_of(tmp_path / "out", "zeroshot")
    for name in before["model"].keys() - COUNTS:
        assert torch.equal(after[name], before["model"][name]), name
    [at_step] = [row for row in rows_of(whole_run, "zeroshot") if row["step"] == before["step"]]
    assert [row["mean_r1"] for row in rows] == [at_step["mean_r1"]] * 4
    assert checkpoint_of(tmp_path / "out", "best.pt")["step"] == 12  # the last of equal scores


def test_the_words_are_counted_anew(tune, whole_run):
    """A word that was rare in the captions of the checkpoint may be in every caption here. With the
    old counts it would weigh most in every label."""
    before = checkpoint_of(whole_run, "best.pt")["model"]

    after = tune("--steps", 2)["model"]

    assert before["num_captions"] > 2 * 16
    assert after["num_captions"] == 2 * 16
    assert after["token_counts"].max() <= 2 * 16


def test_a_run_that_has_only_harmed_has_no_best_pt(tune, tmp_path):
    tune("--learning_rate", 1, "--steps", 2)

    before, after = (row["mean_r1"] for row in rows_of(tmp_path / "out", "zeroshot"))
    assert after < before
    assert not (tmp_path / "out" / "best.pt").exists()


def test_a_resumed_run_does_not_need_its_start(tune, tmp_path):
    """It keeps the rates of the weights from there, and of its new head."""
    start = write_checkpoint(tmp_path / "clip.pt", small_model(cls_weight=0))
    before = tune("--init_from", start, "--steps", 2)
    start.unlink()

    train.main(["--resume", str(tmp_path / "out"), "--steps", "4"])

    after = checkpoint_of(tmp_path / "out")
    assert after["step"] == 4
    for last in (before, after):
        groups = last["optimizer"]["param_groups"]
        assert [group["relative_rate"] for group in groups] == [1, 1, 10, 10]


# (--cls_weight or None, the weight in the file) -> the weight of the run
WEIGHTS = {(None, 0.3): 0.3, (None, 0): 1, (0, 0): 0, (0, 0.3): 0, (0.5, 0.3): 0.5, (0.5, 0): 0.5}


@pytest.mark.parametrize("typed, of_file", WEIGHTS)
def test_the_weight_of_the_head_is_that_of_the_file_if_it_has_one(
    tune, tmp_path, capsys, typed, of_file
):
    """A model without a head gets one with weight 1, and the run says so. The log says which weight
    was used."""
    write_checkpoint(tmp_path / "start.pt", small_model(cls_weight=of_file))
    options = [] if typed is None else ["--cls_weight", typed]

    after = tune("--init_from", tmp_path / "start.pt", "--steps", 1, *options)

    expected = WEIGHTS[typed, of_file]
    has_head = any("head" in name for name in after["model"])
    has_new_head = has_head and of_file == 0
    assert (f"weight {expected:g}" in capsys.readouterr().out) == has_new_head
    assert after["config"]["cls_weight"] == expected
    assert after["header"]["config"]["cls_weight"] == expected
    assert has_head == (expected > 0)


def test_what_the_checkpoint_lacks_learns_at_ten_times_the_rate(tune, tmp_path):
    """A new head has nothing to lose. Adam's first step is as long as the learning rate, and the
    biases of a norm start at 0."""
    write_checkpoint(tmp_path / "clip.pt", small_model(cls_weight=0))
    start = "--init_from", tmp_path / "clip.pt", "--learning_rate", 1e-4, "--steps", 1

    after = tune(*start)["model"]

    assert after["visual.ln_post.bias"].abs().max().item() == pytest.approx(1e-4, rel=0.05)
    assert after["head.ln.bias"].abs().max().item() == pytest.approx(1e-3, rel=0.01)
    assert rows_of(tmp_path / "out", "loss")[-1]["learning_rate"] == 1e-4


def test_weights_without_a_place_in_the_model_are_named(tune, checkpoint, monkeypatch, capsys):
    """An option of a fork may leave out a module of the checkpoint, as --cls_weight 0 does."""
    model, *others = runs.read_model(checkpoint)
    model.adapter = torch.nn.Linear(2, 2)
    monkeypatch.setattr(runs, "read_model", lambda path: (model, *others))

    after = tune("--steps", 1)["model"]

    assert not any("adapter" in name for name in after)
    assert "adapter" in capsys.readouterr().out
