"""The checks of docs/lab.md accept the project's functions, and know what is wrong with others."""

import re

import pytest
import torch
import torch.nn.functional as F
from children import ROOT
from material import TINY

from docs.lab import Mistake
from superclip import PRESETS, caption_label, classification_loss, contrastive_loss, idf

PAGE = (ROOT / "docs" / "lab.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def forward(model, images, tokens, label_tokens):
    out = model(images, tokens, label_tokens)
    return {"contrastive_loss": out["contrastive_loss"], "word_loss": out["classification_loss"]}


def my_forward(model, images, tokens, label_tokens):
    losses = forward(model, images, tokens, label_tokens)
    return {**losses, "my_loss": losses["word_loss"]}


RIGHT = {
    "contrastive_loss": contrastive_loss,
    "idf": idf,
    "label": caption_label,
    "classification_loss": classification_loss,
    "forward": forward,
    "my_forward": my_forward,
}


def block_with(text):
    """The one block of the page that has this text."""
    (block,) = [block for block in BLOCKS if text in block]
    return block


@pytest.fixture(scope="module")
def page():
    """The names that the page has defined when it was worked through, with the project's functions
    in place of the stubs. Its models are smaller, and see a few pairs."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        patch.setenv("MPLBACKEND", "Agg")
        for block in BLOCKS:
            exec(block.replace("12500, 500, 24000", "96, 64, 320"), names)
            names.update(RIGHT)
    return names


def test_all_models_of_the_page_are_trained(page):
    curves = [value for name, value in page.items() if name.endswith("_curve")]

    assert len(curves) == PAGE.count("_curve = train(") > 0
    for curve in curves:
        assert [pairs for pairs, *_ in curve] == list(range(0, 321, 32))


@pytest.mark.parametrize("name", RIGHT)
def test_a_check_can_be_run_again_at_the_end(page, name):
    exec(block_with(f"lab.check_{name}("), {**page})


@pytest.mark.parametrize("name", RIGHT)
def test_a_stub_is_empty_and_its_check_says_so(page, name):
    stub = block_with(f"def {name}(")
    names = {**page}
    exec(stub, names)

    with pytest.raises(Mistake, match=name):
        exec(block_with(f"lab.check_{name}("), names)

    assert stub.split('"""')[2] == "\n    ...\n"  # after the docstring


# ---- wrong answers


def of_rows(u, v, scale):
    return F.cross_entropy(scale * u @ v.T, torch.arange(len(u)))


def count_twice(model, images, tokens, label_tokens):
    model.count_tokens(label_tokens)
    return forward(model, images, tokens, label_tokens)


def word_loss_in_place(x, t, w):
    p = x.exp_()
    p /= p.sum(dim=1, keepdim=True)
    return -(caption_label(t, w) * p.log()).sum(dim=1).mean()


def idf_of_four(n):
    return torch.cat([torch.zeros(1), (5 / (n[1:] + 1)).log()])


# name of a function, its arguments, what a wrong one returns, and what the sentence names
WRONG = """
contrastive_loss    | u, v, s    | of_rows(u, v, s) | rows alone
contrastive_loss    | u, v, s    | contrastive_loss(u.detach(), v, s) | gradient
contrastive_loss    | u, v, s    | contrastive_loss(u, v, s).item() | tensor
contrastive_loss    | u, v, s    | 1.23 * contrastive_loss(u, v, s) | should be
idf                 | N, n       | ((N + 1) / (n + 1)).log() | padding
idf                 | N, n       | torch.where(n > 0, ((N + 1) / (n + 1)).log(), 0.0) | said
idf                 | N, n       | idf_of_four(n) | N is not
label               | t, w       | F.normalize(F.one_hot(t, 8).amax(dim=1) * w, p=1) | 8 tokens
label               | t, w       | caption_label(t, w)[[0, 1, 2, 3]] | 4 captions
label               | t, w       | F.normalize(F.one_hot(t, 8).sum(dim=1) * w, p=1) | occurs twice
classification_loss | x, t, w    | classification_loss(x, t, w) * len(x) | mean
classification_loss | x, t, w    | classification_loss(x.softmax(dim=1), t, w) | softmax
classification_loss | x, t, w    | classification_loss(x, t, w) * len(x) / 4 | 4 captions
classification_loss | x, t, w    | word_loss_in_place(x, t, w) | in place
forward             | m, x, t, l | count_twice(m, x, t, l) | once
forward             | m, x, t, l | tuple(forward(m, x, t, l).values()) | dict
my_forward          | m, x, t, l | forward(m, x, t, l) | 3 losses
my_forward          | m, x, t, l | {**forward(m, x, t, l), "my_loss": torch.zeros(())} | no gradient
my_forward          | m, x, t, l | {k: x / 0 for k, x in my_forward(m, x, t, l).items()} | spoil
"""
ROWS = [[cell.strip() for cell in line.split("|")] for line in WRONG.strip().splitlines()]


@pytest.mark.parametrize("name, arguments, answer, named", ROWS)
def test_a_wrong_answer_ends_in_a_sentence_about_it(page, name, arguments, answer, named):
    function = eval(f"lambda {arguments}: {answer}")

    with pytest.raises(Mistake, match=named):
        exec(block_with(f"lab.check_{name}("), {**page, name: function})
