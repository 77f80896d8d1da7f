"""What a run leaves behind: checkpoints, and the folder with log.jsonl, last.pt and best.pt.

A checkpoint is a dict: "model" holds tensors by name, "config" a dict, and "vocab" a text. So a
command needs no other file to build the model. train.py shows what last.pt and best.pt hold beside
these.

Each line of the log is a row in JSON: a header at each start of the run, the losses of a step, or a
validation.
"""

import json
import math
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

from common import processes
from common.cli import InputError, check, write_file
from common.tokenizer import Tokenizer
from superclip import SuperCLIP, SuperCLIPConfig

# -----------------------------------------------------------------------------
# Checkpoints

# Weights often come from strangers, so weights_only refuses pickles that would run code.
read_pickle = partial(torch.load, map_location="cpu", weights_only=True)


def read_file(path, read=read_pickle):
    """Return what a file of weights holds. read: the function that reads it."""
    check(Path(path).is_file(), f"there is no file {path}")
    try:
        return read(path)
    except Exception as error:  # torch and safetensors raise many kinds
        reason = "is damaged, or holds code, which is refused. Convert its state_dict instead."
        raise InputError(f"{path} {reason}") from error


def read_checkpoint(path):
    """Return the dict in a file of train.py or scripts/convert.py."""
    content = read_file(path)
    is_ours = isinstance(content, dict) and {"model", "config", "vocab"} <= content.keys()
    check(is_ours, f"{path} is not a checkpoint of this project. See scripts.convert.")
    return content


def restore(path, weights, config, vocab):
    """Return the model and the tokenizer of a checkpoint, built from its parts. path: its file, for
    messages."""
    try:
        model = SuperCLIP(SuperCLIPConfig(**config))
        model.load_state_dict(weights)
        tokenizer = Tokenizer(vocab, model.config.context_length)
    except Exception as error:  # such as an unknown field or a missing tensor
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} holds no model of this version: {reason}") from error
    V, n = model.config.vocab_size, tokenizer.vocab_size
    sizes = f"{path} holds a model for {V:,} tokens, but a vocabulary of {n:,}"
    check(V == n, f"{sizes}. Put its vocabulary beside the weights, as model.tiktoken.")
    return model, tokenizer


def read_model(path):
    """Return the model and the tokenizer of a checkpoint."""
    content = read_checkpoint(path)
    return restore(path, content["model"], content["config"], content["vocab"])


def validation_of(checkpoint, shards=None, option="--data"):
    """Return shards with validation pairs, and the sources of their captions. The sources are those
    of the run that wrote the checkpoint, and so are the shards if none are given. option: the
    option of the command that names other pictures, for the message."""
    header = read_checkpoint(checkpoint).get("header", {})
    arguments = header.get("arguments", {})
    shards = shards or arguments.get("val_data")
    if shards in (None, ["none"]):
        raise InputError(f"{checkpoint} names no validation shards. Name pictures with {option}.")
    captions = arguments.get("val_captions") or arguments.get("captions") or ["txt"]
    return shards, captions


DIVERGED = "try a lower --learning_rate or another --dtype"


def write_checkpoint(path, checkpoint):
    """Write a checkpoint, a dict with at least model, config and vocab. Refuse weights that are not
    finite, so that they never replace good ones."""
    # Tensors of a CPU load on every machine.
    weights = {name: x.cpu() for name, x in checkpoint["model"].items()}
    is_finite = all(x.isfinite().all() for x in weights.values())
    check(is_finite, f"weights are NaN or infinite, so {path} is not written: {DIVERGED}")
    content = {**checkpoint, "model": weights}
    write_file(path, lambda file: torch.save(content, file))


# -----------------------------------------------------------------------------
# The folder of a run


def new_out():
    """Make the first of the folders out, out_2, out_3 ... that is free, and return its name."""
    for number in count(1):
        name = "out" if number == 1 else f"out_{number}"
        # mkdir checks and creates in one step, so two runs that start at once get two folders.
        with suppress(FileExistsError):
            Path(name).mkdir()
            return name


