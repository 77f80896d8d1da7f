"""What a run leaves behind: checkpoints, and the folder with log.jsonl, last.pt and best.pt.

A checkpoint is a dict: "model" holds tensors by name, "config" a dict, and "vocab" a text. So a
command needs no other file to build the model. train.py shows what else last.pt and best.pt hold.
"""

import hashlib
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
    """Return the model and the tokenizer of a checkpoint, and the options of its run, or {}."""
    content = read_checkpoint(path)
    model, tokenizer = restore(path, content["model"], content["config"], content["vocab"])
    return model, tokenizer, content.get("header", {}).get("arguments", {})


def read_options(path):
    """Return the options of the run that wrote a checkpoint, or {} if it was converted."""
    return read_checkpoint(path).get("header", {}).get("arguments", {})


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


def claim_folder(out_dir, resume):
    """Let process 0 choose and make the folder of the run, and return its path in each process."""
    folder = None
    if processes.RANK == 0:
        folder = next_folder() if out_dir is None else folder_of(Path(out_dir), resume)
    return processes.from_all(str(folder))[0]


def next_folder():
    """Make the first of the folders out, out_2, out_3 ... that is free, and return its path."""
    for number in count(1):
        folder = Path("out" if number == 1 else f"out_{number}")
        # mkdir checks and creates in one step, so two runs that start at once get two folders.
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def folder_of(folder, resume):
    """Make the folder --out_dir, and return it. Refuse one with a run that does not go on."""
    has_weights = any(folder.glob("*.pt"))
    if resume:
        # Without weights --resume starts a run. So a scheduler can always give it.
        is_free = (folder / "last.pt").exists() or not has_weights
    else:
        is_free = not has_weights and not (folder / "log.jsonl").exists()
    check(is_free, f"{folder} holds a run. Name another --out_dir, or --resume from its last.pt.")
    folder.mkdir(parents=True, exist_ok=True)
    for temporary in folder.glob(".*.tmp"):  # a run was killed while it saved
        temporary.unlink()
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


def make_header(args, device, model, pairs, val_samples):
    """Return the header of the log: the conditions under which the other rows are measured."""
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
        "vocab_fingerprint": hashlib.sha1(pairs.tokenizer.vocab.encode()).hexdigest()[:12],
        "command": sys.argv,
        "arguments": arguments,
        "config": vars(model.config),
    }


def read_last(out, header, may_change, parser):
    """Return what the last.pt of a run holds. Print each option that now differs, and raise
    InputError if may_change does not name it. header: that of this run; parser: for defaults."""
    last = read_checkpoint(out / "last.pt")
    check("optimizer" in last, f"{out}/last.pt is not the last.pt of a run")
    before = last["header"]
    version = f"{out}/last.pt is from another version of this code, commit {before['commit']}"
    check(before.keys() >= header.keys(), version)
    # Files may have moved, so compare what they hold, here and at the end.
    same_vocab = before["vocab_fingerprint"] == header["vocab_fingerprint"]
    check(same_vocab, "--resume cannot change the vocabulary (--vocab)")
    # An option that is a field of the config has its value there, also if it was left open. An
    # option that a fork has added since then had its default.
    defaults = vars(parser.parse_args([])) | vars(SuperCLIPConfig())
    old = defaults | before["arguments"] | before["config"]
    new = header["arguments"] | header["config"]
    for name, value in new.items():
        if value != old[name] and name != "resume":
            refusal = f"--resume cannot change --{name} from {old[name]} to {value}"
            check(name in may_change, f"{refusal}. Repeat the whole command of the run.")
            print(f"--{name}: {old[name]} -> {value}")
    same_data = before["data_fingerprint"] == header["data_fingerprint"]
    check(same_data, "--resume cannot change the data (--train_data, --val_data)")
    is_longer = last["step"] <= header["steps"]
    check(is_longer, f"--resume cannot make --steps less than {last['step']}, which are done")
    # best.pt may be from a validation after the save of last.pt. Process 0 alone compares scores.
    if processes.RANK == 0 and (out / "best.pt").exists():
        last["best_r1"] = max(last["best_r1"], read_checkpoint(out / "best.pt")["best_r1"])
    return last


def validation_was_due(last):
    """Return whether last.pt was saved before a validation, by the options of its own run."""
    options = last["header"]["arguments"]
    return last["step"] % options["eval_every"] == 0 or last["step"] == options["steps"]


def load_states(last, model, optimizer, scaler):
    """Give a model, its optimizer and its scaler the states that last.pt holds."""
    model.load_state_dict(last["model"])
    groups_of_today = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(last["optimizer"])
    except ValueError as error:  # the groups have other sizes
        raise InputError("--resume needs --init_from as the run had it") from error
    for group, of_today in zip(optimizer.param_groups, groups_of_today):
        for name in of_today.keys() - group.keys():
            group[name] = of_today[name]  # a fork has added it since then
        group["peak_lr"] = of_today["peak_lr"]  # --learning_rate may change
    if last["scaler"]:  # its state is empty without float16
        scaler.load_state_dict(last["scaler"])


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
