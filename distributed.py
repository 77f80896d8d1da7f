"""Several processes that train one model.

torchrun starts them, one for each GPU, and each runs the whole of train.py. They meet in
`join_processes`, and from then on they can exchange tensors.
"""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from cli import pick_device

# torchrun tells each process its number, and how many there are. Schedulers set variables of these
# names, too, so they count under torchrun alone.
torchrun = os.environ if dist.is_torchelastic_launched() else {}
RANK = int(torchrun.get("RANK", 0))
WORLD = int(torchrun.get("WORLD_SIZE", 1))
LOCAL_RANK = int(torchrun.get("LOCAL_RANK", 0))


def join_processes():
    """Lets the processes that torchrun has started find each other."""
    backend = "gloo"
    if torch.cuda.is_available():
        # CPU tensors travel by gloo, so that processes can agree on something without waiting for
        # their GPUs.
        backend = "cpu:gloo,cuda:nccl"
    # Two hours, because all others wait while rank 0 validates.
    dist.init_process_group(backend, timeout=timedelta(hours=2))


def device_of_process(name):
    """Returns --device, which in several processes is the GPU of this one, as a torch.device."""
    if WORLD > 1 and name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{LOCAL_RANK}"
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory and memory_gb are of the current one
        # Compiled code is for one number of threads, and autograd's threads count one each. With
        # another number here they would compile it again.
        torch.set_num_threads(1)
    return device


def average(tensor):
    """The mean over all processes, in place. With one process, the tensor itself."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def wait_for_all():
    """Returns when all processes have come here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # dist.barrier would use the GPU


def from_all(value):
    """Return what each process gives here, as a list in the order of the ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def one_first():
    """One process of each machine goes through the block, and then the others do."""
    if LOCAL_RANK > 0:
        wait_for_all()
    yield
    if LOCAL_RANK == 0:
        wait_for_all()
