"""Processes: those that torchrun starts to train one model together, and those that load data."""

import gc
import os
import sys
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, get_worker_info

from common.cli import InputError, sentence_about

# -----------------------------------------------------------------------------
# torchrun starts a process for each GPU, and each of them runs all of train.py.

# Schedulers set variables with the same names, so read them only if torchrun started this process.
torchrun = os.environ if dist.is_torchelastic_launched() else {}
RANK = int(torchrun.get("RANK", 0))
WORLD = int(torchrun.get("WORLD_SIZE", 1))
LOCAL_RANK = int(torchrun.get("LOCAL_RANK", 0))


@contextmanager
def joined_processes():
    """Let the processes of torchrun exchange tensors in the block. Process 0 alone prints."""
    if WORLD == 1:
        yield
        return
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    # On GPUs send CPU tensors by gloo, so that exchanging objects does not wait for the GPUs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Newer versions of torch rename an option of DistributedDataParallel.
    warnings.filterwarnings("ignore", "`broadcast_buffers`")
    # Wait for two hours at most, because all others wait while process 0 validates.
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    try:
        yield
    except Exception as error:
        # One process prints, and torchrun ends the others while they wait. Process 0 prints what is
        # wrong in all of them. An error without a sentence may be its lost connection to a process
        # that has failed, and that one prints the reason.
        if RANK > 0 or sentence_about(error) is None:
            time.sleep(2)
        raise
    from_all(None)  # wait, because process 0 may still validate
    # Free DistributedDataParallel, which is part of a circle of references, before the processes
    # part. With torch 2.13 about one run in ten aborted here otherwise.
    gc.collect()
    dist.destroy_process_group()


def from_all(value):
    """Wait for all processes, and return the list of their values, ordered by rank."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def mean_of_all(scalars):
    """Return a dict of scalar tensors as a dict of floats, averaged over all processes."""
    values = torch.stack([x.detach() for x in scalars.values()])
    if WORLD > 1:
        dist.all_reduce(values)
        values /= WORLD
    return dict(zip(scalars, values.tolist()))


@contextmanager
def one_first():
    """Let one process of each machine go through the block first, and then the others."""
    if LOCAL_RANK > 0:
        from_all(None)
    yield
    if LOCAL_RANK == 0:
        from_all(None)


# -----------------------------------------------------------------------------
# Loading processes


def cores():
    """Return the number of cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def default_workers():
    """Return how many processes load data for this one: one for each core, at most 16. Several GPUs
    share the cores. Each process keeps two batches ready in shared memory."""
    return min(16, cores() // int(torchrun.get("LOCAL_WORLD_SIZE", 1)))


def make_loader(dataset, workers, **options):
    """Return a DataLoader with this number of processes, by default one for each core."""
    if workers is None:
        workers = default_workers()
    if workers > 0 and sys.platform == "linux":
        # Fork, so that the processes share the index and start at once. Python 3.14 would not.
        options["multiprocessing_context"] = "fork"
    return DataLoader(dataset, num_workers=workers, **options)


def to_shared_memory(*tensors):
    """Move a batch to shared memory, if this is a loading process. torch would do so in a thread,
    where an error is lost, and the training would wait for the batch for ever."""
    if get_worker_info() is not None:
        try:
            for x in tensors:
                x.share_memory_()
        except RuntimeError as error:
            advice = "Try --workers 0, or Docker's --shm-size 8g."
            raise InputError(f"no shared memory for a batch: {error}. {advice}") from error


def map_in_processes(function, items):
    """Return an iterable of function(item) for each item of a list. Each core computes some."""
    # A loader without batches calls collate_fn for each item. Its processes also end if this one is
    # killed. Those of a Pool would wait for ever.
    workers = min(len(items), cores())
    return make_loader(items, workers, batch_size=None, collate_fn=function)
