"""data_wait: for how long has the device had nothing to do, because a batch was not there yet?"""

import pytest
import torch

from runtime import moment, seconds_between


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
