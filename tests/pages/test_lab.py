"""Test the lab. A reader can work through it with the project's functions, and its checks say what
is wrong with other functions."""

import json

import pytest
import torch  # noqa: F401, wrong answers use it
import torch.nn.functional as F
from children import ROOT
from material import TINY

import superclip
from docs.lab import Mistake
from superclip import PRESETS, caption_label, classification_loss, contrastive_loss, idf

CELLS = json.loads((ROOT / "docs" / "lab.ipynb").read_text())["cells"]
BLOCKS = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def forward(model, images, tokens, label_tokens):
    out = model(images, tokens, label_tokens)
    return {name: out[name] for name in ("contrastive_loss", "classification_loss")}


def my_forward(model, images, tokens, label_tokens):
    losses = forward(model, images, tokens, label_tokens)
    return {**losses, "my_loss": losses["classification_loss"]}


RIGHT = {
    "contrastive_loss": contrastive_loss,
    "idf": idf,
    "label": caption_label,
    "classification_loss": classification_loss,
    "forward": forward,
    "my_forward": my_forward,
}


@pytest.fixture(scope="module")
def page():
    """Return the names that the lab has defined at its end, with the project's functions in place
    of the stubs. Its models are smaller here, and see only a few pairs."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        patch.setenv("MPLBACKEND", "Agg")
        patch.chdir(ROOT)
        for block in BLOCKS:
            exec(block.replace("12500, 500, 24000", "96, 64, 320"), names)
            names.update(RIGHT)
    return names


def repeated_words(t, w):
    return F.normalize(F.one_hot(t, 9).sum(dim=1) * superclip.multi_hot(t, 9) * w, p=1)


def count_twice(model, images, tokens, label_tokens):
    model.count_tokens(label_tokens)
    return forward(model, images, tokens, label_tokens)


# Each line holds the name of a function, its arguments, what a wrong function returns, and a part
# of the message.
WRONG = """
contrastive_loss    | u, v, s    | None | Fill in
contrastive_loss    | u, v, s    | F.cross_entropy(s * u @ v.T, torch.arange(5)) | rows only
contrastive_loss    | u, v, s    | contrastive_loss(u, v, s).detach() | not the right gradient
contrastive_loss    | u, v, s    | contrastive_loss(u, v.detach(), s) | not the right gradient
contrastive_loss    | u, v, s    | contrastive_loss(u, v, s.detach()) | not the right gradient
idf                 | N, n       | ((n + 1) / (N + 1)).log() | rare
idf                 | N, n       | torch.where(n > 0, ((N + 1) / (n + 1)).log(), 0.0) | should be
label               | t, w       | F.normalize(F.one_hot(t, 9).sum(dim=1)[:, 1:7] * w[1:7]) | shape
label               | t, w       | F.normalize(F.one_hot(t, 9).amax(dim=1) * w, p=1) | no words
label               | t, w       | repeated_words(t, w) | occurs twice
classification_loss | x, t, w    | classification_loss(x.softmax(dim=1), t, w) | softmax
forward             | m, x, t, l | count_twice(m, x, t, l) | once
forward             | m, x, t, l | torch.no_grad()(forward)(m, x, t, l) | not the right gradient
forward             | m, x, t, l | tuple(forward(m, x, t, l).values()) | dict
my_forward          | m, x, t, l | forward(m, x, t, l) | 3 losses
my_forward          | m, x, t, l | {**forward(m, x, t, l), "my_loss": torch.zeros(())} | no gradient
my_forward          | m, x, t, l | {**forward(m, x, t, l), "my_loss": m.encode_text(t)} | scalar
"""
ROWS = [[cell.strip() for cell in line.split("|")] for line in WRONG.strip().splitlines()]


@pytest.mark.parametrize("name, arguments, answer, named", ROWS)
def test_a_wrong_answer_ends_in_a_sentence_about_it(page, name, arguments, answer, named):
    function = eval(f"lambda {arguments}: {answer}")
    [check] = [block for block in BLOCKS if f"lab.check_{name}(" in block]

    with pytest.raises(Mistake, match=named):
        exec(check, {**page, name: function})
