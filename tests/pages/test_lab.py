"""The checks of docs/lab.md accept the project's functions, and know what is wrong with others."""

import re

import pytest
import torch
import torch.nn.functional as F
from children import ROOT
from material import TINY, cases

from docs.lab import Mistake
from superclip import (
    PRESETS,
    caption_label,
    classification_loss,
    contrastive_loss,
    idf,
    multi_hot,
)

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
            exec(block.replace("4500, 16000", "564, 640"), names)
            names.update(RIGHT)
    return names


def test_all_models_of_the_page_are_trained(page):
    curves = [value for name, value in page.items() if name.endswith("_curve")]

    assert len(curves) == PAGE.count("_curve = train(") > 0
    for curve in curves:
        assert [pairs for pairs, *_ in curve] == list(range(0, 641, 64))


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


def of_rows(u, v, scale, pairs=None):
    return F.cross_entropy(scale * u @ v.T, torch.arange(pairs or len(u)))


def of_softmax(u, v, scale):
    p = (scale * u @ v.T).softmax(dim=1)
    return F.cross_entropy(p, torch.arange(len(u)))


def change_counts(num_captions, token_counts):
    token_counts[0] = num_captions
    return idf(num_captions, token_counts)


def words(tokens, weights):
    return multi_hot(tokens, len(weights)) * weights


def every_occurrence(tokens, weights):
    return F.one_hot(tokens, len(weights)).sum(dim=1) * weights


def divided(words):
    return words / words.sum(dim=1, keepdim=True)


def shares(words):
    return F.normalize(words, p=1, dim=1)


def cross_entropy(label, p):
    return -(label * p.log()).sum(dim=1).mean()


def mean_of_some(logits, tokens, weights):
    spoken = caption_label(tokens, weights).sum(dim=1) > 0
    return classification_loss(logits[spoken], tokens[spoken], weights)


def yes_or_no(logits, tokens, weights):
    label = caption_label(tokens, weights)
    return F.binary_cross_entropy_with_logits(logits, label, reduction="sum") / len(label)


def idf_of_the_batch(model, images, tokens):
    model.token_counts.zero_()
    model.num_captions.zero_()
    return forward(model, images, tokens)


def count_late(model, images, tokens):
    losses = forward(model.eval(), images, tokens)
    model.count_tokens(tokens)
    return losses


def count_twice(model, images, tokens):
    model.count_tokens(tokens)
    return forward(model, images, tokens)


def contrast(out, scale):
    """What forward returns, from what the model returns and from a scale."""
    loss = contrastive_loss(out["image_features"], out["text_features"], scale)
    return {"contrastive_loss": loss, "word_loss": out["classification_loss"]}


def detach(out, name):
    return {**out, name: out[name].detach()}


def detach_patches(model, images, tokens):
    losses = forward(model, images, tokens)
    logits = model.head(model.visual(images).detach())
    losses["word_loss"] = classification_loss(logits, tokens, model.token_weights())
    return losses


