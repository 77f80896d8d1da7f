"""Mistakes of users, in one table for all commands. A mistake ends with exit code 2 and one line
that names the option or the file."""

import importlib
import multiprocessing
import shlex
import signal
import sys
from unittest.mock import Mock

import pytest
import torch
from material import cases, error_of, png, small_model, write_checkpoint, write_shard

from cli import InputError, run_command
from tokenizer import words_to_tiktoken

# A command with its arguments, and what the message must name. Options are checked before any work
# is done: that there is no none.pt is not noticed then.
TABLE = """
train --train_data nowhere.tar                                    | nowhere.tar
train --train_data html.tar --vocab red.tiktoken --model tiny     | html.tar
train --train_data sides/train-{0..99999999999}.tar               | train-1.tar
train --train_data sides/train-{2..1}.tar                         | 2..1
train TRAIN --val_data pairs.tar                                  | pairs.tar
train TRAIN --batch_size 3                                        | --batch_size
train TRAIN --micro_batch_size 3                                  | --micro_batch_size
train TRAIN --learning_rate nan                                   | --learning_rate
train TRAIN --captions json.caption                               | json.caption
train TRAIN --vocab two.txt                                       | two.txt
train TRAIN --device toaster                                      | toaster
train TRAIN --train_data bad.tar --device cpu --workers 1         | bad.tar
train --train_data pairs.tar --init_from model.pt --loss sigmoid  | --loss
train --train_data pairs.tar --init_from damaged.pt               | damaged.pt
eval zeroshot MODEL --images hollow                               | hollow
eval zeroshot MODEL --images classes --classes two.txt            | classes
eval zeroshot NONE --images classes --json nowhere/x.json         | nowhere/x.json
eval zeroshot --checkpoint other.pt --images classes              | other.pt
eval retrieval MODEL --data sides                                 | validation
eval probe MODEL --train classes --test ./classes                 | --test
scripts.words MODEL --image hollow                                | hollow
scripts.words --checkpoint clip.pt --image photo.png              | clip.pt
scripts.words MODEL                                               | --image
scripts.search MODEL "a text"                                     | --images
scripts.search NONE --images classes two.txt "a text"              | two.txt
scripts.curves empty.jsonl --out x.png                            | empty.jsonl
scripts.convert other.pt x.pt                                     | other.pt
scripts.convert list.pt x.pt                                      | list.pt
scripts.convert model.pt model.pt                                 | model.pt
scripts.pack --csv list.csv --out x                               | --image_column
scripts.pack --csv list.csv --image_column a --caption_column c --out classes | classes
scripts.vocab pairs.tar --captions json.caption --out x.tiktoken  | json.caption
scripts.vocab pairs.tar sides                                     | --out
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
    for name in ("hollow/empty", "sides", "classes/red", "classes/green"):
        (world / name).mkdir(parents=True)
    picture = png("red")
    pair = {"png": picture, "txt": b"a red thing", "json": b"{}"}
    for name in ("pairs.tar", "sides/train-0.tar", "sides/val-0.tar"):
        write_shard(world / name, [pair, pair])
    for name in ("photo.png", "classes/red/0.png", "classes/green/0.png"):
        (world / name).write_bytes(picture)
    write_shard(world / "bad.tar", 2 * [{**pair, "png": b"no image"}])
    (world / "html.tar").write_bytes(b"<html>" * 500)
    (world / "empty.jsonl").touch()
    (world / "two.txt").write_text("one\ntwo\nthree\n")
    (world / "list.csv").write_text("a,c\n1,2\n")
    (world / "red.tiktoken").write_text(words_to_tiktoken(["red", "thing"]))
    model = write_checkpoint(world / "model.pt", small_model())
    (world / "damaged.pt").write_bytes(model.read_bytes()[:9999])
    torch.save({"epoch": 1}, world / "other.pt")
    torch.save([torch.ones(2)], world / "list.pt")
    write_checkpoint(world / "clip.pt", small_model(cls_weight=0))
    return world


@pytest.mark.parametrize("command, named", ROWS, ids=[command for command, _ in ROWS])
def test_a_mistake_is_one_line_that_names_it(command, named, world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    for short, options in SHORT.items():
        command = command.replace(short, options)
    module, *argv = shlex.split(command)
    main = importlib.import_module(module).main

    assert named in error_of(capsys, main, *argv)


# ---- how a command ends


ENDS = {  # a command, its exit code, and what it says
    "well": (lambda argv: None, 0, ""),
    "a mistake": (Mock(side_effect=InputError("--steps")), 2, "error: --steps\n"),
    "a full disk": (Mock(side_effect=OSError(28, "No space")), 2, "No space\n"),
    "Ctrl-C": (lambda argv: signal.raise_signal(signal.SIGINT), 130, "signal\n"),
    "a mistake of ours": (Mock(side_effect=ValueError("ours")), 1, "Traceback"),
}


def exit_code_of(main):
    """Of a process that runs this command."""
    process = multiprocessing.get_context("fork").Process(target=run_command, args=(main,))
    process.start()
    process.join()
    return process.exitcode


@cases("main, code, said", ENDS)
def test_a_command_ends(main, code, said, capfd):
    assert exit_code_of(main) == code

    error = capfd.readouterr().err
    assert said in error
    assert ("Traceback" in error) == (code == 1)


def test_letters_that_a_pipe_lacks_are_escaped(monkeypatch, capfd):
    """As on Windows, where a pipe has cp1252."""
    monkeypatch.setattr(sys, "stdout", open(1, "w", encoding="cp1252", closefd=False))

    assert exit_code_of(lambda argv: print("犬")) == 0

    assert capfd.readouterr().out == "\\u72ac\n"
