"""The checks of docs/lab.md accept the project's functions, and know what is wrong with others."""

import re

import pytest
import torch
import torch.nn.functional as F
from children import ROOT
from material import TINY

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
    logits = scale * u @ v.T
    classes = torch.arange(len(u))
    rows = F.cross_entropy(logits.softmax(dim=1), classes)
    return (rows + F.cross_entropy(logits.T.softmax(dim=1), classes)) / 2


def with_padding(num_captions, token_counts):
    return ((num_captions + 1) / (token_counts + 1)).log()


def without_ones(num_captions, token_counts):
    return (num_captions / token_counts).log().where(token_counts > 0, 0.0)


def change_counts(num_captions, token_counts):
    token_counts[0] = num_captions
    return with_padding(num_captions, token_counts)


def words(tokens, weights):
    return multi_hot(tokens, len(weights)) * weights


def shares(words):
    return F.normalize(words, p=1, dim=1)


def every_occurrence(tokens, weights):
    return F.one_hot(tokens, len(weights)).sum(dim=1) * weights


def divided(words):
    return words / words.sum(dim=1, keepdim=True)


def clamped(tokens, weights):
    return words(tokens, weights) / words(tokens, weights).sum(dim=1, keepdim=True).clamp(min=1)


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


def without_counting(model, images, tokens):
    return forward(model.eval(), images, tokens)


def count_late(model, images, tokens):
    losses = forward(model.eval(), images, tokens)
    model.count_tokens(tokens)
    return losses


def count_twice(model, images, tokens):
    model.count_tokens(tokens)
    return forward(model, images, tokens)


def contrast(model, images, tokens, scale=None, change_u=torch.clone, change_v=torch.clone):
    """`forward` with another scale, or with changed features."""
    out = model(images, tokens)
    u = change_u(out["image_features"])
    v = change_v(out["text_features"])
    if scale is None:
        scale = model.logit_scale.exp()
    loss = contrastive_loss(u, v, scale)
    return {"contrastive_loss": loss, "word_loss": out["classification_loss"]}


def detach_patches(model, images, tokens):
    losses = forward(model, images, tokens)
    logits = model.head(model.visual(images).detach())
    losses["word_loss"] = classification_loss(logits, tokens, model.token_weights())
    return losses


WRONG = {
    "contrastive_loss": {
        "rows alone": of_rows,
        "columns alone": lambda u, v, s: of_rows(v, u, s),
        "sum of both": lambda u, v, s: of_rows(u, v, s) + of_rows(v, u, s),
        "no scale": lambda u, v, s: contrastive_loss(u, v, 1),
        "a temperature": lambda u, v, s: contrastive_loss(u, v, 1 / s),
        "two softmaxes": of_softmax,
        "sign": lambda u, v, s: -contrastive_loss(u, v, s),
        "always four": lambda u, v, s: (of_rows(u, v, s, 4) + of_rows(v, u, s, 4)) / 2,
        "u without gradient": lambda u, v, s: contrastive_loss(u.detach(), v, s),
        "v without gradient": lambda u, v, s: contrastive_loss(u, v.detach(), s),
        "a number": lambda u, v, s: contrastive_loss(u, v, s).item(),
        "nonsense": lambda u, v, s: 1.23 * contrastive_loss(u, v, s),
    },
    "idf": {
        "padding counts": with_padding,
        "sign": lambda n, counts: -idf(n, counts),
        "log10": lambda n, counts: idf(n, counts) / 2.302585,
        "N / n": without_ones,
        "counts are changed": change_counts,
        "nonsense": lambda n, counts: 1.23 * idf(n, counts),
    },
    "label": {
        "every occurrence": lambda t, w: shares(every_occurrence(t, w)),
        "every occurrence and 0 / 0": lambda t, w: divided(every_occurrence(t, w)),
        "weights": words,
        "length 1": lambda t, w: F.normalize(words(t, w)),
        "a sum of 1 at least": clamped,
        "a share for each place": lambda t, w: shares(w[t]),
        "nonsense": lambda t, w: 1.23 * caption_label(t, w),
    },
    "classification_loss": {
        "sum over the captions": lambda x, t, w: classification_loss(x, t, w) * len(x),
        "mean of some": mean_of_some,
        "equal shares": lambda x, t, w: F.cross_entropy(x, shares(words(t, w).sign())),
        "every occurrence": lambda x, t, w: F.cross_entropy(x, shares(every_occurrence(t, w))),
        "weights": lambda x, t, w: F.cross_entropy(x, words(t, w)),
        "no softmax": lambda x, t, w: cross_entropy(caption_label(t, w), x.exp()),
        "no logarithm": lambda x, t, w: cross_entropy(caption_label(t, w), x.softmax(1).exp()),
        "two softmaxes": lambda x, t, w: classification_loss(x.softmax(dim=1), t, w),
        "columns": lambda x, t, w: cross_entropy(caption_label(t, w), x.softmax(dim=0)),
        "yes or no": yes_or_no,
        "sign": lambda x, t, w: -classification_loss(x, t, w),
        "no gradient": lambda x, t, w: classification_loss(x, t, w).detach(),
        "nonsense": lambda x, t, w: 1.23 * classification_loss(x, t, w),
    },
    "forward": {
        "no exp": lambda m, x, t: contrast(m, x, t, m.logit_scale),
        "a constant scale": lambda m, x, t: contrast(m, x, t, 1 / 0.07),
        "nothing counted": without_counting,
        "counted too late": count_late,
        "IDF of the batch": idf_of_the_batch,
        "counted twice": count_twice,
        "images without gradient": lambda m, x, t: contrast(m, x, t, change_u=torch.detach),
        "captions without gradient": lambda m, x, t: contrast(m, x, t, change_v=torch.detach),
        "patches without gradient": detach_patches,
        "a tuple": lambda m, x, t: tuple(forward(m, x, t).values()),
        "other names": lambda m, x, t: dict(zip("ab", forward(m, x, t).values())),
        "nonsense": lambda m, x, t: contrast(m, x, t, 1.23),
    },
    "my_forward": {
        "no new loss": forward,
        "a number": lambda m, x, t: {**forward(m, x, t), "my_loss": 1.0},
        "no gradient": lambda m, x, t: {**forward(m, x, t), "my_loss": torch.zeros(())},
        "a tuple": lambda m, x, t: tuple(my_forward(m, x, t).values()),
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_answer_ends_in_a_sentence_of_its_own(page, name):
    """Numbers alone are no difference, so none ends like nonsense, of which nothing is known."""
    check = block_with(f"lab.check_{name}(")
    sentences = {}
    for mistake, answer in WRONG[name].items():
        with pytest.raises(Mistake) as raised:
            exec(check, {**page, name: answer})
        sentences[mistake] = re.sub(r"[-\d.e]+", "", str(raised.value))

    for mistake, sentence in sentences.items():
        assert list(sentences.values()).count(sentence) == 1, mistake
