"""Test scripts/probe.py, a linear classifier on the class token."""

import shutil

import pytest
import torch
from material import result_of

from common.cli import InputError
from scripts import probe


def test_a_probe_finds_what_is_there_at_any_scale():
    """One picture in twenty is of class 1. With the largest penalty the probe would find none."""
    y = (torch.arange(400) % 20 == 0).long()
    scales = 10 ** torch.linspace(-3, 3, 20)
    x = (torch.randn(400, 20) + 2 * y[:, None]) * scales + 5

    found = probe.probe(x[:200], y[:200], x[200:], y[200:], 2)

    assert (found["value"], found["n"]) == (1, 200)
    with pytest.raises(InputError, match="two images"):
        probe.probe(x[:1], y[:1], x[200:], y[200:], 2)


def test_the_labels_of_the_test_choose_nothing():
    """The features are noise, so a penalty may do well by chance. If the labels of the test do not
    choose it, the guesses stay when these labels are swapped, and right ones become wrong."""
    x, y = torch.randn(400, 20), torch.arange(400) % 2

    found = probe.probe(x[:200], y[:200], x[200:], y[200:], 2)
    other = probe.probe(x[:200], y[:200], x[200:], 1 - y[200:], 2)

    assert found["value"] + other["value"] == pytest.approx(1)


def test_a_probe_of_a_class_token_that_sees_no_patch_can_only_guess(folders, checkpoint, capsys):
    content = torch.load(checkpoint)
    content["model"]["visual.transformer.resblocks.0.attn.out_proj.weight"].zero_()
    torch.save(content, checkpoint)
    test = shutil.copytree(folders, folders.with_name("test"))
    argv = ["--checkpoint", checkpoint, "--workers", 0, "--train", folders, "--test", test]

    score, printed = result_of(capsys, probe.main, folders.with_name("scores.json"), *argv)

    assert score["value"] == score["chance"] == pytest.approx(1 / 3)
    assert "33.33 %   chance  33.33 %" in printed