def claim_folder(out_dir, resume):
    """Make --out_dir, or a new folder if that is None, and return its name. Refuse a folder that
    holds a run, unless it is to be resumed."""
    if out_dir is None:
        return new_out()
    folder = Path(out_dir)
    has_weights = any(folder.glob("*.pt"))
    if resume:
        # Without weights --resume starts a run. So a scheduler can always give it.
        can_resume = Path(folder, "last.pt").exists() or not has_weights
        check(can_resume, f"{folder} holds weights, but no last.pt. Name another --out_dir.")
    else:
        has_run = has_weights or Path(folder, "log.jsonl").exists()
        check(not has_run, f"{folder} holds a run. Add --resume, or name another --out_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    for temporary in folder.glob(".*.tmp"):  # a run was killed while it saved
        temporary.unlink()
    return str(folder)


def print_commands(out, model, val_samples):
    """Print the commands that show what the model of a run has learned. out: the folder;
    val_samples: data.Samples, or None if the run had no validation pairs."""
    checkpoint = out / "best.pt"
    if not checkpoint.exists():
        checkpoint = out / "last.pt"
        print("There is no best.pt: no validation was as good as the first. Lower --learning_rate.")
    options = f"--checkpoint {checkpoint.as_posix()}"
    if val_samples is None:
        options += " --images PICTURES"
    print("\nWhat the model has learned:")
    print(f'  python -m scripts.search {options} "TEXT"')
    if model.head is not None:
        print(f"  python -m scripts.words {options} --out words.png")
    print(f"  python -m scripts.curves {(out / 'log.jsonl').as_posix()} --out curves.png")


def commit():
    """Return the git commit of this code, or "" outside a git repository."""
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # git is not installed
        return ""


def header_of(args, steps, eval_every, model, pairs, val_samples, dtype, device):
    """Return the header of the log: the conditions under which the other rows were measured."""
    device_name = f"{device.type} ({processes.cores()} cores)"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    fingerprint = pairs.samples.fingerprint
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
        "processes": processes.WORLD,
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


# The options that --resume cannot change, besides those that the model or the data show
FIXED = (
    "batch_size", "seed", "label_captions", "crop_area", "patch_dropout", "weight_decay",
    "init_from",  # it decides which parameters are new
)  # fmt: skip


def check_same_run(saved, header, vocab):
    """Raise InputError if a run was trained otherwise than the options say. saved: the content of
    its last.pt; header, vocab: those of this run. Files may have moved, so the content of the data
    is compared."""
    before = saved["header"]
    changed = [
        f"--{name}" for name in FIXED if before["arguments"][name] != header["arguments"][name]
    ]
    if before["config"] != header["config"]:
        changed.append("the model (--model, --image_size, --loss, --cls_weight)")
    if before["data_fingerprint"] != header["data_fingerprint"]:
        changed.append("the data (--train_data, --val_data, --captions)")
    if saved["vocab"] != vocab:
        changed.append("--vocab")
    if saved["step"] > header["steps"]:
        changed.append(f"--steps to less than {saved['step']}, which are done")
    check(not changed, f"--resume cannot change {', '.join(changed)}")


# -----------------------------------------------------------------------------
# The log


def cut_log(out, step, eval_due):
    """Drop the rows of a log, if there is one, that a resumed run logs again. Keep the rows before
    `step`, the step of last.pt. Of `step` itself keep the losses, and the validation unless it is
    due again. out: the folder."""
    path = out / "log.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        with suppress(ValueError):  # a full disk has cut the last line
            row = json.loads(line)
            stays = "loss" in row or ("zeroshot" in row and not eval_due)
            if row["step"] < step or (row["step"] == step and stays):
                kept.append(line + "\n")
    write_file(path, lambda file: file.write("".join(kept).encode()))


def log_header(out, header, step):
    """Write and print the header of a run that begins at `step`, or goes on from there."""
    log(out, {"header": header, "step": step})
    print(f"out_dir: {out}, from step {step}")
    facts = {name: x for name, x in header.items() if not isinstance(x, (dict, list))}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))


def log(out, row):
    """Add a row to log.jsonl in the folder `out`. Print it, too, if it holds the losses of a step.
    Raise InputError if the loss is not finite. Only process 0 writes and prints."""
    if "loss" in row:
        check(math.isfinite(row["loss"]), f"the loss is not finite: {DIVERGED}")
    if processes.RANK > 0:
        return
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    if "loss" in row:
        terms = [f"{name} {value:.3f}" for name, value in row.items() if name.endswith("loss")]
        speed = f"{row['images_per_second']:.0f} images/s, {row['data_wait']:.0%} waiting"
        tqdm.write(f"step {row['step']:6d}: {', '.join(terms)}, {speed}")


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
