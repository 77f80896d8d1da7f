"""Test the losses. Counts, weights and labels are worked out by hand, and contrastive losses equal
open_clip's. test_authors.py compares the classification loss with the authors', and test_pages.py
compares it with the formula in the README."""

import math

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from material import cases, small_model

from superclip import PAD, classification_loss, contrastive_loss, idf, sigmoid_loss

V = 12
START = 10
END = 11
# The words are the tokens 1 to 9.
CAPTIONS = torch.tensor(
    [
        [START, 3, 5, 3, END, PAD],  # token 3 twice
        [START, 5, 9, 9, 1, END],  # token 9 twice, token 5 as in the first caption, no padding
        [START, END, PAD, PAD, PAD, PAD],  # empty
    ]
)
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# ---- how often each word was in a caption


def test_a_training_counts_each_word_of_a_caption_once():
    """The counts are exact even where float32 stops counting, and in a model that was turned into
    bfloat16 and back, and in a large batch, which is counted in parts. Padding, start and end are
    no words. An evaluation counts nothing."""
    model = small_model(vocab_size=V).to(torch.bfloat16).float()
    model.token_counts += 2**24

    model.eval()(IMAGES, CAPTIONS)
    model.train()(IMAGES, CAPTIONS)
    model.count_tokens(CAPTIONS.repeat(699, 1))

    assert model.num_captions.item() == 2100
    counts = (model.token_counts - 2**24) / 700
    assert counts.tolist() == [0, 1, 0, 1, 0, 2, 0, 0, 0, 1, 0, 0]


# ---- the weight of each word, and the label of a caption


def test_the_weight_of_a_word_by_hand():
    """The weight is `log((3 + 1) / (n + 1))` for a word that was in n of 3 captions."""
    weights = idf(torch.tensor(3), torch.tensor([0, 1, 2, 3]))

    assert weights.tolist() == pytest.approx([math.log(4), math.log(2), math.log(4 / 3), 0])


def test_the_label_of_a_caption_by_hand():
    """The label is a set: token 3 occurs twice in the first caption, but has one share. The shares
    of a caption add up to 1, even if the weights of its words do not. Padding, start and end have
    no share, although they have weight here."""
    weights = torch.tensor([9, 4, 0, 1, 0, 3, 0, 0, 0, 1, 9, 9]) / 16
    logits = torch.zeros(3, V, requires_grad=True)

    classification_loss(logits, CAPTIONS, weights).backward()

    # The gradient is the prediction of the head, 1/V for each word, minus the label.
    is_labelled = torch.tensor([[1.0], [1.0], [0.0]])
    assert (is_labelled / V - 3 * logits.grad).round(decimals=6).tolist() == [
        [0, 0, 0, 0.25, 0, 0.75, 0, 0, 0, 0, 0, 0],
        [0, 0.5, 0, 0, 0, 0.375, 0, 0, 0, 0.125, 0, 0],
        [0] * V,
    ]


# ---- the classification loss


def test_logits_of_16_bits_are_summed_in_float32():
    logits = torch.randn(3, V).bfloat16()

    loss = classification_loss(logits, CAPTIONS, torch.ones(V))

    assert torch.equal(loss, classification_loss(logits.float(), CAPTIONS, torch.ones(V)))


def test_the_words_are_those_of_the_label_caption():
    """The label captions are longer than the context. The captions themselves have no words."""
    model = small_model(vocab_size=V, context_length=4).train()
    tokens = CAPTIONS[[2, 2, 2], :4]

    out = model(IMAGES, tokens, CAPTIONS)

    logits = model.word_logits(IMAGES)
    weights = idf(model.num_captions, model.token_counts)
    expected = classification_loss(logits, CAPTIONS, weights)
    assert model.token_counts[5] == 2
    assert out["classification_loss"] == expected


def test_the_loss_of_a_model_by_hand():
    """A head without weights gives equal logits for all V tokens, and a scale of 0 gives equal
    logits for all pairs. The third caption is empty, so its classification loss is 0."""
    model = small_model(vocab_size=V, cls_weight=0.5).train()
    torch.nn.init.zeros_(model.head.linear.weight)
    torch.nn.init.constant_(model.logit_scale, -math.inf)

    loss = model(IMAGES, CAPTIONS)["loss"]

    assert loss.item() == pytest.approx(math.log(3) + 0.5 * (2 / 3 * math.log(V)))


# ---- the losses that compare pairs

LOSSES = {  # case -> our loss, open_clip's loss, and a list of the bias if there is one
    "softmax": (contrastive_loss, open_clip.loss.ClipLoss(), []),
    "sigmoid": (sigmoid_loss, open_clip.loss.SigLipLoss(), [-3.0]),
}


def make_inputs(scale, bias):
    """Return the features of 24 images and of their texts, the scale, and the bias if there is one.
    All of them require gradients."""
    images, texts = F.normalize(torch.randn(2, 24, 32), dim=-1)
    inputs = [images, texts, torch.tensor(scale), *map(torch.tensor, bias)]
    return [x.requires_grad_() for x in inputs]


@pytest.mark.parametrize("scale", [1.0, 100.0])
@cases("ours, theirs, bias", LOSSES)
def test_the_loss_equals_open_clips(ours, theirs, bias, scale):
    """The value is equal, and so are the gradients of features, scale and bias."""
    inputs = make_inputs(scale, bias)

    loss, expected = ours(*inputs), theirs(*inputs)

    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs))


@cases("ours, _, bias", LOSSES)
def test_under_bfloat16_the_loss_stays_in_float32(ours, _, bias):
    """Near 100, the largest logit, the numbers of bfloat16 are 0.5 apart."""
    inputs = make_inputs(100.0, bias)

    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(*inputs)

    assert torch.equal(loss, ours(*inputs))


def test_a_sigmoid_loss_starts_with_siglips_scale_and_bias():
    """With these values most answers are "no" at first."""
    images, texts, _ = make_inputs(1.0, [])

    loss = small_model(loss="sigmoid").pair_loss(images, texts)

    expected = open_clip.loss.SigLipLoss()(images, texts, logit_scale=10.0, logit_bias=-10.0)
    torch.testing.assert_close(loss, expected)
