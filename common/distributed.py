"""Let several processes train one model.

torchrun starts the processes, one for each GPU, and each of them runs all of train.py. They meet in
`joined_processes`, and from then on they can exchange tensors.
"""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from common.machine import pick_device

# torchrun tells each process its number and the number of processes in environment variables.
# Schedulers set variables with the same names, so read them only if torchrun started this process.
torchrun = os.environ if dist.is_torchelastic_launched() else {}
RANK = int(torchrun.get("RANK", 0))
WORLD = int(torchrun.get("WORLD_SIZE", 1))
LOCAL_RANK = int(torchrun.get("LOCAL_RANK", 0))


@contextmanager
def joined_processes():
    """Let the processes that torchrun has started exchange tensors in the block, and wait for each
    other at its end. With one process, do nothing. If a scheduler has started several without
    torchrun, print what to do, because each of them is a run of its own."""
    # srun sets the first variable. SLURM_NTASKS would not do, because sbatch sets it in a script
    # that may start Python only once. Other schedulers set the second one.
    n = max(int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE"))
    if n > 1 and not torchrun:
        print(f"{n} processes would train {n} models. To train one, start this with torchrun.")
    if WORLD > 1:
        backend = "gloo"
        if torch.cuda.is_available():
            # Send CPU tensors by gloo, so that comparing values does not wait for the GPUs.
            backend = "cpu:gloo,cuda:nccl"
        # Wait for two hours at most, because all others wait while process 0 validates.
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    yield
    if WORLD > 1:
        from_all(None)  # wait, because process 0 may still validate
        dist.destroy_process_group()


def prepare_device(name):
    """Return --device as a torch.device, and make torch use it as a run needs it. With several
    processes on GPUs, each gets another GPU."""
    if WORLD > 1 and name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{LOCAL_RANK}"
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory and memory_gb use the current device
        # Code is compiled for one number of threads. The threads of autograd run with one thread
        # each, so with another number here they would compile the code again.
        torch.set_num_threads(1)
        # Take the flash kernels on an H100, too. There torch prefers cuDNN's attention, in whose
        # gradients others have found NaN (issue 196678 of pytorch).
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def from_all(value):
    """Return a list of the values that all processes pass to this function, ordered by rank. So
    each process waits for all others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def one_first():
    """Let one process of each machine go through the block first, and then the others."""
    if LOCAL_RANK > 0:
        from_all(None)
    yield
    if LOCAL_RANK == 0:
        from_all(None)
