"""What a run tells while it goes on: the rows of its log."""

import time

import pytest
import torch
from material import all_rows, rows_of, short_run

import data
import train
from runtime import moment, seconds_between


def test_a_validation_is_in_groups_as_large_as_a_batch(whole_run):
    """Its mean R@1, which chooses best.pt, is that of both ways."""
    for row in rows_of(whole_run, "validation"):
        there, back = (scores["R@1"]["value"] for scores in row["validation"].values())
        assert row["mean_r1"] == pytest.approx((there + back) / 2)
        assert row["val_group"] == 16


def test_speed_and_data_wait_are_those_of_the_clock(shards, tmp_path, monkeypatch):
    """The run waits for pictures that take 5 ms each, and so for most of its time."""
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


# ---- data_wait on a GPU


class Event:
    """Of a GPU that works behind the program that gives it orders, in milliseconds."""

    now = 0  # on the clock of the program
    done = 20  # when the GPU will have done all its orders

    def __init__(self, enable_timing):
        pass

    def record(self):
        self.time = max(Event.now, Event.done)

    def elapsed_time(self, other):
        return other.time - self.time


@pytest.mark.parametrize("loading, waited", [(18, 0), (30, 0.01)])
def test_a_gpu_waits_only_while_it_has_nothing_to_do(monkeypatch, loading, waited):
    """It has orders for 20 ms when the program begins to wait for a batch."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    device = torch.device("cuda")
    before = moment(device)

    monkeypatch.setattr(Event, "now", loading)

    assert seconds_between(before, moment(device)) == pytest.approx(waited)
