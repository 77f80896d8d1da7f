"""The checks of docs/lab.md accept the project's functions, and name what is wrong with others."""

import re

import pytest
import torch
import torch.nn.functional as F
from children import ROOT
from material import cases

from docs.lab import Mistake
from superclip import caption_label, classification_loss, contrastive_loss, idf, multi_hot

PAGE = (ROOT / "docs" / "lab.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def forward(model, images, tokens):
    out = model(images, tokens)
    return {"contrastive_loss": out["contrastive_loss"], "word_loss": out["classification_loss"]}


def my_forward(model, images, tokens):
    losses = forward(model, images, tokens)
    return {**losses, "my_loss": losses["word_loss"]}


RIGHT = {
    "contrastive_loss": contrastive_loss,
    "idf": idf,
    "label": caption_label,
    "classification_loss": classification_loss,
    "forward": forward,
    "my_forward": my_forward,
}


def work_through(answers, steps=0):
    """Run the blocks of the page in order, with these functions in place of the stubs, but train no
    model if there are no steps. Returns all names that the blocks have defined."""
    names = {}
    for block in BLOCKS:
        if steps > 0 or not re.search("curve|ours", block):
            exec(block.replace("4500, 500", f"564, {steps}").replace("% 50", "% 5"), names)
        names.update(answers)
    return names


def test_all_checks_accept_the_projects_functions(monkeypatch):
    """And both models are trained, smaller ones for five steps."""
    monkeypatch.setenv("MPLBACKEND", "Agg")

    names = work_through(RIGHT, steps=5)

    assert len(names["our_curve"]) == 1


@pytest.mark.parametrize("name", RIGHT)
def test_a_stub_is_empty_and_its_check_says_so(name):
    with pytest.raises(Mistake, match=f"Fill in {name} first"):
        work_through({n: RIGHT[n] for n in RIGHT if n != name})

    (stub,) = [block for block in BLOCKS if block.startswith(f"def {name}(")]
    assert stub.split('"""')[2] == "\n    ...\n"  # after the docstring


def of_rows(u, v, scale):
    return F.cross_entropy(scale * u @ v.T, torch.arange(len(u)))


def with_padding(num_captions, token_counts):
    return ((num_captions + 1) / (token_counts + 1)).log()


def every_occurrence(tokens, weights):
    return F.normalize(F.one_hot(tokens, len(weights)).sum(dim=1) * weights, p=1)


def zero_by_zero(tokens, weights):
    words = multi_hot(tokens, len(weights)) * weights
    return words / words.sum(dim=1, keepdim=True)


def mean_over_words(logits, tokens, weights):
    return -(caption_label(tokens, weights) * logits.log_softmax(dim=1)).mean()


def idf_of_the_batch(model, images, tokens):
    model.token_counts.zero_()
    model.num_captions.zero_()
    return forward(model, images, tokens)


def without_counting(model, images, tokens):
    return forward(model.eval(), images, tokens)


@cases(
    "name, wrong, message",
    {
        "no transpose": ("contrastive_loss", of_rows, "that of the rows alone"),
        "padding counts": ("idf", with_padding, "padding is no word"),
        "a word counts twice": ("label", every_occurrence, "occurs twice counts once"),
        "0 / 0": ("label", zero_by_zero, "divide by 0"),
        "mean over the words": ("classification_loss", mean_over_words, "sum over the vocabulary"),
        "IDF of the batch": ("forward", idf_of_the_batch, "not by this batch alone"),
        "nothing counted": ("forward", without_counting, "count the captions first"),
    },
)
def test_the_check_of_a_wrong_answer_says_what_is_wrong(name, wrong, message):
    with pytest.raises(Mistake, match=message):
        work_through({**RIGHT, name: wrong})
