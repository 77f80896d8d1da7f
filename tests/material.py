"""Make what several test files need: small pictures, shards and models, commands, short runs."""

import io
import json
import os
import sys
import tarfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import run as runs
from common.cli import run_command
from common.tokenizer import Tokenizer, words_to_tiktoken
from superclip import SuperCLIP, SuperCLIPConfig


def cases(names, table):
    """Make a test for each row of a table. table: a dict {name of the case: values of `names`}."""
    return pytest.mark.parametrize(names, table.values(), ids=table)


# ---- pictures

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "grey": (120,) * 3}


def encoded(image, format="JPEG", **options):
    """Return an image of Pillow as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(colour, seed=0):
    """Return a noisy square in one of the COLOURS, as the bytes of a PNG file."""
    noise = np.random.default_rng(seed).integers(-30, 30, (20, 20, 3))
    pixels = (COLOURS[colour] + noise).clip(0, 255).astype(np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def photo(seed=0, size=(40, 30), mode="RGB", detail=6):
    """Return a random picture that is smooth, so that JPEG and resizing change it little."""
    pixels = np.random.default_rng(seed).integers(0, 256, (detail, detail, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC).convert(mode)


# ---- shards


def write_tar(path, members):
    """Write a tar, and return its path. members: a dict {name: content as bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def write_shard(path, samples):
    """Write a shard, and return its path. samples: a list of dicts {extension: bytes}."""
    members = {}
    for i, sample in enumerate(samples):
        for extension, content in sample.items():
            members[f"{i:04d}.{extension}"] = content
    return write_tar(path, members)


def write_captions(path, *captions):
    """Write a shard with a pair for each caption, a noisy red square. Return its path."""
    pairs = [{"png": png("red", i), "txt": text.encode()} for i, text in enumerate(captions)]
    return write_shard(path, pairs)


# ---- models

WORDS = "a photo picture of the red green blue grey square ring thing".split()
TOKENIZER = Tokenizer(words_to_tiktoken(WORDS))
TINY = dict(
    image_size=16,
    patch_size=4,  # so there are 16 patches
    vision_width=64,  # so each tower has one head
    vision_layers=1,
    text_width=64,
    text_layers=1,
    embed_dim=16,
)


def small_model(**changes):
    """Return a model with random weights, ready for inference. changes: fields of SuperCLIPConfig
    with other values than in TINY."""
    torch.manual_seed(0)
    config = {**TINY, "vocab_size": TOKENIZER.vocab_size, **changes}
    return SuperCLIP(SuperCLIPConfig(**config)).eval()


class Evil:
    """Run a command when unpickled."""

    def __reduce__(self):
        return os.system, ("touch mark",)


def write_checkpoint(path, model, vocab=TOKENIZER.vocab, **facts):
    runs.write_checkpoint(path, model, vocab, **facts)
    return path


# ---- commands


def run(main, *argv):
    """Run a command as a user does, but in this process. Return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["a command", *map(str, argv)])
        try:
            run_command(main)
        except SystemExit as ended:
            # The traceback keeps a failed loader alive in a cycle of references. If the loader is
            # freed late, torch waits for the loading processes.
            if ended.__context__:
                traceback.clear_frames(ended.__context__.__traceback__)
            return ended.code
    return 0


def error_of(capsys, main, *argv):
    """Run a command with a user's mistake in it. Return the line that names the mistake."""
    capsys.readouterr()
    assert run(main, *argv) == 2, argv
    errors = capsys.readouterr().err.strip()
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


def result_of(capsys, main, path, *argv):
    """Run a command. Return what it writes to the file of --json, and what it prints."""
    capsys.readouterr()
    assert not run(main, *argv, "--json", path)
    return json.loads(path.read_text()), capsys.readouterr().out


# ---- short runs of train.py


def sample(i):
    """Return sample i: a noisy square of one colour, with captions. Every seventh caption is long,
    and makes a batch with 32 columns of tokens instead of 16."""
    name = list(COLOURS)[i % 4]
    caption = f"a {name} square"
    if i % 7 == 0:
        caption += " and nothing else on it" * 4
    texts = {"captions": [caption, f"{name} thing"]}
    return {"png": png(name, i), "txt": caption.encode(), "json": json.dumps(texts).encode()}


def write_shards(folder):
    """Write shards: two to train on, one to validate on, one with bad samples; and a vocabulary."""
    write_shard(folder / "train-0.tar", map(sample, range(40)))
    write_shard(folder / "train-1.tar", map(sample, range(40, 70)))  # 70 in all, no multiple of 16
    write_shard(folder / "val-0.tar", map(sample, range(70, 90)))
    bad = [sample(i) for i in range(40)]
    del bad[3]["txt"]
    bad[11]["png"] = b"no image"
    write_shard(folder / "bad-0.tar", bad)
    words = "a red green blue grey square thing and nothing else on it".split()
    (folder / "vocab.tiktoken").write_text(words_to_tiktoken(words))


def short_run(shards, out, *more):
    """Return the options of a run of twelve steps with 16 pairs each. Every second step is logged,
    and every fourth step is followed by a validation. more: options that come last, and
    replace the same options before them."""
    options = f"--train_data {shards}/train-*.tar --val_data {shards}/val-*.tar --out_dir {out}"
    options += " --batch_size 16 --steps 12 --learning_rate 1e-3 --workers 0"
    options += " --device cpu --dtype float32 --log_every 2 --eval_every 4 --weight_decay 0.1"
    if "--init_from" not in more:  # --init_from sets the model
        options += " --model tiny"
    return [*options.split(), *map(str, more)]


def checkpoint_of(out, name="last.pt"):
    return torch.load(Path(out, name), weights_only=True)


def rows_of(out, kind):
    """Return the rows of a log that count and have the entry `kind`, in the order of their steps:
    "loss" for steps, "zeroshot" for validations. Entries that may differ between equal runs are
    left out."""
    times = ("images_per_second", "data_wait", "bad_samples", "memory_gb")
    _, rows = runs.read_log(Path(out, "log.jsonl"))
    return [{k: x for k, x in row.items() if k not in times} for row in rows if kind in row]


def assert_ends_like(out, whole_run):
    """Assert that a run has ended with the bits of another run, and with the rows of its log."""
    for name in ("last.pt", "best.pt"):
        ours = checkpoint_of(out, name)
        theirs = checkpoint_of(whole_run, name)
        assert ours.keys() == theirs.keys()
        for part in ours.keys() - {"header"}:  # which has a date and folders
            if part in ("config", "vocab"):
                assert ours[part] == theirs[part]
            else:
                torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    for kind in ("loss", "zeroshot"):
        assert rows_of(out, kind) == rows_of(whole_run, kind)
