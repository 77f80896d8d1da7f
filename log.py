"""The log of a run, log.jsonl: a line of JSON for each start, for the losses of some steps, and for
each validation. train.py writes it, and scripts.curves and the study read it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from cli import InputError, check, cores
from distributed import RANK, WORLD


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
    with open(Path(out_dir, "log.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\n")
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
