"""The label of a caption has V entries, nearly all of them 0. It is never made: not kept for the
backward pass, and not for a moment."""

import pytest
import torch
import torch.nn.functional as F
from material import make_model
from watch import Watch

from superclip import classification_loss

B, T, V = 8, 12, 5000


@pytest.fixture
def batch():
    """Logits (B, V), captions (B, T) and the weights of V tokens."""
    logits = torch.randn(B, V, requires_grad=True)
    captions = torch.randint(1, V - 2, (B, T))
    return logits, captions, torch.rand(V)


def test_the_loss_makes_nothing_of_the_size_of_its_logits(batch):
    with Watch(B * V) as watch:
        classification_loss(*batch)

    assert watch.made == []


def test_logits_of_16_bits_are_copied_once_in_float32(batch):
    logits, captions, weights = batch

    with Watch(B * V) as watch:
        classification_loss(logits.bfloat16(), captions, weights)

    assert watch.made == 2 * [f"_to_copy.default {(B, V)}"]  # the first one is of this test


def test_of_a_whole_forward_pass_the_logits_alone_are_so_large():
    """The counts of a training step and the weights of words are (V,)."""
    model = make_model(vocab_size=V).train()
    images = torch.randint(0, 256, (B, 3, 16, 16), dtype=torch.uint8)
    captions = torch.randint(1, V - 2, (B, T))

    with Watch(B * V) as watch:
        model(images, captions)

    assert watch.made == [f"addmm.default {(B, V)}"]


def dense(logits, captions, weights):
    """The paper's formula, with a label (B, V)."""
    label = torch.zeros_like(logits).scatter(1, captions, weights[captions])
    return F.cross_entropy(logits, F.normalize(label, p=1, dim=1))


def gathered(logits, captions, weights):
    """A label (B, V) that is thrown away as soon as the shares of words are gathered from it."""
    label = F.one_hot(captions, V).amax(dim=1) * weights
    shares = F.normalize(label, p=1, dim=1).gather(1, captions)
    return -(shares * logits.log_softmax(dim=1).gather(1, captions)).sum(dim=1).mean()


@pytest.mark.parametrize("loss", [dense, gathered])
def test_the_watch_sees_a_label_that_is_made(batch, loss):
    with Watch(B * V) as watch:
        loss(*batch)

    assert len(watch.made) > 1
