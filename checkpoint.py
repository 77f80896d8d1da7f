"""A file becomes a model, a model a file, and a run that was interrupted goes on.

A checkpoint is a dict of weights, configuration and vocabulary, so it is all that a command needs
to know of a model. train.py keeps in last.pt what else it needs to go on.
"""

import os
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch

import data
from cli import InputError, check, write_file
from superclip import SuperCLIP, SuperCLIPConfig
from tokenizer import Tokenizer

# weights_only, because any other pickle can run code as it is loaded, and weights come from
# strangers.
read_pickle = partial(torch.load, map_location="cpu", weights_only=True)


def read_file(path, read=read_pickle):
    """Returns what a file of weights holds. Raises InputError."""
    check(Path(path).is_file(), f"there is no file {path}")
    try:
        return read(path)
    except Exception as error:  # torch and safetensors raise a dozen kinds
        reason = "is damaged, or is refused because it holds code: then save its state_dict"
        raise InputError(f"{path} {reason}") from error


def read_checkpoint(path):
    """Returns what a file of train.py or scripts/convert.py holds: a dict with model (tensors by
    name), config (a dict), vocab (a text) and whatever else train.py keeps there. Raises
    InputError."""
    content = read_file(path)
    is_ours = isinstance(content, dict) and {"model", "config", "vocab"} <= content.keys()
    check(is_ours, f"{path} is not a checkpoint of this project: see scripts.convert")
    return content


def restore(path, weights, config, vocab):
    """The parts of a checkpoint -> model, tokenizer. Raises InputError if they do not fit."""
    try:
        model = SuperCLIP(SuperCLIPConfig(**config))
        model.load_state_dict(weights)
        tokenizer = Tokenizer(vocab, model.config.context_length)
    except Exception as error:  # an unknown field, a tensor that is missing ...
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} holds no model of this version: {reason}") from error
    V, n = model.config.vocab_size, tokenizer.vocab_size
    sizes = f"{path} is for {V:,} tokens, and its vocabulary has {n:,}"
    check(V == n, f"{sizes}: scripts.convert takes another --vocab")
    return model, tokenizer


def load(checkpoint, device="cpu"):
    """Read a checkpoint for inference. Returns model, tokenizer and preprocess. Raises InputError.

    The model is in eval mode and its parameters need no gradient, so a loop over photographs keeps
    no graph: `model.encode_image(preprocess(pil_image)[None])`.
    """
    content = read_checkpoint(checkpoint)
    parts = (content["model"], content["config"], content["vocab"])
    model, tokenizer = restore(checkpoint, *parts)
    preprocess = partial(data.load_image, size=model.config.image_size)
    model.requires_grad_(False).to(device).eval()
    return model, tokenizer, preprocess


def validation_of(checkpoint, shards=None, option="--data"):
    """Returns the --val_data of the run that wrote a checkpoint, unless other shards are given, and
    the sources of the run's captions. option: of the command, to name others. Raises InputError if
    the run had none."""
    header = read_checkpoint(checkpoint).get("header", {})
    arguments = header.get("arguments", {})
    shards = shards or arguments.get("val_data")
    if shards in (None, ["none"]):
        raise InputError(f"{checkpoint} names no validation shards: name pictures with {option}")
    captions = arguments.get("val_captions") or arguments.get("captions") or ["txt"]
    return shards, captions


DIVERGED = "try a lower --learning_rate or another --dtype"


def write_checkpoint(path, model, vocab, **more):
    """Write what read_checkpoint reads. Raises InputError if weights are not finite, so that they
    never replace good ones."""
    state = {name: value.cpu() for name, value in model.state_dict().items()}  # loads anywhere
    is_finite = all(value.isfinite().all() for value in state.values())
    check(is_finite, f"weights are NaN or infinite, so {path} is not written: {DIVERGED}")
    content = {"model": state, "config": vars(model.config), "vocab": vocab, **more}
    write_file(path, lambda file: torch.save(content, file))


# -----------------------------------------------------------------------------
# A run goes on


def new_or_saved_last(resume):
    """Return the folder of a run that names none. It is a new one, the first of out, out_2, out_3
    ... that is free, or with `resume` the one of these whose last.pt was saved last."""
    saved = [*Path().glob("out/last.pt"), *Path().glob("out_[0-9]*/last.pt")]
    if resume and saved:
        return max(saved, key=os.path.getmtime).parent
    for number in count(1):
        folder = Path("out" if number == 1 else f"out_{number}")
        # mkdir looks and makes in one step, so of two runs that start at once each gets a folder.
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def claim_folder(out_dir, resume):
    """Return the folder of a run as a string, and make it if it is not there. out_dir: --out_dir,
    or None. Raises InputError if the folder holds a run that is not to be resumed."""
    if out_dir is None:
        return str(new_or_saved_last(resume))
    folder = Path(out_dir)
    # Without any checkpoint --resume starts a run, so that a scheduler can always give it.
    if any(folder.glob("*.pt")) and not (resume and Path(folder, "last.pt").exists()):
        raise InputError(f"{folder} holds a run: use --resume (with last.pt) or another --out_dir")
    folder.mkdir(parents=True, exist_ok=True)
    for temporary in folder.glob(".*.tmp"):  # of a run that was killed as it saved
        temporary.unlink()
    return out_dir


# What --resume may change: the folder, the length, rates, the machine, logging. Shards and their
# vocabulary may have moved, so what counts is the sizes in the shards, and the vocabulary's text.
MAY_CHANGE = {
    "out_dir", "resume", "steps", "epochs", "learning_rate", "micro_batch_size", "workers",
    "device", "dtype", "compile", "log_every", "eval_every",
    "train_data", "val_data", "zeroshot_data", "vocab",
}  # fmt: skip


def resume(out_dir, header, model, tokenizer, optimizer, scaler):
    """Takes up the run in a folder. Returns its step and its best mean R@1, or zeros if there is no
    last.pt. Raises InputError if it was another run than the one of this header."""
    path = Path(out_dir, "last.pt")
    if not path.exists():
        return 0, 0.0
    saved = read_checkpoint(path)
    check("optimizer" in saved, f"{path} is not the last.pt of a run")
    before, step = saved["header"], saved["step"]
    for name, value in header["arguments"].items():
        was = before["arguments"].get(name)
        fits = name in MAY_CHANGE or was == value
        check(fits, f"--resume: --{name} was {was} before, and is {value} now")
    same_data = before["data_fingerprint"] == header["data_fingerprint"]
    same_data = same_data and saved["vocab"] == tokenizer.vocab
    names = "--train_data, --val_data or --vocab"
    check(same_data, f"--resume: {names} is not what {path} was trained with")
    check(step <= header["steps"], f"--resume: step {step} is past --steps {header['steps']}")
    model.load_state_dict(saved["model"])
    # The groups are ours, and not the file's, so that a given --learning_rate counts. The moments
    # are numbered in their order.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
    if saved["scaler"]:  # it is empty without float16
        scaler.load_state_dict(saved["scaler"])
    # last.pt is saved before the validation of its step, and best.pt after it.
    best = Path(out_dir, "best.pt")
    newest = read_checkpoint(best) if best.exists() else saved
    return step, newest["best_r1"]
