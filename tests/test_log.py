"""What a run tells while it goes on: the rows of its log."""

import time

from material import all_rows, rows_of, short_run, steps_of

import data
import eval as evaluation
import train


def test_a_row_is_logged_where_it_is_due(whole_run):
    """Losses every second step; validations before the first, and after every fourth."""
    assert steps_of(rows_of(whole_run, "loss")) == [2, 4, 6, 8, 10, 12]
    assert steps_of(rows_of(whole_run, "zeroshot")) == [0, 4, 8, 12]


def test_the_header_says_what_the_run_is(whole_run):
    header = all_rows(whole_run)[0]["header"]

    model, _, _ = evaluation.load(whole_run / "last.pt")
    assert header["parameters"] == sum(p.numel() for p in model.parameters())
    assert (header["pairs"], header["steps"]) == (70, 12)
    assert header["arguments"]["learning_rate"] == 1e-3
    assert header["config"]["patch_size"] == 4


def test_speed_and_data_wait_are_those_of_the_clock(shards, tmp_path, monkeypatch):
    """A step cannot be shorter than the pause of its loader, which is most of the waiting."""
    load_batches = data.load_batches

    def load_slowly(*args):
        for batch in load_batches(*args):
            time.sleep(0.1)
            yield batch

    monkeypatch.setattr(data, "load_batches", load_slowly)

    train.main(short_run(shards, tmp_path, "--steps", 4, "--log_every", 2))

    rows = [row for row in all_rows(tmp_path) if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        seconds = 16 / row["images_per_second"]  # of a step
        assert 0.099 < row["data_wait"] * seconds < 0.99 * seconds < 2
