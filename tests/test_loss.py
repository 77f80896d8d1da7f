"""The losses: counts and weights by hand, the formula of the paper, and open_clip's losses."""

import math

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from material import make_model

from superclip import PAD, classification_loss, contrastive_loss, sigmoid_loss

V, START, END = 12, 10, 11
CAPTIONS = torch.tensor(
    [
        [START, 3, 5, 3, END, PAD],  # 3 twice
        [START, 5, 7, 7, 2, END],  # 7 twice; shares 5 with the first; no padding
        [START, END, PAD, PAD, PAD, PAD],  # empty
    ]
)
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def same_value_and_gradients(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
    torch.testing.assert_close(*gradients)


def keep_in(tensors):
    """A context that adds to the list `tensors` what the backward pass will need."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t)


def test_counts_and_weights_by_hand():
    model = make_model(vocab_size=V).train()
    model(IMAGES, CAPTIONS)
    assert model.num_captions.item() == 3
    # of captions, not of tokens; of padding never; start and end last
    assert model.token_counts.tolist() == [0, 0, 1, 1, 0, 2, 0, 1, 0, 0, 3, 3]
    unseen, once, twice = math.log(4 / 1), math.log(4 / 2), math.log(4 / 3)
    expected = [0, unseen, once, once, unseen, twice, unseen, once, unseen, unseen, 0, 0]
    torch.testing.assert_close(model.token_weights(), torch.tensor(expected))
    model.token_counts.zero_()  # start, end and padding weigh nothing even where they are rare
    unseen = torch.full((V,), math.log(4)).index_fill(0, torch.tensor([PAD, START, END]), 0)
    torch.testing.assert_close(model.token_weights(), unseen)
    # Evaluation counts nothing. A second batch is added exactly, also where float32 stops.
    model.eval()(IMAGES, CAPTIONS)
    model.token_counts += 2**24
    model.train()(IMAGES, CAPTIONS)
    assert model.num_captions.item() == 6 and model.token_counts[3].item() == 2**24 + 1
    assert model.to(torch.bfloat16).token_counts.dtype == torch.int64


def test_a_word_beyond_the_context_counts_and_is_learned():
    """Word 9 stands behind the 8 tokens of the context, in the caption for the label alone."""
    model = make_model(vocab_size=V, context_length=8).train()
    model.num_captions += 1  # or each of its words were in all captions, and would weigh nothing
    tokens = torch.tensor([[START, 1, 1, 1, 1, 1, 1, END]])
    labels = torch.tensor([[START, 1, 1, 1, 1, 1, 1, 1, 1, 9, END]])
    model(IMAGES[:1], tokens, labels)["loss"].backward()
    assert model.token_counts[9].item() == 1
    bias_grad = model.head.linear.bias.grad
    assert bias_grad[9] < 0 < bias_grad[8]  # a step raises the logit of 9, and lowers that of 8


def test_classification_loss_equals_the_dense_formula():
    """Value and gradient of equations 2 to 4 on a (B, V) label. Captions repeat tokens in any
    order, one is mostly padding, and one has no word that weighs anything: it adds 0, and no NaN.
    """
    tokens, weights = torch.randint(1, 50, (16, 20)), torch.rand(50)
    tokens[0, 3:], tokens[1], weights[[PAD, 48, 49]] = PAD, PAD, 0
    logits = torch.randn(16, 50, requires_grad=True)
    ours = classification_loss(logits, tokens, weights)
    label = F.normalize(torch.zeros(16, 50).scatter_(1, tokens, weights[tokens]), p=1, dim=1)
    same_value_and_gradients(ours, F.cross_entropy(logits, label), [logits])


def test_a_sigmoid_loss_starts_with_siglips_scale_and_bias():
    model = make_model(loss="sigmoid")  # so that most answers are no
    assert (model.logit_scale.exp().item(), model.logit_bias.item()) == pytest.approx((10, -10))


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("bias", [None, 0.0, -15.0])
def test_contrastive_losses_equal_open_clips_whole_and_in_slices(scale, bias):
    """Value, and gradients of features, scale and bias. The mean over three processes that score 8
    pairs each is the loss of 24, and none of them keeps (24, 24) similarities of all."""
    images, texts = F.normalize(torch.randn(2, 24, 32), dim=-1)
    inputs = [images, texts, torch.tensor(scale)] + ([] if bias is None else [torch.tensor(bias)])
    inputs = [x.requires_grad_() for x in inputs]
    ours, other = contrastive_loss, open_clip.loss.ClipLoss()
    if bias is not None:
        ours, other = sigmoid_loss, open_clip.loss.SigLipLoss()
    same_value_and_gradients(ours(*inputs), other(*inputs), inputs)
    with keep_in(kept := []):
        parts = [ours(*inputs, local=slice(i, i + 8)) for i in (0, 8, 16)]
    same_value_and_gradients(torch.stack(parts).mean(), other(*inputs), inputs)
    shapes = {tuple(x.shape) for x in kept}
    assert (8, 24) in shapes and (24, 24) not in shapes
