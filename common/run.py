"""What a run leaves behind: checkpoints, and the folder with log.jsonl, last.pt and best.pt.

A checkpoint is a dict: "model" holds tensors by name, "config" a dict, and "vocab" a text. last.pt
also holds the state of a run, and best.pt the header of its log (`save_last`, `keep_best`).
"""

import json
import math
import pickle
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
    """Read a file of weights by the function `read`."""
    check(Path(path).is_file(), f"there is no file {path}")
    try:
        return read(path)
    except pickle.UnpicklingError as error:
        advice = "If it holds more, save its state_dict alone."
        raise InputError(f"{path} is no file of tensors and plain values. {advice}") from error
    except Exception as error:  # torch and safetensors raise many kinds
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error


def one_line(error):
    """Return the kind of an error, and the beginning of its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:250]


def read_checkpoint(path):
    """Read a file of train.py or scripts/convert.py. It holds a dict."""
    content = read_file(path)
    is_ours = isinstance(content, dict) and {"model", "config", "vocab"} <= content.keys()
    check(is_ours, f"{path} is not a checkpoint of this project. See scripts.convert.")
    return content


def restore(path, content):
    """Return the model and the tokenizer of a checkpoint. content: what the file `path` holds."""
    try:
        model = SuperCLIP(SuperCLIPConfig(**content["config"]))
        model.load_state_dict(content["model"])
        tokenizer = Tokenizer(content["vocab"], model.config.context_length)
    except Exception as error:  # such as an unknown field or a missing tensor
        raise InputError(f"{path} holds no model of this version: {one_line(error)}") from error
    V, n = model.config.vocab_size, tokenizer.vocab_size
    check(V == n, f"{path} needs {V:,} tokens, and not {n:,}. Put model.tiktoken beside it.")
    return model, tokenizer


def read_model(path):
    """Return the model and the tokenizer of a checkpoint, and the options of its run, a dict, with
    the shards that it has validated on as val_shards. A converted checkpoint has no options."""
    content = read_checkpoint(path)
    model, tokenizer = restore(path, content)
    if "header" not in content:
        return model, tokenizer, {}
    header = content["header"]
    return model, tokenizer, {**header["options"], "val_shards": header["val_shards"]}


def load_pretrained(model, pretrained, path):
    """Give a new model the weights of the checkpoint `path`, as far as it has a place for them.
    Print what is not used, and return the names of the tensors that stay new."""
    weights = pretrained.state_dict()
    for name in ("token_counts", "num_captions"):  # a word that was rare there may not be so here
        weights.pop(name, None)
    new_names, unused = model.load_state_dict(weights, strict=False)
    if pretrained.head is None and model.head is not None:
        print(f"{path} has no word head. A new one has weight {model.config.cls_weight:g}.")
    if unused:
        modules = {name.rpartition(".")[0] for name in unused}
        print(f"the model has no place for {', '.join(sorted(modules))} of {path}")
    return new_names


def write_checkpoint(path, model, vocab, **more):
    """Write the checkpoint of a model, unless its weights are not finite. more: other entries."""
    # All commands use the weights under "model". Tensors of a CPU load on every machine.
    weights = {name: x.cpu() for name, x in model.state_dict().items()}
    is_finite = all(x.isfinite().all() for x in weights.values())
    check(is_finite, "weights are not finite. Try a lower --learning_rate or another --dtype.")
    content = {"model": weights, "config": vars(model.config), "vocab": vocab, **more}
    write_file(path, lambda file: torch.save(content, file))


def save_last(out, model, tokenizer, optimizer, scaler, header, step):
    """Write last.pt, from which --resume goes on. step: the number of steps that are done."""
    states = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    facts = {"header": header, "step": step}
    write_checkpoint(out / "last.pt", model, tokenizer.vocab, **facts, **states)


def keep_best(out, model, tokenizer, header, step):
    """Write best.pt if the validation after this step, which is in the log, is the best so far. The
    weights before training only set the score to reach."""
    _, rows = read_log(out / "log.jsonl")
    # The mean of R@1 over both directions. Without validation pairs the newest model is the best.
    scores = {row["step"]: row.get("mean_r1", 0.0) for row in rows if "zeroshot" in row}
    if step > 0 and scores[step] == max(scores.values()):
        write_checkpoint(out / "best.pt", model, tokenizer.vocab, header=header, step=step)
        tqdm.write(f"best.pt has the model after step {step}")


# -----------------------------------------------------------------------------
# The folder of a run


def check_is_new(folder):
    """Refuse a folder of --out_dir that holds a run."""
    found = [*Path(folder).glob("*.pt"), *Path(folder).glob("log.jsonl")]
    check(not found, f"{folder} holds a run. Name another --out_dir, or --resume {folder}.")


def make_folder(args):
    """Let process 0 make the folder of a run, by default a new one. Return it in each process."""
    folder = args.out_dir if args.resume is None else args.resume
    if processes.RANK == 0:
        folder = make_next_folder() if folder is None else Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("last.pt", "best.pt"):
            for temporary in folder.glob(f".{name}.*.tmp"):  # cli.write_file was killed
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
        print("There is no best.pt: step 0 scored highest. Train longer, or lower --learning_rate.")
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


def make_header(args, device, model, pairs, val_samples, new_names):
    """Return the header of the log: the conditions of its rows, and what --resume needs."""
    device_name = f"{device.type} ({processes.cores()} cores)"
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    val_shards = val_samples.paths if val_samples is not None else []
    fingerprints = [x.fingerprint for x in (pairs.samples, val_samples) if x is not None]
    return {
        "pairs": len(pairs.samples),
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
        "options": vars(args),
        "val_shards": val_shards,
        "new_names": new_names,
        "config": vars(model.config),
    }


# -----------------------------------------------------------------------------
# How a run begins or goes on


def check_processes(header, step):
    """Refuse processes of one run that would train apart."""
    everywhere = processes.from_all((header["data_fingerprint"], step))
    check(len({*everywhere}) == 1, "the processes see different data, or a different last.pt")


def read_last(folder):
    """Return what the last.pt of a run holds."""
    path = Path(folder, "last.pt")
    check(path.exists(), f"there is no {path} to --resume from. Use --out_dir to start a run.")
    last = read_checkpoint(path)
    check("optimizer" in last, f"{path} is not the last.pt of a run")
    return last


def check_goes_on(last, header):
    """Print what differs between a run and how it goes on, as `header` has it. Refuse other data,
    and an end that lies before the steps that are done."""
    same_data = last["header"]["data_fingerprint"] == header["data_fingerprint"]
    check(same_data, "--resume needs the data of the run (--train_data, --val_data)")
    is_later = last["step"] <= header["steps"]
    check(is_later, f"--steps: {last['step']} are done, so {header['steps']} are too few")
    before = {**last["header"]["options"], **last["header"]}
    now = {**header["options"], **header}
    for name in (*header["options"], "processes", "torch", "commit"):
        if name != "resume" and now[name] != before.get(name):
            print(f"{name}: {before.get(name)} -> {now[name]}")


# -----------------------------------------------------------------------------
# The log is only added to. Each line is a row in JSON: a header, which begins or resumes a run, the
# losses of a step, or a validation. Each has the number of steps that were done. A run that is
# resumed repeats the steps since last.pt was saved, and `read_log` knows which of its rows count.


def begin_log(out, header, step):
    """Add a header to the log, and print what it says."""
    path = out / "log.jsonl"
    if processes.RANK == 0 and path.exists() and not path.read_bytes().endswith(b"\n"):
        with open(path, "a") as file:
            file.write("\n")  # the last line was cut by a kill
    log(out, step, {"header": header})
    print(f"out_dir: {out}, from step {step}")
    facts = {name: x for name, x in header.items() if not isinstance(x, (dict, list))}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))


def log(out, step, row):
    """Add a row to log.jsonl in the folder `out`, with the step. Only process 0 writes."""
    row = {"step": step, **row}
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            row[name] = None  # as JSON has neither infinity nor NaN
    if processes.RANK == 0:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def line_of(step, row, losses):
    """Return the line that a run prints for a row of the log with these losses."""
    text = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
    text += f", {row['images_per_second']:.0f} images/s, {row['data_wait']:.0%} waiting"
    if row["bad_samples"] > 0:
        text += f", {row['bad_samples']:.2%} bad samples"
    return f"step {step:6d}: {text}"


def read_log(path):
    """Return the headers of a log, and a list of the other rows that count.

    A header takes back the rows of later steps, because the run goes on from the header's step. Of
    two rows with the same step and entries the later counts, because a validation is repeated."""
    headers = []
    rows = {}
    for line in Path(path).read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # an empty line, or one that a kill has cut
            continue
        if "header" in row:
            headers.append(row["header"])
            rows = {key: x for key, x in rows.items() if x["step"] <= row["step"]}
        else:
            rows[tuple(row), row["step"]] = row
    check(headers, f"{path} is not the log of a run")
    return headers, [*rows.values()]


def names_of(folders):
    """Return a dict {folder: name} for folders of --zeroshot_data. The name is the last part of the
    path, or the whole path if two folders share that part."""
    last = [Path(folder).name for folder in folders]
    return {x: x if last.count(name) > 1 else name for x, name in zip(folders, last)}
