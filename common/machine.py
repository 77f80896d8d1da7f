"""What a command uses of the machine: files, cores, devices and processes."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from common.cli import STOP_SIGNALS, InputError, check

# -----------------------------------------------------------------------------
# Files and folders


def write_file(path, write):
    """Write a file whole or not at all. `write(file)` fills a temporary file, which is flushed to
    the disk and then renamed to `path`. An OSError leaves an older file at `path` there."""
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
    renamed to `path` at the end. Raise InputError if `path` exists at the beginning."""
    path = Path(path).absolute()
    check(not path.exists(), f"{path} exists already. Remove it, or use another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        yield folder
        folder.rename(path)


def cache_folder():
    """Return the folder for files that can be made again, below XDG_CACHE_HOME or ~/.cache. The
    folder may not exist. Raise RuntimeError if the user has no home, as in a container that runs
    under a number without a user."""
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent, "superclip")


# -----------------------------------------------------------------------------
# Cores, devices and processes


def cores():
    """Return the number of cores on which this process may run. A scheduler may allow fewer than
    the machine has. A limit on computing time, such as docker's --cpus, does not count."""
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
        return torch.ones(1, device=name).device  # a GPU too old for this torch fails to compute it
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


def can_compile(device):
    """Return whether torch.compile works on a device. If it does not, say why. Many containers lack
    what it needs, and a run would end only after it has indexed and validated."""
    try:
        torch.compile(torch.square)(torch.ones(1, device=device))
        return True
    except Exception as error:  # each missing part has another kind
        reason = str(error).partition("\n")[0]
        print(f"torch.compile does not work here, so training takes longer. {reason}")
        print("It needs a C compiler and the headers of Python (gcc and python3-dev).")
        return False


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
