"""data_wait: for how long has the device had nothing to do, because a batch was not there yet?"""

import pytest
import torch

from runtime import moment, seconds_between


class SimulatedGPU:
    """It works behind the program that gives it orders. Times are in milliseconds."""

    def __init__(self):
        self.now = 0  # on the clock of the program
        self.done = 0  # when the GPU will have done all its orders

    def order(self, milliseconds):
        self.done = max(self.now, self.done) + milliseconds

    def event(self, enable_timing):
        return SimulatedEvent(self)


class SimulatedEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.time = max(self.gpu.now, self.gpu.done)

    def elapsed_time(self, other):
        return other.time - self.time


@pytest.mark.parametrize("loading, expected", [(10, 0), (18, 0), (30, 1 / 3)])
def test_a_gpu_waits_only_while_it_has_nothing_to_do(monkeypatch, loading, expected):
    """A step takes it 20 ms. The program waits for every batch, and runs ahead of the GPU."""
    gpu = SimulatedGPU()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    gpu.order(20)
    waits = []

    for step in range(1, 101):
        before = moment(torch.device("cuda"))
        gpu.now = max(gpu.now, loading * step)
        waits.append((before, moment(torch.device("cuda"))))
        gpu.order(20)

    waited = sum(seconds_between(*wait) for wait in waits)
    assert waited / (gpu.done / 1000) == pytest.approx(expected, abs=0.01)
