"""Test the README and the pages of docs/: commands and code run, and what they link exists."""

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from children import ROOT
from material import TOKENIZER, small_model
from oracle import make_pairs, make_random_model, open_clip_of

import superclip

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "study" / "results.md"]
LAB = ROOT / "docs" / "lab.ipynb"
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
FORK = (ROOT / "docs" / "fork.md").read_text()


def anchors_of(page):
    headings = re.findall(r"^#+ (.+)", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]


@pytest.mark.parametrize("page", [*PAGES, LAB], ids=lambda path: path.name)
def test_every_file_and_heading_that_a_page_links_exists(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in anchors_of(target), link


def test_the_readme_has_the_scores_of_the_study():
    results = (ROOT / "study" / "results.md").read_text()
    readme = (ROOT / "README.md").read_text()

    scores = re.findall(r"SuperCLIP\s+names\s+(\S+) % and\s+CLIP\s+(\S+) %", readme)

    assert len(scores) == 2
    for ours, clip in scores:
        assert re.search(rf"\| {clip} \| \S+ \| {ours} \|", results), ours


# ---- commands

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
# COMMAND matches python train.py ..., python -m scripts.pack ..., and
# torchrun --nproc_per_node 8 train.py ...
COMMAND = re.compile(r"(?:python|torchrun --nproc_per_node \d) (?:(\w+)\.py|-m (\w+\.\w+))\s*(.*)")


def shell_lines(text):
    """Return the command lines in the blocks of a page, and in `code` in its sentences. A command
    that follows && is a separate line."""
    lines = []
    for language, block in FENCE.findall(text):
        if language != "python":
            lines += block.replace("\\\n", " ").splitlines()
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        lines.append(" ".join(code.split()))
    return [part.strip() for line in lines for part in re.split(r"&&|\|\|", line)]


LINES = {line for page in PAGES for line in shell_lines(page.read_text()) if "..." not in line}
COMMANDS = [match for match in map(COMMAND.match, sorted(LINES)) if match and match[3]]


class Parsed(Exception):
    """Stop a command, because its parser has accepted the arguments."""


@pytest.mark.parametrize("match", COMMANDS, ids=lambda match: match[0])
def test_a_command_understands_its_arguments(match, tmp_path, monkeypatch):
    script, module, arguments = match.groups()
    command = importlib.import_module(script or module)
    argv = shlex.split(arguments, comments=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(superclip, "classification_loss", None)  # study.shuffled replaces it
    for word in argv:  # make the folders in which a command would write
        Path(word).parent.mkdir(parents=True, exist_ok=True)
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def parse_and_stop(*args, parse=parse):
            parse(*args)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, name, parse_and_stop)

    with pytest.raises(Parsed):
        command.main(argv)


# ---- code


def code_from(page, first):
    """Return the block of Python on a page of docs/ that begins with the text `first`."""
    text = (ROOT / "docs" / page).read_text()
    return re.search(rf"```python\n({re.escape(first)}.+?)```", text, re.DOTALL)[1]


def test_the_code_in_the_readme_is_the_method():
    """The lines in the README that turn CLIP into SuperCLIP compute what SuperCLIP.forward does."""
    model = small_model().train()
    captions = TOKENIZER(["a red ring", "the red thing", "grey"], 8)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    expected = model(images, captions)

    _, patches = model.visual(images)
    names = {
        **vars(F),
        **vars(superclip),
        "patches": patches,
        "tokens": captions,
        "clip_loss": expected["contrastive_loss"],
        "vocab_size": TOKENIZER.vocab_size,
        "cls_weight": 1.0,
        "head": model.head,
        "num_captions": model.num_captions,
        "token_counts": model.token_counts,
    }

    exec(code_from("../README.md", "logits = "), names)

    torch.testing.assert_close(names["cls_loss"], expected["classification_loss"])
    torch.testing.assert_close(names["loss"], expected["loss"])


PRINTED = r"tensor\(\[\[(.+),(.+)\]\]\)\n\[\[\('brown', .+, \('red', .+\)\]\]\n"


def test_the_lines_of_inference_run(monkeypatch, capsys):
    """They print two cosines without a graph, the first one larger, and then the words that the
    page names."""
    monkeypatch.chdir(ROOT)

    names = {}
    exec(code_from("weights.md", "from common.images"), names)

    red_heart, green_star = re.fullmatch(PRINTED, capsys.readouterr().out).groups()
    assert float(red_heart) > float(green_star)
    assert not names["model"].training


# BLOCKS are the Python blocks of the tutorial, each with the text block that follows at once. The
# text block may be folded up.
OUTPUT = r"(?:<details>[^\n]*\n\n)?```text\n(.*?)```"
BLOCKS = re.findall(rf"```python\n(.*?)```\n(?:{OUTPUT})?", TUTORIAL, re.DOTALL)
DECIMAL = re.compile(r"[-+]?\d+\.\d+")


def assert_same(printed, expected):
    """Check that two texts are equal, up to white space and to the last digit of numbers with a
    decimal point. The floating point of two CPUs may differ in that digit."""
    assert DECIMAL.sub("#", printed).split() == DECIMAL.sub("#", expected).split()
    for ours, theirs in zip(DECIMAL.findall(printed), DECIMAL.findall(expected)):
        digits = len(theirs.partition(".")[2])
        assert len(ours.partition(".")[2]) == digits
        assert float(ours) == pytest.approx(float(theirs), abs=1.5 * 10.0**-digits)


def test_a_block_prints_what_the_page_says(capsys, monkeypatch):
    """The blocks share their names, because a reader runs all of them in one session."""
    monkeypatch.undo()  # remove the smaller model of conftest.py
    names = {}
    for code, expected in BLOCKS:
        exec(code, names)
        assert_same(capsys.readouterr().out, expected)


def test_the_first_change_on_the_page_of_forks_leaves_out_the_scale(monkeypatch):
    images, texts = F.normalize(torch.randn(2, 4, 8), dim=-1)
    expected = superclip.contrastive_loss(images, texts, 1.0)
    monkeypatch.setattr(superclip, "contrastive_loss", superclip.contrastive_loss)  # to restore it
    monkeypatch.setattr("train.main", lambda argv: None)

    names = {"__name__": "study.mine"}
    exec(code_from("fork.md", "import superclip\nimport train"), names)
    names["main"]([])

    assert small_model().pair_loss(images, texts).equal(expected)


def test_the_head_in_open_clip_has_the_same_loss(monkeypatch):
    model = make_random_model().train()
    images, tokens = make_pairs(model)
    expected = model(images, tokens)
    monkeypatch.setattr("open_clip.create_model", lambda name: open_clip_of(model))

    names = {}
    exec(code_from("fork.md", "import open_clip"), names)
    names["head"].load_state_dict(model.head.state_dict())
    padded = F.pad(tokens, (0, names["clip"].context_length - tokens.shape[1]))

    torch.testing.assert_close(names["loss_of"](images, padded), expected["loss"])


def test_the_fork_on_the_page_has_the_same_gradients_in_micro_batches(tmp_path):
    """We leave out the test with two processes. It would take seconds more."""
    folder = tmp_path / "fork"
    for name in ("common", "tests"):
        shutil.copytree(ROOT / name, folder / name)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    diff = "".join(re.findall("```diff\n(.*?)```", FORK, re.DOTALL))
    applied = subprocess.run(["git", "apply"], input=diff, text=True, cwd=folder)
    if applied.returncode != 0:
        assert "CI" not in os.environ, "the diff in docs/fork.md does not fit the code"
        pytest.skip("the diff on the page does not fit this fork")
    chosen = ["-k", "uniformity and micro_batches and cpu", "tests/test_step.py"]
    command = [sys.executable, "-m", "pytest", *chosen]

    tested = subprocess.run(command, cwd=folder, text=True, capture_output=True)

    assert re.search(r"\b4 passed", tested.stdout), tested.stdout
