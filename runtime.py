"""What a run needs besides its method: processes that act as one, the folder of the run, and its
log. train.py calls all of it but the last two functions, which serve those who read its logs.

torchrun starts several processes, one for each GPU, and each runs the whole of train.py. They meet
in `join_processes`, and from then on they can exchange tensors.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from cli import InputError, check, cores, pick_device

# torchrun tells each process its number, and how many there are. Schedulers set variables of these
# names, too, so they count under torchrun alone.
torchrun = os.environ if dist.is_torchelastic_launched() else {}
RANK = int(torchrun.get("RANK", 0))
WORLD = int(torchrun.get("WORLD_SIZE", 1))
LOCAL_RANK = int(torchrun.get("LOCAL_RANK", 0))

# -----------------------------------------------------------------------------
# Processes


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


@contextmanager
def one_first():
    """One process of each machine goes through the block, and then the others do."""
    if LOCAL_RANK > 0:
        wait_for_all()
    yield
    if LOCAL_RANK == 0:
        wait_for_all()


# -----------------------------------------------------------------------------
# The folder of a run, and its log


def claim_folder(out_dir, resume):
    """Makes --out_dir. Raises InputError if there is a run to be spared."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for temporary in out_dir.glob(".*.tmp"):  # of a run that was killed as it saved
        temporary.unlink()
    # Without any checkpoint --resume starts a run, so that a scheduler can always give it.
    if any(out_dir.glob("*.pt")) and not (resume and Path(out_dir, "last.pt").exists()):
        raise InputError(f"{out_dir} holds a run: use --resume (with last.pt) or another --out_dir")


def commit():
    """Which commit this code is of, or "" if git does not know."""
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # there is no git
        return ""


def header_of(args, steps, model, pairs, val_pairs, dtype, device):
    """Prints what this run is, and returns the header of its log, without which no number in the
    rows that follow means anything."""
    device_name = f"{device.type} ({cores()} cores)"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    fingerprint = pairs.fingerprint
    if val_pairs is not None:
        fingerprint += f"-{val_pairs.fingerprint}"
    header = {
        "pairs": len(pairs),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "batch_size": args.batch_size,
        "processes": WORLD,
        "device": device_name,
        "dtype": dtype,
        "torch": str(torch.__version__),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "data_fingerprint": fingerprint,
    }
    print(", ".join(f"{name} {value}" for name, value in header.items()))
    return {
        **header,
        "command": sys.argv,
        "arguments": vars(args),
        "config": vars(model.config),
    }


def write_row(out_dir, row):
    """Adds a row to log.jsonl: a header at each start, the losses of a step, which it also prints,
    or a validation. A resumed run may log a step twice: the later row counts."""
    if RANK > 0:
        return
    with open(Path(out_dir, "log.jsonl"), "a+b") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read(1) not in (b"", b"\n"):  # a full disk has torn the row before this one
            file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
    if "loss" in row:
        terms = [f"{name} {value:.3f}" for name, value in row.items() if name.endswith("loss")]
        speed = f"{row['images_per_second']:.0f} images/s, {row['data_wait']:.0%} waiting"
        tqdm.write(f"step {row['step']:6d}: {', '.join(terms)}, {speed}")


def read_log(path):
    """A log.jsonl -> the last header in it, and the list of rows that count.

    A run that is resumed adds a header, with the step from which it goes on. What the attempt
    before it has logged beyond that is no part of the run, and a validation may come again: then
    the later one counts. A row that a full disk has torn is left out. Raises InputError.
    """
    header = None
    rows = {}  # by step and kind
    try:
        for line in Path(path).read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "header" in row:
                header = row["header"]
                rows = {key: x for key, x in rows.items() if x["step"] <= row["step"]}
            else:
                rows[row["step"], "loss" in row] = row
    except (ValueError, LookupError, TypeError) as error:
        # not its repr, which may hold the whole file
        raise InputError(f"{path} is not a log of train.py: {error}") from error
    check(header, f"{path} has no header, so it is not a log of train.py")
    return header, list(rows.values())


def short_names(folders):
    """Folders, such as those of --zeroshot_data -> {folder: its name}. Where several have one name,
    the folders above are put before it until it is unique."""
    names = {}
    for folder in folders:
        parts = Path(folder).parts
        names[folder] = folder
        for n in range(1, len(parts) + 1):
            alike = [other for other in folders if Path(other).parts[-n:] == parts[-n:]]
            if len(alike) == 1:
                names[folder] = "/".join(parts[-n:])
                break
    return names
