"""A file becomes a model, and a model a file.

A checkpoint is a dict of weights, configuration and vocabulary, so it is all that a command needs
to know of a model. train.py keeps more in it, to go on from there.
"""

from functools import partial
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
        reason = "cannot be read, or is refused because it holds code: save its state_dict"
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
