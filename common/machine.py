"""What a command uses of the machine: files, devices and processes."""

import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils.data import DataLoader

from common.cli import STOP_SIGNALS, InputError, check


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
    """Make a folder whole or not at all. Yield a hidden folder, which the block fills, and which is
    renamed to `path` at the end."""
    path = Path(path).absolute()
    check(not path.exists(), f"{path} exists already. Remove it, or use another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        others = multiprocessing.active_children()
        try:
            yield folder
        except BaseException:  # such as Ctrl-C, after which loading processes still write into it
            for process in multiprocessing.active_children():
                with suppress(RuntimeError):  # torch raises it when a loading process is killed
                    if process not in others:
                        process.kill()
                        process.join()
            raise
        folder.rename(path)


def cache_folder():
    """Return the folder for files that can be made again. The folder may not exist. Raise
    RuntimeError if the user has no home, as in a container."""
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent, "superclip")


def cores():
    """Return the number of cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


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
    """Return whether torch.compile works on a device. If it does not, say why. Many containers lack
    what it needs, and without this trial a run would end in its first step."""
    try:
        torch.compile(torch.square)(torch.ones(1, device=device))
        return True
    except Exception as error:  # each missing part has another kind
        reason = str(error).partition("\n")[0]
        print(f"torch.compile does not work here, so training takes longer. {reason}")
        print("It needs a C compiler and the headers of Python (gcc and python3-dev).")
        return False


def ignore_signals(worker):
    """Let the first process alone act on a signal that ends a command. Ctrl-C, a scheduler and a
    closed terminal send it to all of them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, workers, **options):
    """Return a DataLoader. workers: the number of its processes, by default the cores divided among
    the GPUs, at most 16; options: other arguments of DataLoader."""
    if workers is None:
        # Take 16 at most, because each keeps two batches ready in shared memory.
        workers = min(16, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if workers > 0 and sys.platform == "linux":
        # Fork, so that the processes share the index and start at once. Python 3.14 would not.
        options["multiprocessing_context"] = "fork"
    return DataLoader(dataset, num_workers=workers, worker_init_fn=ignore_signals, **options)


def call(task):
    return task()


def in_processes(tasks):
    """Return an iterable of what the tasks return, a list of functions without arguments. As many
    processes as there are cores call them."""
    # A DataLoader that makes no batches is a pool of processes, which also end if this one is
    # killed. Those of multiprocessing.Pool would wait for ever.
    return make_loader(tasks, min(len(tasks), cores()), batch_size=None, collate_fn=call)
