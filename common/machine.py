"""What a command uses of the machine: files, devices, loading processes, and the processes that
torchrun starts."""

import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from common.cli import InputError, check

# -----------------------------------------------------------------------------
# Files


def write_file(path, write):
    """Write a file whole or not at all. `write(file)` fills a temporary file, which is flushed to
    the disk and then renamed to `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # after an error it still exists


@contextmanager
def new_folder(path):
    """Make a folder whole or not at all. Yield a hidden folder beside it, which the block fills,
    and which is renamed to `path` at the end."""
    path = Path(path).absolute()
    check(not path.exists(), f"{path} exists already. Remove it, or use another name.")
    hidden = path.with_name(f".{path.name}-{os.getpid()}")
    hidden.mkdir(parents=True)
    try:
        yield hidden
        hidden.rename(path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)  # after an error it still exists


def cache_folder():
    """Return the folder for files that can be made again. The folder may not exist. Raise
    RuntimeError if the user has no home, as in a container."""
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent, "superclip")


# -----------------------------------------------------------------------------
# Devices


def pick_device(name):
    """Return --device as a torch.device, or by default CUDA if there is such a GPU, else the CPU.
    mps is never the default, because it lacks some operations, and a first run must not fail."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.ones(1, device=name).device  # a GPU too old for this torch fails to compute it
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device: cannot use {name} ({reason})") from None


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
        # Take the flash kernels on an H100, too. There torch prefers cuDNN's attention. It is no
        # faster, and can give NaN gradients (pull request 264 of kyutai-labs/pocket-tts).
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


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


def can_compile(device):
    """Return whether a run should compile its model on a device: with CUDA under Linux, if
    torch.compile works. If it does not, say why. Many containers lack what it needs, and without
    this trial a run would end in its first step."""
    if device.type != "cuda" or sys.platform != "linux":
        return False
    try:
        torch.compile(torch.square)(torch.ones(1, device=device))
        return True
    except Exception as error:  # each missing part has another kind
        reason = str(error).partition("\n")[0]
        print(f"torch.compile does not work here, so training takes longer. {reason}")
        print("It needs a C compiler and the headers of Python (gcc and python3-dev).")
        return False


# -----------------------------------------------------------------------------
# Loading processes


def cores():
    """Return the number of cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def make_loader(dataset, workers, **options):
    """Return a DataLoader. workers: the number of its processes, by default the cores divided among
    the GPUs, at most 16; options: other arguments of DataLoader."""
    if workers is None:
        # Take 16 at most, because each keeps two batches ready in shared memory.
        workers = min(16, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if workers > 0 and sys.platform == "linux":
        # Fork, so that the processes share the index and start at once. Python 3.14 would not.
        options["multiprocessing_context"] = "fork"
    return DataLoader(dataset, num_workers=workers, **options)


def call(task):
    return task()


def in_processes(tasks):
    """Return an iterable of what the tasks return, a list of functions without arguments. As many
    processes as there are cores call them."""
    # A DataLoader that makes no batches is a pool of processes, which also end if this one is
    # killed. Those of multiprocessing.Pool would wait for ever.
    return make_loader(tasks, min(len(tasks), cores()), batch_size=None, collate_fn=call)


# -----------------------------------------------------------------------------
# Several processes train one model. torchrun starts them, one for each GPU, and each of them runs
# all of train.py. They meet in `joined_processes`.

# torchrun tells each process its number and the number of processes in environment variables.
# Schedulers set variables with the same names, so read them only if torchrun started this process.
torchrun = os.environ if dist.is_torchelastic_launched() else {}
RANK = int(torchrun.get("RANK", 0))
WORLD = int(torchrun.get("WORLD_SIZE", 1))
LOCAL_RANK = int(torchrun.get("LOCAL_RANK", 0))


@contextmanager
def joined_processes():
    """Let the processes of torchrun exchange tensors in the block, and wait for each other at its
    end. Process 0 alone prints. With one process, do nothing."""
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
    yield
    from_all(None)  # wait, because process 0 may still validate
    dist.destroy_process_group()


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
