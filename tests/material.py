"""What several test files are made of: a small model, small pictures, small shards."""

import io
import json
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import words_to_tiktoken
from superclip import SuperCLIP, SuperCLIPConfig, cli

TINY = dict(image_size=16, patch_size=4, vision_width=64, vision_layers=1, text_width=64)
TINY |= dict(text_layers=1, embed_dim=16)  # one head a tower; 16 patches
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "grey": (120,) * 3}


def png(colour, rng):
    """A noisy square of one colour, as the bytes of a PNG file."""
    noise = rng.integers(-30, 30, (20, 20, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, samples):
    """samples: a list of {extension: bytes}."""
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


# ---- for tests that evaluate a checkpoint

WORDS = "a photo picture of the red green blue grey square ring thing".split()
TOKENIZER = data.Tokenizer(words_to_tiktoken(WORDS))


def make_model(**changes):
    """A model with random weights, ready for inference."""
    torch.manual_seed(0)
    config = {**TINY, "vocab_size": TOKENIZER.vocab_size, **changes}
    return SuperCLIP(SuperCLIPConfig(**config)).eval()


def write_checkpoint(path, model):
    content = {"model": model.state_dict(), "config": asdict(model.config)}
    torch.save({**content, "vocab": TOKENIZER.vocab}, path)
    return path


def run(main, *argv):
    """Run a command as a user does. Returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli(lambda _: main([str(a) for a in argv]))
    return ended.value.code


def error_of(capsys, main, *argv):
    """The sentence with which a command ends if the user has made a mistake."""
    capsys.readouterr()
    assert run(main, *argv) == 2, argv
    errors = capsys.readouterr().err.strip().splitlines()
    assert not any(line.startswith("Traceback") for line in errors)
    return errors[-1]


def result_of(capsys, main, path, *argv):
    """What a command writes with --json, and what it prints."""
    capsys.readouterr()
    assert not run(main, *argv, "--json", path)
    return json.loads(path.read_text()), capsys.readouterr().out
