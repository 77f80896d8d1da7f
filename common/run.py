"""What a run leaves behind: checkpoints, and the folder with log.jsonl, last.pt and best.pt.

A checkpoint is a dict: "model" holds tensors by name, "config" a dict, and "vocab" a text. So a
command needs no other file to build the model. train.py shows what else last.pt and best.pt hold.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch

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
        raise InputError(f"{path} is damaged, or holds code. Save its state_dict alone.") from error


def read_checkpoint(path):
    """Return the dict in a file of train.py or scripts/convert.py."""
    content = read_file(path)
    is_ours = isinstance(content, dict) and {"model", "config", "vocab"} <= content.keys()
    check(is_ours, f"{path} is not a checkpoint of this project. See scripts.convert.")
    return content


def restore(path, weights, config, vocab):
    """Build the model and the tokenizer of a checkpoint. path: its file, for messages."""
    try:
        model = SuperCLIP(SuperCLIPConfig(**config))
        model.load_state_dict(weights)
        tokenizer = Tokenizer(vocab, model.config.context_length)
    except Exception as error:  # such as an unknown field or a missing tensor
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} holds no model of this version: {reason}") from error
    V, n = model.config.vocab_size, tokenizer.vocab_size
    check(V == n, f"{path} needs {V:,} tokens, and not {n:,}. Put model.tiktoken beside it.")
    return model, tokenizer


def read_model(path):
    """Return the model and the tokenizer of a checkpoint, and the options of the run that wrote it,
    a dict. A converted checkpoint has none."""
    content = read_checkpoint(path)
    model, tokenizer = restore(path, content["model"], content["config"], content["vocab"])
    return model, tokenizer, content.get("header", {}).get("arguments", {})


def load_pretrained(model, pretrained, path):
    """Give a new model the weights of the checkpoint `path`, as far as it has a place for them.
    Print what is not used, and return the names of the tensors that stay new."""
    weights = pretrained.state_dict()
    # Count the words anew. One that was rare there may be in every caption here.
    weights.pop("token_counts", None)
    weights.pop("num_captions", None)
    new_names, unused = model.load_state_dict(weights, strict=False)
    if pretrained.head is None and model.head is not None:
        weight = model.config.cls_weight
        print(f"{path} has no word head. A new one has weight {weight:g}.")
    if unused:
        modules = {name.rpartition(".")[0] for name in unused}
        print(f"the model has no place for {', '.join(sorted(modules))} of {path}")
    return new_names


def write_checkpoint(path, model, vocab, **more):
    """Write the checkpoint of a model, unless its weights are not finite. more: other entries."""
    # All commands score and use the weights under "model". Tensors of a CPU load on every machine.
    # If the model is on a CPU, they are no copies, so they are written before the next step.
    weights = {name: x.cpu() for name, x in model.state_dict().items()}
    is_finite = all(x.isfinite().all() for x in weights.values())
    check(is_finite, "weights are not finite. Try a lower --learning_rate or another --dtype.")
    content = {"model": weights, "config": vars(model.config), "vocab": vocab, **more}
    write_file(path, lambda file: torch.save(content, file))


# -----------------------------------------------------------------------------
# The folder of a run


def check_is_new(folder):
    """Refuse a folder of --out_dir that holds a run."""
    found = [*Path(folder).glob("*.pt"), *Path(folder).glob("log.jsonl")]
    check(not found, f"{folder} holds a run. Name another --out_dir, or --resume {folder}.")


def make_folder(folder):
    """Let process 0 make the folder of the run, and return its path in each process. folder: its
    path, or None for the first of out, out_2, out_3 ... that is free."""
    if processes.RANK == 0 and folder is None:
        folder = make_next_folder()
    elif processes.RANK == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in ("last.pt", "best.pt"):
            for temporary in Path(folder).glob(f".{name}.*.tmp"):  # of a run that was killed
                temporary.unlink()
    return Path(processes.from_all(str(folder))[0])


def make_next_folder(first="out"):
    for number in count(1):
        folder = Path(first if number == 1 else f"{first}_{number}")
        # mkdir checks and creates in one step, so two runs that start at once get two folders.
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def print_commands(out, model, val_samples):
    """Print the commands that show what a model has learned. val_samples: None without pairs."""
    checkpoint = out / "best.pt"
    if not checkpoint.exists():
        checkpoint = out / "last.pt"
        print("There is no best.pt: no score beat step 0. Train longer, or lower --learning_rate.")
    options = f"--checkpoint {checkpoint}"
    if val_samples is None:
        options += " --images PICTURES"
    print("\nWhat the model has learned:")
    print(f'  python -m scripts.search {options} "TEXT"')
    if model.head is not None:
        print(f"  python -m scripts.words {options} --out words.png")
    print(f"  python -m scripts.curves {out}/log.jsonl --out curves.png")


def commit():
    """Return the git commit of this code, or "" outside a git repository."""
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # git is not installed
        return ""


def make_header(args, options, device, model, pairs, val_samples, new_names):
    """Return the header of the log: the conditions under which the other rows are measured. A run
    goes on with its options, as they were given, and with its new_names."""
    device_name = f"{device.type} ({processes.cores()} cores)"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    fingerprints = [pairs.samples.fingerprint]
    # Other commands read these two, so replace None by what it stands for.
    arguments = {**vars(args), "val_data": ["none"]}
    arguments["val_captions"] = args.val_captions or args.captions
    if val_samples is not None:
        fingerprints.append(val_samples.fingerprint)
        arguments["val_data"] = val_samples.paths
    return {
        "pairs": len(pairs),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
        "processes": processes.WORLD,
        "device": device_name,
        "dtype": args.dtype,
        "torch": str(torch.__version__),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "data_fingerprint": "-".join(fingerprints),
        "command": sys.argv,
        "options": options,
        "arguments": arguments,  # the options, with the values of those that were left open
        "new_names": new_names,
        "config": vars(model.config),
    }


# -----------------------------------------------------------------------------
# --resume


def read_last(folder):
    """Return what the last.pt of a run holds, or None if nothing is saved yet. Then the run starts,
    so a scheduler can always give --resume."""
    path = Path(folder, "last.pt")
    if not path.exists():
        check(not any(Path(folder).glob("*.pt")), f"{folder} has no last.pt to --resume from")
        print(f"there is no {path} yet, so the run starts")
        return None
    last = read_checkpoint(path)
    header = last.get("header", {})
    is_ours = "optimizer" in last and "options" in header
    version = f"by this version of the code (its commit is {header.get('commit')})"
    check(is_ours, f"{path} is not the last.pt of a run {version}")
    best = Path(folder, "best.pt")
    if best.exists():  # it may be newer than last.pt
        last["best_r1"] = max(last["best_r1"], read_checkpoint(best).get("best_r1", 0.0))
    return last


def print_changes(last, options, typed):
    """Print how the options that the user has typed differ from those of the run. Raise InputError
    if they define another model."""
    config = vars(SuperCLIPConfig()) | last["config"]  # a fork may have added a field since then
    chosen = last["header"]["arguments"]  # with a value for what was left open
    for name, value in typed.items():
        old = config.get(name, options[name])
        if old is None:
            old = chosen.get(name)
        if name != "resume" and value != old:
            defines_model = name in config or name in ("model", "init_from", "vocab")
            change = f"--{name}: {old} -> {value}"
            check(not defines_model, f"--resume cannot change the model ({change})")
            print(change)


def check_data_and_steps(last, header):
    """Refuse to go on with other data, or to steps that are done. header: that of today."""
    same_data = last["header"]["data_fingerprint"] == header["data_fingerprint"]
    check(same_data, "--resume cannot change the data (--train_data, --val_data, --captions)")
    is_longer = last["step"] <= header["steps"]
    check(is_longer, f"--resume cannot make --steps less than {last['step']}, which are done")


def load_states(last, optimizer, scaler):
    """Give an optimizer and a scaler the states that last.pt holds."""
    groups_of_today = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(last["optimizer"])
    for group, today in zip(optimizer.param_groups, groups_of_today):
        # Options may have changed, and a fork may have added an entry since then.
        added = {name: x for name, x in today.items() if name not in group}
        group.update(added, peak_lr=today["peak_lr"], weight_decay=today["weight_decay"])
    if last["scaler"]:  # its state is empty without float16
        scaler.load_state_dict(last["scaler"])


def validation_was_due(last):
    """Return whether last.pt was saved before a validation, by the options of its own run."""
    options = last["header"]["arguments"]
    return last["step"] % options["eval_every"] == 0 or last["step"] == options["steps"]


# -----------------------------------------------------------------------------
# The log. Each line is a row in JSON: a header at each start of the run, the losses of a step, or a
# validation. A run only adds rows, and read_log says which of them count.


def begin_log(out, header, step):
    """Log and print the header of a run that begins at `step`, or goes on from there."""
    everywhere = processes.from_all((header["data_fingerprint"], step))
    check(len({*everywhere}) == 1, "the processes see different data, or a different last.pt")
    log(out, {"header": header, "step": step})
    print(f"out_dir: {out}, from step {step}")
    facts = {name: x for name, x in header.items() if not isinstance(x, (dict, list))}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))


def log(out, row):
    """Add a row to log.jsonl in the folder `out`. Only process 0 writes."""
    if processes.RANK > 0:
        return
    with open(out / "log.jsonl", "ab+") as file:
        if "header" in row and file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a kill or a full disk has cut the last row
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def line_of(row, losses):
    """Return a row of the log as the line that a run prints. losses: the loss and its terms."""
    text = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
    text += f", {row['images_per_second']:.0f} images/s, {row['data_wait']:.0%} waiting"
    if row["bad_samples"] > 0:
        text += f", {row['bad_samples']:.2%} bad samples"
    if row["bad_samples"] > 0.01:
        text += " (more than 1 %, so check the data)"
    return f"step {row['step']:6d}: {text}"


def read_log(path):
    """Return the last header in a log.jsonl, and a list of the other rows that count. A run that
    was resumed after step s repeats the rows after s, and a validation of s that was due. So a
    header with step s makes the rows after s forgotten, and a row replaces one of its kind."""
    header = None
    rows = {}  # (step, has losses) -> row
    for line in Path(path).read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, LookupError):  # the line is empty, or cut
            continue
        if "header" in row:
            header = row["header"]
            rows = {key: x for key, x in rows.items() if x["step"] <= step}
        else:
            rows[step, "loss" in row] = row
    return header, list(rows.values())
