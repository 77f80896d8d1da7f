"""Mistakes of users, in one table for all commands. A mistake ends with exit code 2 and one line
that names the option or the file, without a trace, and nothing is written, nor written over."""

import errno
import os
import shlex
import sys

import numpy as np
import pytest
import torch
from material import COLOURS, make_model, png, run, write_checkpoint, write_shard

import eval as evaluation
import train
from cli import run_command
from data import words_to_tiktoken
from scripts import bench, convert, pack, report, scenes, search, show, vocab, words

MODULES = train, evaluation, bench, convert, pack, report, scenes, search, show, vocab, words
COMMANDS = {module.__name__.removeprefix("scripts."): module.main for module in MODULES}

# A command with its arguments, and what the message must name. Options are checked before any work
# is done: that the checkpoint is none.pt is not noticed then.
TABLE = """
train --train_data nowhere.tar                                    | nowhere.tar
train --train_data \x1b.tar                                        | x1b.tar
train --train_data pairs.tar --init_from damaged.pt               | damaged.pt
train --resume --out_dir nowhere                                  | nowhere/last.pt
train TRAIN --val_data pairs.tar                                  | pairs.tar
train TRAIN --batch_size 3                                        | --batch_size
train TRAIN --micro_batch_size 3                                  | --micro_batch_size
train TRAIN --steps 5 --epochs 1                                  | --epochs
train TRAIN --learning_rate nan                                   | --learning_rate
train TRAIN --captions caption                                    | caption
train TRAIN --vocab two.txt                                       | two.txt
train TRAIN --zeroshot_data flat                                  | flat
train TRAIN --init_from model.pt                                  | --model
train --train_data pairs.tar --init_from model.pt --loss sigmoid  | --loss
train --train_data pairs.tar --init_from model.pt --vocab two.txt | --vocab
train TRAIN --image_size 30                                       | image_size
train TRAIN --image_size 720000                                   | --micro_batch_size
train TRAIN --device toaster                                      | toaster
eval zeroshot MODEL --images nowhere                              | nowhere
eval zeroshot MODEL --images hollow                               | hollow
eval zeroshot MODEL --images broken                               | broken/red/x.png
eval zeroshot MODEL --images classes --classes two.txt            | two.txt
eval zeroshot MODEL --images classes --templates two.txt          | two.txt
eval zeroshot NONE --images classes                               | none.pt
eval zeroshot NONE --images classes --json folder.json            | folder.json
eval zeroshot --checkpoint other.pt --images classes              | other.pt
eval retrieval MODEL --data html.tar                              | html.tar
eval retrieval MODEL --data sides                                 | validation
eval probe MODEL --train classes --test broken                    | broken
eval probe MODEL --train one --test one                           | two training images
words MODEL --image broken/red/x.png                              | broken/red/x.png
words MODEL --image photo.png --window 4                          | --window
words MODEL --data pairs.tar                                      | pairs.tar
words MODEL --data pairs.tar --out x.png                          | --image
words --checkpoint clip.pt --image photo.png                      | clip.pt
words NONE --image photo.png --window 0                           | --window
words NONE --image photo.png --out photo.png                      | photo.png
search MODEL --images classes                                     | --like
search MODEL "a text"                                             | --images
search MODEL --images hollow "a text"                             | hollow
search MODEL --images classes photo.png                           | repeat --images
search NONE --images classes "a text" --out link.png              | link.png
search NONE --images classes "a text" --features x.npy            | --features
search MODEL --images classes "a text" --features cut.npz         | cut.npz
search MODEL --images classes "a text" --features clip.npz        | clip.npz
report MODEL --data pairs.tar --out x.html --log other.jsonl      | other.jsonl
report NONE --data pairs.tar --out nowhere/x.html                 | nowhere/x.html
convert model.pt nowhere/x.pt                                     | nowhere/x.pt
convert model.pt x.safetensors                                    | x.safetensors
convert model.pt x.pt --vocab clip                                | --vocab
convert model.pt link.pt --to open_clip                           | model.pt
pack --csv empty.csv --out x                                      | empty.csv
pack --csv list.csv --out x                                       | --image_column
pack --csv good.csv --out full                                    | full
vocab pairs.tar --out pairs.tar                                   | --out
vocab pairs.tar --size 514                                        | --size
vocab silent.tar --out x.tiktoken                                 | txt
scenes --out classes                                              | classes
"""
ROWS = [[cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines()]
SHORT = {
    "MODEL": "--checkpoint model.pt --device cpu",
    "NONE": "--checkpoint none.pt",
    "TRAIN": "--train_data pairs.tar --vocab red.tiktoken --model tiny --batch_size 2",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with all files that the table names."""
    world = tmp_path_factory.mktemp("world")
    picture = png(COLOURS["red"], np.random.default_rng(0))
    files = {
        "photo.png": picture,
        "one/red/0.png": picture,
        "broken/red/x.png": b"no image",
        "two.txt": b"one\ntwo\nthree\n",
        "other.jsonl": b'[1]\n{"a": 1}\n',
        "html.tar": b"<html>" * 500,
        "empty.csv": b"",
        "list.csv": b"a,c\n1,2\n",
        "good.csv": b"image,caption\nphoto.png,a\n",
        "red.tiktoken": words_to_tiktoken(["red", "thing"]).encode(),
    }
    for name in ("red", "green"):
        for i in range(3):
            files[f"classes/{name}/{i}.png"] = picture
    for name, content in files.items():
        (world / name).parent.mkdir(parents=True, exist_ok=True)
        (world / name).write_bytes(content)
    for name in ("flat", "hollow/empty", "folder.json", "full", "sides"):
        (world / name).mkdir(parents=True)
    write_shards(world, picture)
    write_models(world)
    return world


def write_shards(world, picture):
    pair = {"png": picture, "txt": b"a red thing", "json": b"{}"}
    for name in ("pairs.tar", "full/mine.tar", "sides/train-0.tar", "sides/val-0.tar"):
        write_shard(world / name, [pair, pair])
    write_shard(world / "silent.tar", [{"png": picture}])


def write_models(world):
    """Checkpoints, files of features, and links."""
    model = write_checkpoint(world / "model.pt", make_model())
    (world / "damaged.pt").write_bytes(model.read_bytes()[:9999])
    torch.save({"epoch": 1}, world / "other.pt")
    write_checkpoint(world / "clip.pt", make_model(cls_weight=0))
    clip = ["--checkpoint", world / "clip.pt", "--features", world / "clip.npz"]
    assert not run(search.main, *clip, "--images", world / "classes", "a red thing")
    (world / "cut.npz").write_bytes((world / "clip.npz").read_bytes()[:-100])
    (world / "link.pt").symlink_to(model)
    (world / "link.png").symlink_to("classes/red/0.png")


def times_of(folder):
    """Every file below a folder, and when it was changed. The lock of a run's folder is left out,
    because train.py takes it before it reads anything there."""
    paths = {*folder.rglob("*")} - {folder / "out", folder / "out" / ".lock"}
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.parametrize("command, named", ROWS, ids=[command for command, _ in ROWS])
def test_a_mistake_is_one_line_and_changes_nothing(command, named, world, capsys, monkeypatch):
    """argparse shows how to use the command, too."""
    monkeypatch.chdir(world)
    before = times_of(world)
    for short, options in SHORT.items():
        command = command.replace(short, options)
    name, *argv = shlex.split(command)
    capsys.readouterr()

    code = run(COMMANDS[name], *argv)

    *others, last = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert "error: " in last and named in last
    assert others == [] or others[0].startswith("usage: ")
    assert not any(line.startswith("Traceback") for line in others)
    assert times_of(world) == before


# ---- what is no mistake of the user's


def raises(error):
    """A command that ends with this error."""

    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "error", [ValueError("ours"), OSError(errno.EINVAL, "ours"), KeyError("ours")], ids=repr
)
def test_a_mistake_of_ours_keeps_its_trace(error):
    with pytest.raises(type(error)):
        run_command(raises(error))


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "EMFILE"])
def test_trouble_of_the_system_is_one_line(name, capsys):
    number = getattr(errno, name)

    assert run(raises(OSError(number, os.strerror(number)))) == 2

    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_is_one_line(capsys):
    assert run(raises(KeyboardInterrupt())) == 130

    assert capsys.readouterr().err.count("\n") == 1


def test_a_text_that_no_terminal_can_show_is_no_error():
    assert not run(lambda _: print("\ud800"))


def test_a_reader_that_has_read_enough_is_no_error(capsys, monkeypatch):
    """As `| head`."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)

    run_command(raises(BrokenPipeError()))

    assert capsys.readouterr().err == ""
