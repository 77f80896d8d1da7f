"""Test mistakes of users, in one table for all commands, and --help. A command with a mistake ends
with exit code 2 and one line that names the option or the file."""

import errno
import importlib
import io
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from children import ROOT
from material import cases, error_of, png, run, small_model, write_checkpoint, write_shard

import superclip
from common.cli import check
from common.processes import make_loader
from common.tokenizer import words_to_tiktoken
from scripts import convert

# Each line holds a command with its arguments, and the text that the message must contain.
TABLE = """
train --train_data nowhere.tar                            | nowhere.tar
train --train_data pairs{2..1}.tar                        | {2..1}
train --train_data scenes                                 | scenes
train TRAIN --train_data html.tar                         | html.tar
train --resume a --out_dir b                              | --out_dir
train TRAIN --batch_size 3                                | --batch_size
train --batch_size 256 --micro_batch_size 60               | --micro_batch_size
train TRAIN --log_every 0                                 | --log_every
train TRAIN --learning_rate nan                           | --learning_rate
train TRAIN --image_size 21                               | patch_size
train TRAIN --steps 1 --epochs 1                          | --epochs
train --image_size 96 --init_from model.pt                | --image_size
train TRAIN --val_data pairs.tar                          | --val_data
train TRAIN --zeroshot_data nowhere                       | nowhere
train TRAIN --zeroshot_data numbers                       | n01440764
train TRAIN --steps 1 --warmup_steps 2                    | --warmup_steps
train TRAIN --train_data bad.tar --workers 1 --out_dir run | bad.tar
train --train_data pairs.tar --batch_size 2 --init_from damaged.pt | damaged.pt
eval zeroshot MODEL --images hollow                       | hollow
eval zeroshot MODEL --images classes --templates list.csv | --templates
eval zeroshot MODEL --images classes --classes empty.txt  | empty.txt
eval zeroshot MODEL --images classes --json new.jsonl     | new.jsonl
eval zeroshot MODEL --images cifar11                      | cifar11 is no folder
scripts.probe MODEL --train classes --test classes           | same folder
scripts.words --checkpoint clip.pt --images photo.png --out x.png | clip.pt
scripts.words MODEL --out x.png                           | --images
scripts.words MODEL --images photo.png --out photo.jpg    | photo.jpg
scripts.search MODEL "a text"                             | --images
scripts.search MODEL --images photo.png                   | TEXT
scripts.search MODEL --images photo.png list.csv          | list.csv
scripts.curves new.jsonl --out x.png                      | new.jsonl
scripts.curves list.csv --out x.png                       | list.csv
study.compare --a "list.csv" --b "nowhere.py"             | nowhere.py
study.compare --a "list.csv" --b "list.csv --seed 1"      | --seed
scripts.curves new.jsonl --out model.pt                   | model.pt
scripts.convert hollow x.pt                               | hollow
scripts.convert other x.pt                                | visual.conv1
scripts.convert ViT-B-32/none x.pt                        | ViT-B-32/none
scripts.convert nowhere/a.pt x.pt                         | no file nowhere/a.pt
scripts.pack --csv list.csv --images . --out x            | image and caption
scripts.show bad.tar --out x.png                          | can be drawn
scripts.show apart.tar --captions txt json.c --out x.png  | txt json.c
scripts.vocab apart.tar --captions txt json.c             | txt json.c
scripts.vocab pairs.tar --captions json.caption           | json.caption
study.compare --a train.py                                | --b
study.compare --a html.tar --b html.tar --seeds 5-5        | --seeds
study.compare --resume hollow                             | hollow
"""
ROWS = [[cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines()]
SHORT = {
    "MODEL": "--checkpoint model.pt --device cpu",
    "TRAIN": "--train_data pairs.tar --vocab red.tiktoken --model tiny --batch_size 2 --device cpu",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder with all files that TABLE names."""
    world = tmp_path_factory.mktemp("world")
    for name in ("hollow/empty", "other", "classes", "numbers/n01440764"):
        (world / name).mkdir(parents=True)
    (world / "numbers" / "n01440764" / "0.png").write_bytes(png("red"))
    picture = png("red")
    pair = {"png": picture, "txt": b"a red thing", "json": b"{}"}
    write_shard(world / "pairs.tar", [pair, pair])
    (world / "photo.png").write_bytes(picture)
    write_shard(world / "bad.tar", 2 * [{**pair, "png": b"no image"}])
    # No sample of apart.tar has a caption in both sources.
    other = {**pair, "txt": b"", "json": b'{"c": "a red thing"}'}
    write_shard(world / "apart.tar", [other, pair])
    (world / "html.tar").write_bytes(b"<html>" * 500)
    (world / "new.jsonl").write_text('{"header": {"steps": 9}, "step": 0}')  # no step was logged
    (world / "empty.txt").write_text("\n")
    (world / "list.csv").write_text("a,c\n1,2\n")
    (world / "red.tiktoken").write_text(words_to_tiktoken(["red", "thing"]))
    model = write_checkpoint(world / "model.pt", small_model())
    (world / "damaged.pt").write_bytes(model.read_bytes()[:9999])
    torch.save({}, world / "other" / "pytorch_model.bin")  # no weight has a name that CLIP needs
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
    assert not Path("out").exists()  # a run with a mistake leaves no folder


# ---- errors that happen while a command runs


class FullDisk(io.BytesIO):
    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


def in_a_loading_process(act):
    list(make_loader([0], workers=1, batch_size=None, collate_fn=lambda _: act()))


ERRORS = {  # case -> what the command does, and the text that the message must contain
    "a full disk": (lambda: FullDisk().write(b"x"), "disk"),
    "a full disk, and torch.save": (lambda: torch.save(torch.ones(9), FullDisk()), "disk"),
    "a dead loading process": (lambda: in_a_loading_process(lambda: os._exit(1)), "--workers"),
}


@cases("act, named", ERRORS)
def test_an_error_of_the_machine_is_one_line(act, named, capsys):
    assert named in error_of(capsys, lambda argv: act())


@cases("around", {"here": lambda act: act(), "in a loading process": in_a_loading_process})
def test_all_lines_of_a_message_are_printed_and_no_trace(around, capsys):
    message = "a.tar is wrong:\nrepair it"

    assert run(lambda argv: around(lambda: check(False, message))) == 2

    assert capsys.readouterr().err.strip() == f"error: {message}"


def test_a_missing_package_is_named_if_a_requirements_file_has_it(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setitem(sys.modules, "open_clip", None)  # so that it cannot be imported

    message = error_of(capsys, convert.main, "ViT-B-32/none", "x.pt")

    assert "open_clip" in message and "requirements-dev.txt" in message
    with pytest.raises(ModuleNotFoundError):  # a mistake in the code of a fork
        run(lambda argv: importlib.import_module("opne_clip"))


# ---- help

COMMANDS = ["train", "eval zeroshot", "eval retrieval"]
for folder in ("scripts", "study"):
    for path in sorted(ROOT.glob(f"{folder}/*.py")):
        if "run_command(main)" in path.read_text():
            COMMANDS.append(f"{folder}.{path.stem}")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_options(command, capsys, monkeypatch):
    for function in ("classification_loss", "idf"):  # experiments replace them
        monkeypatch.setattr(superclip, function, getattr(superclip, function))
    name, *subcommand = command.split()

    assert not run(importlib.import_module(name).main, *subcommand, "--help")

    assert "options:" in capsys.readouterr().out
