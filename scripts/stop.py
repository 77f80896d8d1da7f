"""What the processes of a run agree on: sums, and when to stop (Ctrl-C, a scheduler's SIGTERM)."""

import os
import signal
import traceback

import torch
import torch.distributed as dist


def all_sum(tensor):
    """The sum over all processes, in place. With one process, the tensor itself."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Stop:
    """SIGINT (Ctrl-C) and SIGTERM (from schedulers) ask a run to save and leave at the next step. A
    second signal kills it."""

    def __init__(self):
        self.asked, self.abandon, self.process = False, False, os.getpid()
        for number_of_signal in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number_of_signal, self.ask)

    def ask(self, number_of_signal, _):
        if os.getpid() != self.process:  # a loading process that has just been forked: see data.py
            return
        self.asked = True
        signal.signal(number_of_signal, signal.SIG_DFL)
        if self.abandon:
            raise KeyboardInterrupt

    def unless_asked(self, function, *args):
        """What the function returns, or None if a signal comes before its end. A validation may
        take long, and schedulers kill what has not left after half a minute."""
        try:
            self.abandon = True
            return None if self.asked else function(*args)
        except KeyboardInterrupt as stop:
            traceback.clear_frames(stop.__traceback__)  # they hold the loading processes
            return None
        finally:
            self.abandon = False

    def agreed(self):
        """Was any process asked? All of them get the same answer in the same step, or some would
        leave while others wait for their features. The tensor is on the CPU, so this does not wait
        for the GPU."""
        return bool(all_sum(torch.tensor(float(self.asked))))
