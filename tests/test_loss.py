"""The losses: by hand, against the paper's formula, against open_clip, and at the first step."""

import math

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from material import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from superclip import (
    PAD,
    SuperCLIP,
    SuperCLIPConfig,
    classification_loss,
    contrastive_loss,
    sigmoid_loss,
)

V, START, END = 12, 10, 11
CAPTIONS = torch.tensor(
    [
        [START, 3, 5, 3, END, PAD],  # 3 twice
        [START, 5, 7, 7, 2, END],  # 7 twice; shares 5 with the first; no padding
        [START, END, PAD, PAD, PAD, PAD],  # empty
    ]
)
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small(**changes):
    return SuperCLIP(SuperCLIPConfig(**{**TINY, "vocab_size": V, **changes})).train()


def dense_label(tokens, weights):
    """The label (B, V) as the paper writes it, equations 2 and 3."""
    y = torch.zeros(len(tokens), len(weights)).scatter_(1, tokens, 1.0) * weights
    return y / y.sum(dim=1, keepdim=True).clamp_min(1e-8)


def same_value_and_gradients(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
    torch.testing.assert_close(*gradients)


class Made(TorchDispatchMode):
    """Keeps every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, (tuple, list)) else [out]
        self.tensors += [x for x in outs if isinstance(x, torch.Tensor)]
        return out


# ---- token statistics


def test_counts_and_weights_by_hand():
    model = small()
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
    model = small(context_length=8)
    model.num_captions += 1  # or each of its words were in all captions, and would weigh nothing
    tokens = torch.tensor([[START, 1, 1, 1, 1, 1, 1, END]])
    labels = torch.tensor([[START, 1, 1, 1, 1, 1, 1, 1, 1, 9, END]])
    model(IMAGES[:1], tokens, labels)["loss"].backward()
    assert model.token_counts[9].item() == 1
    bias_grad = model.head.linear.bias.grad
    assert bias_grad[9] < 0 < bias_grad[8]  # a step raises the logit of 9, and lowers that of 8


# ---- classification loss


def test_classification_loss_by_hand():
    """Token c has probability (c + 1) / 78. The mean is over three captions, one of them empty."""
    model = small()
    model.count_tokens(CAPTIONS)
    p = torch.arange(1.0, V + 1) / 78  # 1 + 2 + ... + 12 = 78
    logits = p.log().expand(3, V) + torch.tensor([[0.0], [5.0], [-5.0]])  # a shift changes nothing
    once, twice = math.log(4 / 2), math.log(4 / 3)
    first = -(once * math.log(4 / 78) + twice * math.log(6 / 78)) / (once + twice)
    second = -(once * math.log(3 / 78) + twice * math.log(6 / 78) + once * math.log(8 / 78))
    second /= once + twice + once
    loss = classification_loss(logits, CAPTIONS, model.token_weights())
    assert loss.item() == pytest.approx((first + second) / 3, rel=1e-6)


def test_classification_loss_equals_the_dense_formula():
    """Value and gradient of equation 4 on a (B, V) label. Captions repeat tokens in any order, one
    is mostly padding, and one has no word that weighs anything: it adds 0, and no NaN."""
    tokens, weights = torch.randint(1, 50, (16, 20)), torch.rand(50)
    tokens[0, 3:], tokens[1], weights[[PAD, 48, 49]] = PAD, PAD, 0
    logits = torch.randn(16, 50, requires_grad=True)
    ours = classification_loss(logits, tokens, weights)
    dense = -(dense_label(tokens, weights) * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
    same_value_and_gradients(ours, dense, [logits])


def test_no_dense_label_is_made_nor_anything_of_its_size_kept():
    """No operation makes a tensor as large as (B, V). Of that size, the backward pass keeps only
    the logits."""
    B, V, T = 8, 1000, 16
    logits = torch.randn(B, V, requires_grad=True)
    tokens, kept = torch.randint(0, V, (B, T)), []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with Made() as made, keep:
        classification_loss(logits, tokens, torch.rand(V))
    assert made.tensors and max(x.numel() for x in made.tensors) < B * V
    large = [x for x in kept if x.numel() >= B * V]
    assert large and {x.data_ptr() for x in large} == {logits.data_ptr()}


# ---- contrastive losses


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("bias", [None, 0.0, -15.0])
def test_contrastive_losses_equal_open_clips_whole_and_in_slices(scale, bias):
    """Value, and gradients of features, scale and bias. The mean over three processes that score 8
    pairs each is the loss of 24, and none of them makes the (24, 24) similarities of all."""
    images, texts = F.normalize(torch.randn(2, 24, 32), dim=-1)
    inputs = [images, texts, torch.tensor(scale)] + ([] if bias is None else [torch.tensor(bias)])
    inputs = [x.requires_grad_() for x in inputs]
    ours, other = contrastive_loss, open_clip.loss.ClipLoss()
    if bias is not None:
        ours, other = sigmoid_loss, open_clip.loss.SigLipLoss()
    same_value_and_gradients(ours(*inputs), other(*inputs), inputs)
    with Made() as made:
        parts = [ours(*inputs, local=slice(i, i + 8)) for i in (0, 8, 16)]
    same_value_and_gradients(torch.stack(parts).mean(), other(*inputs), inputs)
    shapes = {tuple(x.shape) for x in made.tensors}
    assert (8, 24) in shapes and (24, 24) not in shapes


# ---- the whole model's loss


@pytest.mark.parametrize("cls_weight", [0.4, 1.0])
def test_losses_at_the_first_step_are_those_that_theory_gives(cls_weight):
    """Contrastive: ln B. Classification: ln V + 1/2 = 11.31, because the logits have variance 1."""
    model = small(vocab_size=49408, embed_dim=512, cls_weight=cls_weight)
    tokens = torch.randint(1, 49000, (64, 20))
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    out = model(torch.randn(64, 3, 16, 16), tokens)
    assert out["contrastive_loss"].item() == pytest.approx(math.log(64), abs=0.5)
    assert out["classification_loss"].item() == pytest.approx(math.log(49408) + 0.5, abs=0.1)
    total = out["contrastive_loss"] + cls_weight * out["classification_loss"]
    torch.testing.assert_close(out["loss"], total)


def test_one_batch_can_be_overfitted():
    """The contrastive loss goes to 0, the classification loss to the entropy of its labels."""
    V, B = 40, 8
    model = small(vocab_size=V, embed_dim=64, patch_size=8)
    images, tokens = torch.randn(B, 3, 16, 16), torch.randint(1, V - 2, (B, 7))
    tokens[:, 0], tokens[:, -1] = V - 2, V - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    for _ in range(60):
        optimizer.zero_grad()
        out = model(images, tokens)
        out["loss"].backward()
        optimizer.step()
    label = dense_label(tokens, model.token_weights())
    entropy = -torch.xlogy(label, label).sum(dim=1).mean().item()
    assert out["contrastive_loss"].item() < 0.02
    assert entropy <= out["classification_loss"].item() < entropy + 0.05
    top = model.eval().class_logits(images).topk(3).indices
    assert label.gather(1, top).min() > 0  # words of the caption
