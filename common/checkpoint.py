"""Turn a file into a model, and write a model to a file.

A checkpoint is a dict: "model" holds tensors by name, "config" a dict, and "vocab" a text. So a
command needs no other file to build the model. In last.pt train.py also keeps the optimizer and the
loss scaler, so that the run can go on.
"""

from functools import partial
from pathlib import Path

import torch

from common.cli import InputError, check
from common.machine import write_file
from common.tokenizer import Tokenizer
from superclip import SuperCLIP, SuperCLIPConfig

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


def write_checkpoint(path, model, vocab, **more):
    """Write a checkpoint. more: other entries of its dict. Refuse weights that are not finite, so
    that they never replace good ones."""
    # Tensors of a CPU load on every machine.
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    is_finite = all(value.isfinite().all() for value in state.values())
    check(is_finite, f"weights are NaN or infinite, so {path} is not written: {DIVERGED}")
    content = {"model": state, "config": vars(model.config), "vocab": vocab, **more}
    write_file(path, lambda file: torch.save(content, file))