# name of a function -> its arguments, and for each mistake what it returns
WRONG = {
    "contrastive_loss": (
        "u, v, s",
        {
            "rows alone": "of_rows(u, v, s)",
            "columns alone": "of_rows(v, u, s)",
            "sum of both": "of_rows(u, v, s) + of_rows(v, u, s)",
            "no scale": "contrastive_loss(u, v, 1)",
            "a temperature": "contrastive_loss(u, v, 1 / s)",
            "two softmaxes": "(of_softmax(u, v, s) + of_softmax(v, u, s)) / 2",
            "sign": "-contrastive_loss(u, v, s)",
            "always four": "(of_rows(u, v, s, 4) + of_rows(v, u, s, 4)) / 2",
            "u without gradient": "contrastive_loss(u.detach(), v, s)",
            "v without gradient": "contrastive_loss(u, v.detach(), s)",
            "a number": "contrastive_loss(u, v, s).item()",
            "nonsense": "1.23 * contrastive_loss(u, v, s)",
        },
    ),
    "idf": (
        "N, n",
        {
            "padding counts": "((N + 1) / (n + 1)).log()",
            "sign": "-idf(N, n)",
            "log10": "idf(N, n) / 2.302585",
            "N / n": "(N / n).log().where(n > 0, 0.0)",
            "counts are changed": "change_counts(N, n)",
            "nonsense": "1.23 * idf(N, n)",
        },
    ),
    "label": (
        "t, w",
        {
            "every occurrence": "shares(every_occurrence(t, w))",
            "every occurrence and 0 / 0": "divided(every_occurrence(t, w))",
            "weights": "words(t, w)",
            "length 1": "F.normalize(words(t, w))",
            "a sum of 1 at least": "words(t, w) / words(t, w).sum(dim=1, keepdim=True).clamp(1)",
            "a share for each place": "shares(w[t])",
            "nonsense": "1.23 * caption_label(t, w)",
        },
    ),
    "classification_loss": (
        "x, t, w",
        {
            "sum over the captions": "classification_loss(x, t, w) * len(x)",
            "mean of some": "mean_of_some(x, t, w)",
            "equal shares": "F.cross_entropy(x, shares(words(t, w).sign()))",
            "every occurrence": "F.cross_entropy(x, shares(every_occurrence(t, w)))",
            "weights": "F.cross_entropy(x, words(t, w))",
            "no softmax": "cross_entropy(caption_label(t, w), x.exp())",
            "no logarithm": "cross_entropy(caption_label(t, w), x.softmax(dim=1).exp())",
            "two softmaxes": "classification_loss(x.softmax(dim=1), t, w)",
            "columns": "cross_entropy(caption_label(t, w), x.softmax(dim=0))",
            "yes or no": "yes_or_no(x, t, w)",
            "sign": "-classification_loss(x, t, w)",
            "no gradient": "classification_loss(x, t, w).detach()",
            "nonsense": "1.23 * classification_loss(x, t, w)",
        },
    ),
    "forward": (
        "m, x, t",
        {
            "no exp": "contrast(m(x, t), m.logit_scale)",
            "a constant scale": "contrast(m(x, t), 1 / 0.07)",
            "nothing counted": "forward(m.eval(), x, t)",
            "counted too late": "count_late(m, x, t)",
            "IDF of the batch": "idf_of_the_batch(m, x, t)",
            "counted twice": "count_twice(m, x, t)",
            "detached images": "contrast(detach(m(x, t), 'image_features'), m.logit_scale.exp())",
            "detached texts": "contrast(detach(m(x, t), 'text_features'), m.logit_scale.exp())",
            "detached patches": "detach_patches(m, x, t)",
            "a tuple": "tuple(forward(m, x, t).values())",
            "other names": "dict(zip('ab', forward(m, x, t).values()))",
            "nonsense": "contrast(m(x, t), 1.23)",
        },
    ),
    "my_forward": (
        "m, x, t",
        {
            "no new loss": "forward(m, x, t)",
            "a number": "{**forward(m, x, t), 'my_loss': 1.0}",
            "no gradient": "{**forward(m, x, t), 'my_loss': torch.zeros(())}",
            "a tuple": "tuple(my_forward(m, x, t).values())",
        },
    ),
}


@cases("name, arguments, mistakes", {name: (name, *answers) for name, answers in WRONG.items()})
def test_each_wrong_answer_ends_in_a_sentence_of_its_own(page, name, arguments, mistakes):
    """Numbers alone are no difference, so none ends like nonsense, of which nothing is known."""
    check = block_with(f"lab.check_{name}(")
    sentences = []
    for answer in mistakes.values():
        function = eval(f"lambda {arguments}: {answer}")
        with pytest.raises(Mistake) as raised:
            exec(check, {**page, name: function})
        sentences.append(re.sub(r"[-\d.e]+", "", str(raised.value)))

    assert len({*sentences}) == len(mistakes), sentences
