"""Write the log of a run, log.jsonl, and read it. Each line is a row in JSON: a header at each
start of the run, the losses of a step, or a validation. train.py writes the log, and scripts.curves
and the study read it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import InputError, check
from common.distributed import RANK, WORLD
from common.machine import cores


def commit():
    """Return the git commit of this code, or "" outside a git repository."""
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # git is not installed
        return ""


def header_of(args, steps, model, pairs, val_pairs, dtype, device):
    """Return the header of the log, and print it without command, options and configuration. It
    says under which conditions the numbers in the other rows were measured."""
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
    """Add a row to log.jsonl: a header, the losses of a step, or a validation. Print the losses,
    too. Only process 0 writes. A resumed run may log a step twice. Then the later row counts."""
    if RANK > 0:
        return
    with open(Path(out_dir, "log.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\n")
    if "loss" in row:
        terms = [f"{name} {value:.3f}" for name, value in row.items() if name.endswith("loss")]
        speed = f"{row['images_per_second']:.0f} images/s, {row['data_wait']:.0%} waiting"
        tqdm.write(f"step {row['step']:6d}: {', '.join(terms)}, {speed}")


def read_log(path):
    """Return the last header in a log.jsonl, and a list of the other rows that count.

    A run that is resumed adds a header with the step from which it goes on. Earlier rows beyond
    that step do not count. A validation at that step may come twice, and then the later one counts.
    Raise InputError if the file is not a log.
    """
    header = None
    rows = {}  # (step, has it losses?) -> row
    try:
        for line in Path(path).read_text("utf-8").splitlines():
            row = json.loads(line)
            if "header" in row:
                header = row["header"]
                rows = {key: x for key, x in rows.items() if x["step"] <= row["step"]}
            else:
                rows[row["step"], "loss" in row] = row
    except (ValueError, LookupError, TypeError) as error:
        # Do not print the repr of the error, which may hold the whole file.
        raise InputError(f"{path} is not a log of train.py: {error}") from error
    check(header, f"{path} has no header, so it is not a log of train.py")
    return header, list(rows.values())
