"""Test what a run writes while it goes on: the rows of its log."""

import time

import pytest
from material import all_rows, rows_of, short_run

import data
import train


def test_a_validation_is_in_groups_as_large_as_a_batch(whole_run):
    """The mean_r1 of a row is the mean of R@1 over both directions. It chooses best.pt."""
    for row in rows_of(whole_run, "validation"):
        there, back = (scores["R@1"]["value"] for scores in row["validation"].values())
        assert row["mean_r1"] == pytest.approx((there + back) / 2)
        assert row["val_group"] == 16


def test_speed_and_data_wait_are_those_of_the_clock(shards, tmp_path, monkeypatch):
    """Each picture takes 5 ms to load, so the run spends most of its time waiting for pictures."""
    load_image = data.load_image
    took = []

    def load_slowly(*args):
        begin = time.perf_counter()
        time.sleep(0.005)
        image = load_image(*args)
        took.append(time.perf_counter() - begin)
        return image

    monkeypatch.setattr(data, "load_image", load_slowly)

    train.main(short_run(shards, tmp_path, "--steps", 4, "--val_data", "none"))

    rows = [row for row in all_rows(tmp_path) if "loss" in row]
    waits = [row["data_wait"] * 32 / row["images_per_second"] for row in rows]  # in seconds
    assert sum(waits) == pytest.approx(sum(took), rel=0.3)
    assert all(row["data_wait"] < 1 for row in rows)
