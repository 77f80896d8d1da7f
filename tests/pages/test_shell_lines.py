"""Each command line that a page shows is understood by the parser of its own command."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
from children import ROOT
from material import cases

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
# python train.py ..., python -m scripts.pack ..., torchrun --nproc_per_node 8 train.py ...
COMMAND = re.compile(r"(?:python|torchrun --nproc_per_node \d) (?:(\w+)\.py|-m (\w+\.\w+))\s*(.*)")


def shell_lines(text):
    """The command lines of a page: of its blocks, and of `code` in its sentences. What follows &&
    is a line of its own."""
    lines = []
    for language, block in FENCE.findall(text):
        if language != "python":
            lines += block.replace("\\\n", " ").splitlines()
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        lines.append(" ".join(code.split()))
    return [part.strip() for line in lines for part in line.split("&&")]


COMMANDS = {}  # line, with the name of its page -> module and arguments
for page in PAGES:
    for line in shell_lines(page.read_text()):
        match = COMMAND.match(line)
        if match and match[3] and "..." not in line:  # a sentence may name a command alone
            script, module, arguments = match.groups()
            COMMANDS[f"{page.name}: {line}"] = (script or module, arguments)


class Parsed(Exception):
    """A parser has accepted the arguments."""


@cases("module, arguments", COMMANDS)
def test_a_command_understands_its_arguments(module, arguments, tmp_path, monkeypatch):
    command = importlib.import_module(module)
    argv = shlex.split(arguments, comments=True)
    monkeypatch.chdir(tmp_path)
    for word in argv:  # the folders in which a command would write
        Path(word).parent.mkdir(parents=True, exist_ok=True)
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def parse_and_stop(self, args, namespace=None, parse=parse):
            parse(self, args, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, name, parse_and_stop)

    with pytest.raises(Parsed):
        command.main(argv)
