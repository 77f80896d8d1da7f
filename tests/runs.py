"""Short runs of train.py: what they train on, their options, and what is to be equal."""

import json
from pathlib import Path

import numpy as np
import torch
from material import COLOURS, png, write_shard
from torch.utils._pytree import tree_flatten

import data

# What may differ between equal runs
TIMES = ("images_per_second", "data_wait", "memory_gb")


def sample(i):
    """A noisy square of one colour. Every seventh caption is long: 32 columns of tokens, not 16."""
    name = list(COLOURS)[i % 4]
    caption = f"a {name} square"
    if i % 7 == 0:
        caption += " and nothing else on it" * 4
    texts = {"captions": [caption, f"{name} thing"]}
    picture = png(COLOURS[name], np.random.default_rng(i))
    return {"png": picture, "txt": caption.encode(), "json": json.dumps(texts).encode()}


def write_vocabulary(folder):
    words = "a red green blue grey square thing and nothing else on it".split()
    (folder / "vocab.tiktoken").write_text(data.words_to_tiktoken(words))


def write_shards(folder):
    """Writes shards of both sides, a shard with bad samples, and their vocabulary."""
    write_shard(folder / "train-0.tar", map(sample, range(40)))
    write_shard(folder / "train-1.tar", map(sample, range(40, 70)))  # 70: no multiple of a batch
    write_shard(folder / "val-0.tar", map(sample, range(70, 90)))
    bad = [sample(i) for i in range(40)]
    del bad[3]["txt"]
    bad[11]["png"] = bad[11]["png"][:200]
    bad[20]["txt"] = b"   "
    bad[30]["txt"] = b"\xff\xfe\xfa"
    write_shard(folder / "bad-0.tar", bad)
    write_vocabulary(folder)


def short_run(shards, out, *more):
    """The options of twelve steps of 16 pairs, which are logged, saved and validated at steps that
    interleave. more: options that come last, and so win."""
    options = f"--train_data {shards}/train-*.tar --val_data {shards}/val-*.tar --out_dir {out}"
    options += " --batch_size 16 --steps 12 --learning_rate 1e-3 --workers 0"
    options += " --device cpu --dtype float32 --log_every 2 --save_every 3 --eval_every 4"
    if "--init_from" not in more:  # else the checkpoint sets the model
        options += " --model tiny"
    return [*options.split(), *map(str, more)]


def checkpoint_of(out, name="last.pt"):
    return torch.load(Path(out, name), weights_only=True)


def change_checkpoint(out, **changes):
    """Gives other values to some entries of last.pt."""
    torch.save({**checkpoint_of(out), **changes}, Path(out, "last.pt"))


def change_arguments(out, **changes):
    """Gives other values to some of the options that last.pt has saved."""
    checkpoint = checkpoint_of(out)
    checkpoint["arguments"] |= changes
    torch.save(checkpoint, Path(out, "last.pt"))


def all_rows(out):
    """All that a run has logged, in order. A run that was killed may have left half a line."""
    log = Path(out, "log.jsonl")
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def header_of(out):
    return all_rows(out)[0]["header"]


def rows_by_step(out, kind):
    """step -> row of this kind ("loss" or "validation"), without times. A resumed run may log a
    step twice: the later row counts."""
    rows = {}
    for row in all_rows(out):
        if kind in row:
            rows[row["step"]] = {name: x for name, x in row.items() if name not in TIMES}
    return rows


def losses_of(out):
    """The rows of training, in the order of their steps."""
    rows = rows_by_step(out, "loss")
    return [rows[step] for step in sorted(rows)]


def validations_of(out):
    """The rows of validations as they stand in the log. One that is made twice is there twice."""
    return [row for row in all_rows(out) if "zeroshot" in row]


def steps_of(rows):
    return [row["step"] for row in rows]


def assert_same_checkpoint(one, other):
    """Equal to the bit, all the way down, but for the options."""
    leaves, structure = tree_flatten({**one, "arguments": None})
    other_leaves, other_structure = tree_flatten({**other, "arguments": None})
    assert structure == other_structure
    for leaf, other_leaf in zip(leaves, other_leaves):
        if isinstance(leaf, torch.Tensor):
            assert torch.equal(leaf, other_leaf)
        else:
            assert leaf == other_leaf


def assert_ends_like(out, whole_run):
    """A run ends with the bits of another one, and its log has the same rows."""
    for name in ("last.pt", "best.pt"):
        assert_same_checkpoint(checkpoint_of(out, name), checkpoint_of(whole_run, name))
    for kind in ("loss", "validation"):
        assert rows_by_step(out, kind) == rows_by_step(whole_run, kind)


def write_old_log(out):
    """Writes the log of an older run, whose header is a text here."""
    Path(out, "log.jsonl").write_text('{"header": "of an older run", "step": 0}\n')
