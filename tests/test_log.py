"""What a run tells while it goes on: the rows of its log."""

import json
import subprocess
import time

import pytest
from children import ROOT
from material import all_rows, losses_of, short_run, steps_of, validations_of

import data
import eval as evaluation
import train

pytestmark = pytest.mark.usefixtures("smallest")

PAUSE = 0.1  # seconds that a slow loader takes for a batch


def test_a_row_is_logged_where_it_is_due(whole_run):
    """Every second step, and every fourth, which is validated, as is the model before training."""
    assert steps_of(losses_of(whole_run)) == [2, 4, 6, 8, 10, 12]
    assert steps_of(validations_of(whole_run)) == [0, 4, 8, 12]


def test_a_row_holds_the_terms_and_their_weighted_sum(shards, tmp_path):
    train.main(short_run(shards, tmp_path, "--steps", 2, "--cls_weight", 0.5))

    row = losses_of(tmp_path)[-1]
    terms = row["contrastive_loss"] + 0.5 * row["classification_loss"]
    assert row["loss"] == pytest.approx(terms)


def test_a_row_holds_the_rate_of_its_step(whole_run):
    for row in losses_of(whole_run):
        rate = 1e-3 * train.learning_rate_factor(row["step"] - 1, 1, 12)  # one step of warm-up
        assert row["learning_rate"] == pytest.approx(rate)


def test_the_header_says_what_the_run_is(whole_run):
    header = all_rows(whole_run)[0]["header"]

    model, _, _ = evaluation.load(whole_run / "last.pt")
    assert header["parameters"] == sum(p.numel() for p in model.parameters())
    assert header["pairs"] == 70
    assert header["steps"] == 12
    assert header["arguments"]["learning_rate"] == 1e-3
    assert header["config"] == json.loads(json.dumps(vars(model.config)))


def test_the_header_names_the_commit(shards, tmp_path):
    train.main(short_run(shards, tmp_path, "--steps", 1))

    command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    assert all_rows(tmp_path)[0]["header"]["commit"] == commit


def test_a_run_needs_no_git(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    train.main(short_run(shards, tmp_path, "--steps", 1))

    assert all_rows(tmp_path)[0]["header"]["commit"] == ""


# ---- the clock


@pytest.fixture(params=["--micro_batch_size=16", "--micro_batch_size=8"])
def slow_rows(request, shards, tmp_path, monkeypatch):
    """The rows of four steps for whose batches a loader needs PAUSE seconds each, and the seconds
    that each step has taken, by the speed that its row tells."""
    load_batches = data.load_batches

    def load_slowly(*args):
        for batch in load_batches(*args):
            time.sleep(PAUSE)
            yield batch

    monkeypatch.setattr(data, "load_batches", load_slowly)
    options = "--steps", 4, "--log_every", 1, "--eval_every", 2, request.param
    train.main(short_run(shards, tmp_path, *options))
    rows = [row for row in all_rows(tmp_path) if "loss" in row]
    return [(row, 16 / row["images_per_second"]) for row in rows]


def test_speed_and_data_wait_are_those_of_the_clock(slow_rows):
    """A step cannot be shorter than the pause in it, which is all waiting."""
    assert len(slow_rows) == 4
    for row, seconds in slow_rows:
        assert 0.99 * PAUSE < seconds < 20 * PAUSE
        assert 0.99 * PAUSE < row["data_wait"] * seconds
        assert row["data_wait"] <= 1


def test_data_wait_is_near_0_if_batches_are_there_before_they_are_needed(
    shards, tmp_path, monkeypatch
):
    load_batches = data.load_batches
    monkeypatch.setattr(data, "load_batches", lambda *args: iter([*load_batches(*args)]))

    train.main(short_run(shards, tmp_path))

    assert min(row["data_wait"] for row in all_rows(tmp_path) if "loss" in row) < 0.1
