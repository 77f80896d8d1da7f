"""Turn a file into a model, write a model to a file, and go on with a run that was interrupted.

A checkpoint is a dict of weights, configuration and vocabulary, so a command needs no other file to
build the model. In last.pt train.py also keeps the optimizer and the loss scaler, so that the run
can go on.
"""

import os
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch

import data
from common.cli import InputError, check
from common.files import write_file
from common.tokenizer import Tokenizer
from superclip import SuperCLIP, SuperCLIPConfig

# weights_only refuses pickles that run code when they are loaded. Weights often come from
# strangers.
read_pickle = partial(torch.load, map_location="cpu", weights_only=True)


def read_file(path, read=read_pickle):
    """Return what a file of weights holds. read: the function that reads it. Raise InputError if
    the file is missing or cannot be read."""
    check(Path(path).is_file(), f"there is no file {path}")
    try:
        return read(path)
    except Exception as error:  # torch and safetensors raise many kinds
        reason = "is damaged, or holds code, which is refused. Convert its state_dict instead."
        raise InputError(f"{path} {reason}") from error


def read_checkpoint(path):
    """Return what a file of train.py or scripts/convert.py holds, as a dict. It has the entries
    model, a dict of tensors by name; config, a dict; and vocab, a text. train.py adds others. Raise
    InputError if the file is not such a checkpoint."""
    content = read_file(path)
    is_ours = isinstance(content, dict) and {"model", "config", "vocab"} <= content.keys()
    check(is_ours, f"{path} is not a checkpoint of this project. See scripts.convert.")
    return content


def restore(path, weights, config, vocab):
    """Return the model and the tokenizer of a checkpoint, built from its parts. path: its file, for
    messages. Raise InputError if the parts do not fit each other."""
    try:
        model = SuperCLIP(SuperCLIPConfig(**config))
        model.load_state_dict(weights)
        tokenizer = Tokenizer(vocab, model.config.context_length)
    except Exception as error:  # such as an unknown field or a missing tensor
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} holds no model of this version: {reason}") from error
    V, n = model.config.vocab_size, tokenizer.vocab_size
    sizes = f"{path} holds a model for {V:,} tokens, but a vocabulary of {n:,}"
    check(V == n, f"{sizes}. Give scripts.convert another --vocab.")
    return model, tokenizer


def load(checkpoint, device="cpu"):
    """Read a checkpoint for inference. Return model, tokenizer and preprocess. The last turns an
    image of Pillow, or the bytes of an image file, into pixels. Raise InputError if the file is not
    a checkpoint.

    The model is in eval mode, and its parameters need no gradient, so a loop over photographs keeps
    no graph. An example is `model.encode_image(preprocess(image)[None])`.
    """
    content = read_checkpoint(checkpoint)
    model, tokenizer = restore(checkpoint, content["model"], content["config"], content["vocab"])
    preprocess = partial(data.load_image, size=model.config.image_size)
    model.requires_grad_(False).to(device).eval()
    return model, tokenizer, preprocess


def validation_of(checkpoint, shards=None, option="--data"):
    """Return shards with validation pairs, and the sources of their captions. The shards are those
    given, or by default the --val_data of the run that wrote the checkpoint. The sources are those
    of that run. option: the option of the command that names other pictures, for the message. Raise
    InputError if no shards are given and the run had none."""
    header = read_checkpoint(checkpoint).get("header", {})
    arguments = header.get("arguments", {})
    shards = shards or arguments.get("val_data")
    if shards in (None, ["none"]):
        raise InputError(f"{checkpoint} names no validation shards. Name pictures with {option}.")
    captions = arguments.get("val_captions") or arguments.get("captions") or ["txt"]
    return shards, captions


DIVERGED = "try a lower --learning_rate or another --dtype"


