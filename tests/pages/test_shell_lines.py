"""Each command line that a page shows is understood by the parser of its own command."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
# python train.py ..., python -m scripts.pack ..., torchrun --nproc_per_node 8 train.py ...
COMMAND = re.compile(r"(?:python|torchrun --nproc_per_node \d) (?:(\w+)\.py|-m (\w+\.\w+))\s*(.*)")
PLACEHOLDERS = {"MODEL": "tiny"}  # words of a page that stand for one of several choices


def shell_lines(text):
    """The command lines of a page, without comments: of its blocks, and of `code` in its sentences.
    What follows && is a line of its own."""
    lines = []
    for language, block in FENCE.findall(text):
        if language != "python":
            lines += block.replace("\\\n", " ").splitlines()
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        lines.append(" ".join(code.split()))
    return [part.strip() for line in lines for part in line.split("&&")]


def commands_of(page):
    """The lines of a page that start a command of this project, as (line, module, arguments),
    without those that stop at three dots."""
    found = []
    for line in shell_lines(page.read_text()):
        match = COMMAND.match(line)
        if match and "..." not in line:
            script, module, arguments = match.groups()
            found.append((line, script or module, arguments))
    return found


COMMANDS = {f"{page.name}: {line}": rest for page in PAGES for line, *rest in commands_of(page)}


class Parsed(Exception):
    """A parser has accepted the arguments."""


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """A command ends with Parsed as soon as it has parsed its arguments. (train.py parses an empty
    list before, to learn its defaults.)"""
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def parse_and_stop(self, args=None, namespace=None, parse=parse):
            result = parse(self, args, namespace)
            if args:
                raise Parsed
            return result

        monkeypatch.setattr(argparse.ArgumentParser, name, parse_and_stop)


@pytest.mark.parametrize("module, arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_command_understands_its_arguments(
    module, arguments, stop_after_parsing, tmp_path, monkeypatch
):
    command = importlib.import_module(module)
    argv = [PLACEHOLDERS.get(word, word) for word in shlex.split(arguments, comments=True)]
    monkeypatch.chdir(tmp_path)
    for word in argv:  # the folders in which a command would write
        Path(word).parent.mkdir(parents=True, exist_ok=True)

    if argv and argv != ["--help"]:
        with pytest.raises(Parsed):
            command.main(argv)
