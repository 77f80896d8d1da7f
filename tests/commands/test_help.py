"""Every command has a --help that explains each of its options."""

import importlib
import re

import pytest
from children import ROOT
from material import run

COMMANDS = ["train", "eval zeroshot", "eval retrieval", "eval probe", "scenes"]
COMMANDS += ["study.compare", "study.plan", "docs.demo"]
COMMANDS += [
    f"scripts.{path.stem}"
    for path in sorted(ROOT.glob("scripts/*.py"))
    if "run_command(main)" in path.read_text()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command, capsys):
    name, *subcommand = command.split()

    assert not run(importlib.import_module(name).main, *subcommand, "--help")

    printed = re.sub(r"\n {10,}", "  ", capsys.readouterr().out)  # texts begin on the next line
    options = re.findall("^  -.*", printed, re.MULTILINE)
    assert options
    assert [option for option in options if not re.search(r"\S {2,}\S", option)] == []