def write_checkpoint(path, model, vocab, **more):
    """Write a checkpoint, which read_checkpoint reads. more: other entries of its dict. Raise
    InputError if weights are not finite, so that they never replace good ones."""
    # Tensors of a CPU load on every machine.
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    is_finite = all(value.isfinite().all() for value in state.values())
    check(is_finite, f"weights are NaN or infinite, so {path} is not written: {DIVERGED}")
    content = {"model": state, "config": vars(model.config), "vocab": vocab, **more}
    write_file(path, lambda file: torch.save(content, file))


# -----------------------------------------------------------------------------
# The folder of a run, and --resume


def make_or_find_folder(resume):
    """Make and return the first of the folders out, out_2, out_3 ... that is free, for a run
    without --out_dir. With `resume`, return the one of them whose last.pt was saved last, if there
    is any."""
    saved = [*Path().glob("out/last.pt"), *Path().glob("out_[0-9]*/last.pt")]
    if resume and saved:
        return max(saved, key=os.path.getmtime).parent
    for number in count(1):
        folder = Path("out" if number == 1 else f"out_{number}")
        # mkdir checks and creates in one step, so two runs that start at once get two folders.
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def claim_folder(out_dir, resume):
    """Return the folder of a run as a string, and make it if it does not exist. out_dir: --out_dir,
    or None. Raise InputError if the folder holds a run that is not to be resumed."""
    folder = make_or_find_folder(resume) if out_dir is None else Path(out_dir)
    # If the folder holds no checkpoint, --resume starts a run. So a scheduler can always give it.
    if any(folder.glob("*.pt")) and not (resume and Path(folder, "last.pt").exists()):
        raise InputError(f"{folder} holds a run. Use --resume (with last.pt) or another --out_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    for temporary in folder.glob(".*.tmp"):  # left by a run that was killed while it saved
        temporary.unlink()
    return str(folder)


# The options that may change with --resume: the folder, the length, the learning rate, the machine,
# logging. Shards and vocabulary are here because their files may have moved. `resume` compares the
# sizes in the shards and the text of the vocabulary instead.
MAY_CHANGE = {
    "out_dir", "resume", "steps", "epochs", "learning_rate", "micro_batch_size", "workers",
    "device", "dtype", "compile", "log_every", "eval_every",
    "train_data", "val_data", "zeroshot_data", "vocab",
}  # fmt: skip


def resume(out_dir, header, model, tokenizer, optimizer, scaler):
    """Load the state of the run in a folder into model, optimizer and scaler. Return the step from
    which it goes on, and its best mean R@1. Both are 0 if there is no last.pt. header: what
    header_of returns for the run that goes on. Raise InputError if last.pt is from another run."""
    path = Path(out_dir, "last.pt")
    if not path.exists():
        return 0, 0.0
    saved = read_checkpoint(path)
    check("optimizer" in saved, f"{path} is not the last.pt of a run")
    before, step = saved["header"], saved["step"]
    for name, value in header["arguments"].items():
        was = before["arguments"].get(name)
        fits = name in MAY_CHANGE or was == value
        check(fits, f"--{name} was {was} before, and is {value} now. --resume cannot change it.")
    same_data = before["data_fingerprint"] == header["data_fingerprint"]
    same_data = same_data and saved["vocab"] == tokenizer.vocab
    names = "--train_data, --val_data or --vocab"
    check(same_data, f"{names} is not what {path} was trained with. --resume cannot change it.")
    check(step <= header["steps"], f"step {step} of last.pt is past --steps {header['steps']}")
    model.load_state_dict(saved["model"])
    # Keep the groups of this optimizer, so that a new --learning_rate counts. The file numbers the
    # moments in the order of the parameters in these groups.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
    if saved["scaler"]:  # the state is empty without float16
        scaler.load_state_dict(saved["scaler"])
    # Read the best score from best.pt. The one in last.pt may be older, because last.pt is saved
    # before the validation of its step.
    best = Path(out_dir, "best.pt")
    newest = read_checkpoint(best) if best.exists() else saved
    return step, newest["best_r1"]
