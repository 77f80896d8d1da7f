"""--help explains every option of every command, and the defaults that it states are true."""

import argparse
import importlib
import re

import pytest

import train

COMMANDS = "bench classes convert demo pack report scenes search show vocab words".split()
MODULES = ["train", "eval", *(f"scripts.{name}" for name in COMMANDS), "study.compare"]
# "(default 10,000)", "(default 2 processes)", "(10)" or "txt (default)". What follows "default:" is
# a rule and no value.
STATED = re.compile(r"\(default ([^\s();]+)|\((\d[\d.,e-]*)[;)]|(\S+) \(default\)")


class Asked(Exception):
    """A command has asked its parser, args[0], to parse something."""


@pytest.fixture
def parsers_of(monkeypatch):
    """parsers_of(module) -> the parser of a command, and those of its subcommands."""

    def ask(self, *args, **options):
        raise Asked(self)

    def parsers_of(module):
        main = importlib.import_module(module).main
        with monkeypatch.context() as patch, pytest.raises(Asked) as asked:
            for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
                patch.setattr(argparse.ArgumentParser, name, ask)
            main([])
        found = [asked.value.args[0]]
        for action in found[0]._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()
        return found

    return parsers_of


def options_of(parser):
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


def stated_default(parser, option):
    """The default that the help text of an option names, or None if it names none or a rule."""
    match = STATED.search(parser._get_formatter()._expand_help(option))
    return match and next(filter(None, match.groups()))


def assert_means(stated, value):
    """The text in a help text means this value."""
    if isinstance(value, (int, float)):
        assert float(stated.replace(",", "")) == value
    elif isinstance(value, list):
        assert stated == " ".join(value)
    else:
        assert stated == str(value)


@pytest.mark.parametrize("module", MODULES)
def test_every_option_is_explained(parsers_of, module):
    for parser in parsers_of(module):
        text = parser.format_help()  # which also fills in what help texts refer to

        assert [option.dest for option in options_of(parser) if not option.help] == [], text


@pytest.mark.parametrize("module", [module for module in MODULES if module != "train"])
def test_the_defaults_that_help_states_are_those_of_the_parser(parsers_of, module):
    for parser in parsers_of(module):
        for option in options_of(parser):
            stated = stated_default(parser, option)
            if stated:
                assert_means(stated, option.default)


def test_the_defaults_that_train_states_are_those_of_a_run_on_your_own_pairs(parsers_of):
    args, _ = train.parse(["--train_data", "pairs.tar"])
    [parser] = parsers_of("train")
    stated = {option.dest: stated_default(parser, option) for option in options_of(parser)}
    stated = {name: text for name, text in stated.items() if text}

    assert {"model", "batch_size", "learning_rate", "weight_decay"} <= stated.keys()
    for name, text in stated.items():
        assert_means(text, getattr(args, name))
