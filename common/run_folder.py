"""The folder of a run: log.jsonl, last.pt and best.pt.

Each line of the log is a row in JSON: a header at each start of the run, the losses of a step, or a
validation. train.py writes it, and scripts.curves and the study read it.
"""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

from common.checkpoint import read_checkpoint, write_checkpoint
from common.cli import InputError, check
from common.distributed import RANK, WORLD, from_all
from common.machine import cores, write_file

OUT = r"out(_\d+)?"  # the name of a folder that a run without --out_dir makes
# The options that may change with --resume: the folder, the length, the learning rate, the machine,
# logging. Shards and vocabulary are here because their files may have moved. `load_last` compares
# the sizes in the shards and the text of the vocabulary instead.
MAY_CHANGE = {
    "out_dir", "resume", "steps", "epochs", "learning_rate", "micro_batch_size", "workers",
    "device", "dtype", "compile", "log_every", "eval_every",
    "train_data", "val_data", "zeroshot_data", "vocab",
}  # fmt: skip


def find_folder(resume):
    """Make and return the first of the folders out, out_2, out_3 ... that is free, for a run
    without --out_dir. With `resume`, return the one whose last.pt was saved last, if any."""
    saved = [path for path in Path().glob("out*/last.pt") if re.fullmatch(OUT, path.parent.name)]
    if resume and saved:
        return max(saved, key=os.path.getmtime).parent
    for number in count(1):
        folder = Path("out" if number == 1 else f"out_{number}")
        # mkdir checks and creates in one step, so two runs that start at once get two folders.
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def claim_folder(out_dir, resume):
    """Return the folder of a run as a string, and make it if it does not exist. Refuse a folder
    that holds a run, unless it is to be resumed. out_dir: --out_dir, or None."""
    folder = find_folder(resume) if out_dir is None else Path(out_dir)
    has_checkpoint = any(folder.glob("*.pt"))
    has_run = has_checkpoint or Path(folder, "log.jsonl").exists()
    # If the folder holds no checkpoint, --resume starts a run. So a scheduler can always give it.
    can_resume = Path(folder, "last.pt").exists() or not has_checkpoint
    check(can_resume, f"{folder} holds weights, but no last.pt. Name another --out_dir.")
    check(resume or not has_run, f"{folder} holds a run. Add --resume, or name another --out_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    for temporary in folder.glob(".*.tmp"):  # left by a run that was killed while it saved
        temporary.unlink()
    return str(folder)


def commit():
    """Return the git commit of this code, or "" outside a git repository."""
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # git is not installed
        return ""


def header_of(args, steps, eval_every, model, pairs, val_samples, dtype, device):
    """Return the header of the log: the conditions under which the other rows were measured."""
    device_name = f"{device.type} ({cores()} cores)"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    fingerprint = pairs.fingerprint
    # What the options leave to --init_from and to the names of shards. scripts.search reads it.
    found = {"cls_weight": model.config.cls_weight, "val_data": ["none"]}
    if val_samples is not None:
        fingerprint += f"-{val_samples.fingerprint}"
        found["val_data"] = val_samples.paths
    return {
        "pairs": len(pairs),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "eval_every": eval_every,
        "batch_size": args.batch_size,
        "processes": WORLD,
        "device": device_name,
        "dtype": dtype,
        "torch": str(torch.__version__),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "data_fingerprint": fingerprint,
        "command": sys.argv,
        "arguments": {**vars(args), **found},
        "config": vars(model.config),
    }


class RunFolder:
    """The folder of a run, and the best score so far. Only process 0 writes.

    start: the step from which the run goes on. It is 0 for a new run.
    """

    def __init__(self, args, header, model, tokenizer, optimizer, scaler):
        """Take the folder of --out_dir, or make a new one, and load its last.pt, if there is one,
        into model, optimizer and scaler. header: from header_of."""
        folder = claim_folder(args.out_dir, args.resume) if RANK == 0 else None
        out_dir = from_all(folder)[0]  # process 0 chooses the folder
        header["arguments"]["out_dir"] = out_dir
        self.last = Path(out_dir, "last.pt")
        self.best = Path(out_dir, "best.pt")
        self.rows = Path(out_dir, "log.jsonl")
        self.header = header
        self.model = model
        self.tokenizer = tokenizer
        self.optimizer = optimizer
        self.scaler = scaler
        self.start = 0
        self.best_r1 = 0.0
        self.saved_time = time.monotonic()
        print(f"out_dir: {out_dir}")
        facts = {name: x for name, x in header.items() if not isinstance(x, (dict, list))}
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
        if self.last.exists():
            self.load_last()
        if args.resume:
            print(f"going on from step {self.start}")  # 0 if there is no last.pt
        states = from_all((header["data_fingerprint"], self.start))
        check(len({*states}) == 1, "the processes see different data, or a different last.pt")
        if RANK == 0 and self.rows.exists():
            self.cut_log()
        self.log({"header": header, "step": self.start})

    def cut_log(self):
        """Drop the rows that the run logs again: those of later steps than that of last.pt, and the
        validation after its step, unless none is due there any more."""
        is_due = self.start % self.header["eval_every"] == 0 or self.start == self.header["steps"]
        kept = []
        for line in self.rows.read_text("utf-8").splitlines(keepends=True):
            with suppress(ValueError):  # a full disk has cut the last line
                row = json.loads(line)
                is_result = "loss" in row or ("zeroshot" in row and not is_due)
                if row["step"] < self.start or (row["step"] == self.start and is_result):
                    kept.append(line)
        write_file(self.rows, lambda file: file.write("".join(kept).encode()))

    def load_last(self):
        saved = read_checkpoint(self.last)
        check("optimizer" in saved, f"{self.last} is not the last.pt of a run")
        before, now = saved["header"], self.header
        changed = [
            f"--{name} was {before['arguments'].get(name)} before, and is {value} now."
            for name, value in now["arguments"].items()
            if name not in MAY_CHANGE and before["arguments"].get(name) != value
        ]
        if before["data_fingerprint"] != now["data_fingerprint"]:
            changed.append(f"--train_data or --val_data is not what {self.last} was trained with.")
        if saved["vocab"] != self.tokenizer.vocab:
            changed.append(f"--vocab is not what {self.last} was trained with.")
        check(not changed, f"{' '.join(changed)} --resume cannot change that.")
        self.start = saved["step"]
        is_past = f"step {self.start} of last.pt is past --steps {now['steps']}"
        check(self.start <= now["steps"], is_past)
        self.model.load_state_dict(saved["model"])
        # Keep the groups of this optimizer, so that a new --learning_rate counts. The file numbers
        # the moments in the order of the parameters in these groups.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
        if saved["scaler"]:  # the state is empty without float16
            self.scaler.load_state_dict(saved["scaler"])
        # Read the best score from best.pt. The one in last.pt may be older, because last.pt is
        # saved before the validation of its step.
        newest = read_checkpoint(self.best) if self.best.exists() else saved
        self.best_r1 = newest["best_r1"]

    def log(self, row):
        """Add a row to log.jsonl. Print it, too, if it holds the losses of a step."""
        if RANK > 0:
            return
        with open(self.rows, "a") as file:
            file.write(json.dumps(row) + "\n")
        if "loss" in row:
            terms = [f"{name} {value:.3f}" for name, value in row.items() if name.endswith("loss")]
            speed = f"{row['images_per_second']:.0f} images/s, {row['data_wait']:.0%} waiting"
            tqdm.write(f"step {row['step']:6d}: {', '.join(terms)}, {speed}")

    def save(self, path, step, **more):
        facts = {"header": self.header, "step": step, "best_r1": self.best_r1}
        write_checkpoint(path, self.model, self.tokenizer.vocab, **facts, **more)

    def save_last(self, step, at_once):
        """Write last.pt, from which --resume goes on, `at_once` or if ten minutes have passed."""
        is_due = at_once or time.monotonic() > self.saved_time + 600
        if RANK == 0 and is_due and step > self.start:
            states = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            self.save(self.last, step, **states)
            self.saved_time = time.monotonic()

    def save_best(self, row):
        """Write best.pt if this validation, a row of the log, is the best so far. Without
        validation pairs the last model is the best."""
        mean_r1 = row.get("mean_r1", 0.0)
        if mean_r1 >= self.best_r1:
            self.best_r1 = mean_r1
            if row["step"] > 0:  # the weights before training only set the score to beat
                self.save(self.best, row["step"])


def read_log(path):
    """Return the last header in a log.jsonl, and a list of the other rows."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        headers = [row["header"] for row in rows if "header" in row]
        return headers[-1], [row for row in rows if "header" not in row]
    except (ValueError, LookupError, TypeError) as error:
        # Do not print the repr of the error, which may hold the whole file.
        raise InputError(f"{path} is not a log of train.py: {error}") from error


def names_of(folders):
    """Return a dict {folder: name} for folders of --zeroshot_data. The name is the last part of the
    path, or the whole path if two folders share that part."""
    last = [Path(folder).name for folder in folders]
    return {x: x if last.count(name) > 1 else name for x, name in zip(folders, last)}
