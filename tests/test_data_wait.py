"""data_wait: for how long has the device had nothing to do, because a batch was not there yet?"""

import pytest
import torch

from runtime import moment, seconds_between


class Event:
    """Of a GPU that works behind the program that gives it orders. Times are in milliseconds."""

    now = 0  # on the clock of the program
    done = 0  # when the GPU will have done all its orders

    def __init__(self, enable_timing):
        self.time = None

    def record(self):
        self.time = max(Event.now, Event.done)

    def elapsed_time(self, other):
        return other.time - self.time


@pytest.mark.parametrize("loading, expected", [(18, 0), (30, 1 / 3)])
def test_a_gpu_waits_only_while_it_has_nothing_to_do(monkeypatch, loading, expected):
    """A step takes it 20 ms. The program waits for every batch, and runs ahead of the GPU."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.now = 0
    Event.done = 20
    waits = []

    for step in range(1, 101):
        before = moment(torch.device("cuda"))
        Event.now = max(Event.now, loading * step)
        waits.append((before, moment(torch.device("cuda"))))
        Event.done = max(Event.now, Event.done) + 20

    waited = sum(seconds_between(*wait) for wait in waits)
    assert waited / (Event.done / 1000) == pytest.approx(expected, abs=0.01)
