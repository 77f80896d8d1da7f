"""What a command uses of the machine: cores, a device and its dtype, and processes beside it."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch

from common.cli import STOP_SIGNALS, InputError


def cores():
    """Return the number of cores on which this process may run. A scheduler may allow fewer than
    the machine has. A limit on computing time, such as docker's --cpus, is not taken into
    account."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def pick_device(name):
    """Return --device as a torch.device, or by default CUDA if there is such a GPU, else the CPU.
    mps is never the default, because it lacks some operations, and a first run must not fail. Raise
    InputError if the device cannot be used. name: --device, or None."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device: cannot use {name} ({error})") from None


def pick_dtype(device):
    """Return the name of the dtype in which steps are computed by default on a device."""
    if device.type == "cuda":
        # GPUs have had bfloat16 units since Ampere, compute capability 8. On older GPUs use
        # float16. Its range is small, but the loss scaler makes up for that.
        capability = torch.cuda.get_device_capability(device)
        return "bfloat16" if capability[0] >= 8 else "float16"
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older torch cannot tell
        if torch.cpu.get_capabilities().get("avx512_bf16"):
            return "bfloat16"
    return "float32"


def ignore_signals(worker=None):
    """Ignore the signals that end a command. Ctrl-C, a scheduler and a closed terminal send them to
    all processes of a command, but only the first process acts on them. worker: the number of a
    loading process, which torch passes."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent():
    """Wait until the first process has ended, and then end this one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def start_in_pool():
    ignore_signals()
    # Without this thread the pool would wait for tasks for ever if the first process were killed.
    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def process_pool(n):
    """Yield a pool of n processes. If the block fails, or a signal ends it, end them at once."""
    with ProcessPoolExecutor(n, initializer=start_in_pool) as pool:
        try:
            yield pool
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()
            raise
