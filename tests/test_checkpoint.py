"""A file becomes a model: what does not fit is refused, and what fits is loaded."""

import math
import os
import pickle
from dataclasses import asdict

import pytest
import torch
from material import TOKENIZER, make_model
from PIL import Image

import eval as evaluation
from cli import InputError
from data import words_to_tiktoken


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write_changed(path, **changes):
    """Write a checkpoint of a small model, of which each change gives another value to a part
    (config, vocab), or, as a function, makes other weights of the model's."""
    model = make_model()
    content = {
        "model": model.state_dict(),
        "config": asdict(model.config),
        "vocab": TOKENIZER.vocab,
    }
    for part, change in changes.items():
        content[part] = change(content[part]) if callable(change) else change
    torch.save(content, path)
    return path


def with_tensor(name, change):
    """A function that changes one tensor of weights."""
    return lambda weights: {**weights, name: change(weights.get(name))}


def without_tensor(name):
    return lambda weights: {k: v for k, v in weights.items() if k != name}


def with_field(name, value):
    return lambda config: {**config, name: value}


def all_in_one_memory(weights):
    """Weights of the same shapes, all of which lie in the memory of the largest."""
    memory = torch.zeros(max(x.numel() for x in weights.values()))
    return {k: memory[: v.numel()].view(v.shape) for k, v in weights.items()}


# What is wrong, what the message must name, and the change of a checkpoint
UNFIT = {
    "whole numbers": ("visual.proj", {"model": with_tensor("visual.proj", torch.Tensor.char)}),
    "complex": ("visual.proj", {"model": with_tensor("visual.proj", torch.Tensor.cfloat)}),
    "complex counts": ("token_counts", {"model": with_tensor("token_counts", lambda x: x + 0j)}),
    "shape": ("visual.proj", {"model": with_tensor("visual.proj", lambda x: x[1:])}),
    "NaN": ("visual.proj", {"model": with_tensor("visual.proj", lambda x: x * math.nan)}),
    "no tensor": ("version", {"model": with_tensor("visual.proj", lambda x: 1)}),
    "sparse": ("parse", {"model": with_tensor("visual.proj", torch.Tensor.to_sparse)}),
    "floating counts": ("token_counts", {"model": with_tensor("token_counts", torch.Tensor.float)}),
    "negative counts": ("token_counts", {"model": with_tensor("token_counts", lambda x: x - 1)}),
    "more counts": ("token_counts", {"model": with_tensor("token_counts", lambda x: x + 1)}),
    "unknown tensor": ("extra", {"model": with_tensor("extra", lambda _: torch.zeros(1))}),
    "missing weights": ("visual.proj", {"model": without_tensor("visual.proj")}),
    "missing counter": ("num_captions", {"model": without_tensor("num_captions")}),
    "missing bias": ("head.linear.bias", {"model": without_tensor("head.linear.bias")}),
    "head of plain CLIP": ("head.", {"config": with_field("cls_weight", 0.0)}),
    "size 0": ("version", {"config": with_field("patch_size", 0)}),
    "heads": ("text_heads", {"config": with_field("text_heads", 7)}),
    "text": ("version", {"config": with_field("vision_width", "64")}),
    "unknown field": ("colour", {"config": with_field("colour", 3)}),
    "no configuration": ("version", {"config": None}),
    "no dict of weights": ("version", {"model": [1]}),
    "no text": ("version", {"vocab": 3}),
    "other vocabulary": ("--vocab", {"vocab": words_to_tiktoken(["red"])}),
    "rank twice": ("version", {"vocab": TOKENIZER.vocab.replace(" 300\n", " 301\n")}),
    "None for a vocabulary": ("version", {"vocab": None}),
    "no vocabulary": ("version", {"vocab": "no vocabulary"}),
    # A few bytes that would cost hours or gigabytes
    "layers": ("layers", {"config": with_field("vision_layers", 200_000)}),
    "one number repeated": (
        "memory",
        {"model": with_tensor("visual.proj", lambda x: torch.zeros(1).expand(64, 10**9))},
    ),
    "shared memory": ("memory", {"model": all_in_one_memory}),
}


@pytest.mark.parametrize("named, changes", UNFIT.values(), ids=UNFIT)
def test_a_checkpoint_whose_parts_do_not_fit_each_other_is_refused(tmp_path, named, changes):
    path = write_changed(tmp_path / "model.pt", **changes)

    with pytest.raises(InputError) as error:
        evaluation.read_checkpoint(path)

    message = str(error.value)
    assert str(path) in message and named in message and "\n" not in message


FIT = {
    "as it is": {},
    "16 bits": {"model": with_tensor("visual.proj", torch.Tensor.half)},
    "counts of 32 bits": {"model": with_tensor("token_counts", torch.Tensor.int)},
    "counts of every caption": {"model": with_tensor("num_captions", lambda x: x + 5)},
    "a transposed view": {"model": with_tensor("visual.proj", lambda x: x.T.contiguous().T)},
}


@pytest.mark.parametrize("changes", FIT.values(), ids=FIT)
def test_a_checkpoint_that_fits_is_loaded(tmp_path, changes):
    path = write_changed(tmp_path / "model.pt", **changes)

    model, tokenizer, preprocess = evaluation.load(path)

    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.token_counts.dtype == torch.int64
    image = preprocess(Image.new("RGB", (40, 30)))[None]
    assert model.encode_image(image).shape == model.encode_text(tokenizer(["red"])).shape


@pytest.mark.parametrize("by_torch", [True, False])
def test_a_file_that_runs_code_is_refused(tmp_path, by_torch):
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    if by_torch:
        write_changed(path, optimizer=Evil(mark))
    else:
        path.write_bytes(pickle.dumps(Evil(mark), protocol=2))

    with pytest.raises(InputError, match="refused"):
        evaluation.read_checkpoint(path)

    assert not mark.exists()
