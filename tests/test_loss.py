"""The losses: by hand, against the paper's formula, against open_clip, and at the first step."""

import math

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
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


def small(**changes):
    shape = dict(image_size=16, patch_size=8, vision_width=64, vision_layers=1, text_width=64)
    shape |= dict(text_layers=1, embed_dim=16, context_length=8, vocab_size=V)
    return SuperCLIP(SuperCLIPConfig(**{**shape, **changes}))


def dense_label(tokens, weights):
    """The label (B, V) as the paper writes it, equations 2 and 3."""
    y = torch.zeros(len(tokens), len(weights)).scatter_(1, tokens, 1.0) * weights
    return y / y.sum(dim=1, keepdim=True).clamp_min(1e-8)


# -----------------------------------------------------------------------------
# Token statistics


def test_counts_and_weights_by_hand():
    model = small().train()
    model(torch.rand(3, 3, 16, 16), CAPTIONS)
    assert model.num_captions.item() == 3
    # of captions, not of tokens; padding first, start and end last
    assert model.token_counts.tolist() == [2, 0, 1, 1, 0, 2, 0, 1, 0, 0, 3, 3]
    unseen, once, twice = math.log(4 / 1), math.log(4 / 2), math.log(4 / 3)
    expected = [0, unseen, once, once, unseen, twice, unseen, once, unseen, unseen, 0, 0]
    torch.testing.assert_close(model.token_weights(), torch.tensor(expected))


def test_start_end_and_padding_weigh_nothing_even_where_they_are_rare():
    model = small()
    model.num_captions += 100
    expected = torch.full((V,), math.log(101)).index_fill(0, torch.tensor([PAD, START, END]), 0)
    torch.testing.assert_close(model.token_weights(), expected)


def test_counts_are_integers_that_grow_in_training_mode_only():
    """They go on where float32 stops at 2**24, and stay integers in a bfloat16 model."""
    model = small().train()
    for _ in range(2):
        model.count_tokens(CAPTIONS)
    assert model.num_captions.item() == 6 and model.token_counts[5].item() == 4
    assert model.num_captions.dtype == model.token_counts.dtype == torch.int64
    before = model.token_counts.clone()
    model.eval()(torch.rand(3, 3, 16, 16), CAPTIONS)
    assert model.num_captions.item() == 6 and torch.equal(model.token_counts, before)
    model.token_counts.fill_(2**24)  # where float32 stops counting
    model.count_tokens(CAPTIONS)
    assert model.token_counts[5].item() == 2**24 + 2
    bf16 = small().to(torch.bfloat16)
    assert bf16.token_counts.dtype == torch.int64


def test_a_word_beyond_the_context_counts_and_is_learned():
    """Token 9 of a caption of 11 tokens, with a context of 8: its count, and the gradient of its
    logit's bias."""
    model = small(context_length=8).train()
    tokens = torch.tensor([[START, 1, 1, 1, 1, 1, 1, END]])
    labels = torch.tensor([[START, 1, 1, 1, 1, 1, 1, 1, 1, 9, END]])
    model(torch.rand(1, 3, 16, 16), tokens, labels)["loss"].backward()
    assert model.token_counts[9].item() == 1
    assert model.head.linear.bias.grad[9] == 0  # a word of every caption weighs log(1)
    model.num_captions += 1
    model.zero_grad()
    model.eval()(torch.rand(1, 3, 16, 16), tokens, labels)["loss"].backward()
    assert model.head.linear.bias.grad[9] < 0  # the gradient raises its logit
    assert model.head.linear.bias.grad[8] > 0


# -----------------------------------------------------------------------------
# Classification loss


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


def test_order_repetition_and_padding_do_not_matter():
    weights = torch.rand(V).index_fill(0, torch.tensor([PAD, START, END]), 0)
    logits = torch.randn(3, V)
    loss = classification_loss(logits, CAPTIONS, weights)
    other = torch.tensor(
        [
            [START, 5, 3, END, PAD, PAD, PAD, PAD, PAD],
            [START, 2, 7, 5, 5, 2, 7, 2, END],
            [START, END, PAD, PAD, PAD, PAD, PAD, PAD, PAD],
        ]
    )
    torch.testing.assert_close(classification_loss(logits, other, weights), loss)


def test_captions_without_weight_give_zero_loss_and_zero_gradient():
    logits = torch.randn(3, V, requires_grad=True)
    loss = classification_loss(logits, CAPTIONS, torch.zeros(V))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max().item() == 0


def test_value_and_gradient_equal_those_of_the_dense_formula():
    """Equation 4 on a (B, V) label, and its gradient for the logits."""
    tokens, weights = torch.randint(0, 50, (16, 20)), torch.rand(50)
    logits = torch.randn(16, 50, requires_grad=True)
    ours = classification_loss(logits, tokens, weights)
    dense = -(dense_label(tokens, weights) * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(ours, dense)
    (our_grad,) = torch.autograd.grad(ours, logits)
    (dense_grad,) = torch.autograd.grad(dense, logits)
    torch.testing.assert_close(our_grad, dense_grad)


class Made(TorchDispatchMode):
    """Keeps every tensor that an operation returns, with the name of the operation."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, (tuple, list)) else [out]
        self.tensors += [(func.__name__, t) for t in outs if isinstance(t, torch.Tensor)]
        return out


def test_no_dense_label_is_made_nor_anything_of_its_size_kept():
    """No operation makes a tensor as large as (B, V). Of that size, the backward pass keeps only
    the logits."""
    B, V, T = 8, 1000, 16
    logits = torch.randn(B, V, requires_grad=True)
    tokens, kept = torch.randint(0, V, (B, T)), []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with Made() as made, keep:
        classification_loss(logits, tokens, torch.rand(V))
    assert made.tensors and [name for name, t in made.tensors if t.numel() >= B * V] == []
    large = [t for t in kept if t.numel() >= B * V]
    assert large and {t.data_ptr() for t in large} == {logits.data_ptr()}


# -----------------------------------------------------------------------------
# Contrastive losses


def features(B=24, E=32):
    images, texts = F.normalize(torch.randn(2, B, E), dim=-1)
    return images.requires_grad_(), texts.requires_grad_()


def same_value_and_gradients(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_contrastive_loss_equals_open_clips(scale):
    inputs = (*features(), torch.tensor(scale, requires_grad=True))
    theirs = open_clip.loss.ClipLoss()(*inputs)
    same_value_and_gradients(contrastive_loss(*inputs), theirs, inputs)


@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (100.0, -15.0), (1.0, 0.0)])
def test_sigmoid_loss_equals_open_clips(scale, bias):
    scale, bias = torch.tensor(scale, requires_grad=True), torch.tensor(bias, requires_grad=True)
    inputs = (*features(), scale, bias)
    theirs = open_clip.loss.SigLipLoss()(*inputs)
    same_value_and_gradients(sigmoid_loss(*inputs), theirs, inputs)


def loss_and_inputs(loss):
    """A contrastive loss and its inputs for 24 pairs, all of them with gradients."""
    if loss == "softmax":
        return contrastive_loss, (*features(), torch.tensor(14.3, requires_grad=True))
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-8.0, requires_grad=True)
    return sigmoid_loss, (*features(), scale, bias)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_mean_over_slices_of_rows_is_the_loss_of_the_whole_batch(loss):
    """Value, and gradients of features, scale and bias: three processes with 8 rows each against
    one with 24."""
    function, inputs = loss_and_inputs(loss)
    parts = [function(*inputs, rows=slice(i, i + 8)) for i in (0, 8, 16)]
    assert len({part.item() for part in parts}) == 3
    same_value_and_gradients(torch.stack(parts).mean(), function(*inputs), inputs)


def test_unrelated_features_give_ln_B():
    """Random directions: similarities have variance 1 / E, which adds scale^2 / 2E to ln B. Equal
    features: ln B."""
    for scale in (1.0, 1 / 0.07):
        loss = contrastive_loss(*features(B=64, E=2048), torch.tensor(scale))
        assert loss.item() == pytest.approx(math.log(64) + scale**2 / 4096, abs=0.03)
    same = F.normalize(torch.ones(64, 8), dim=-1)
    assert contrastive_loss(same, same, 100.0).item() == pytest.approx(math.log(64), rel=1e-6)


def test_perfect_features_give_zero_at_the_largest_scale():
    eye = torch.eye(16)
    assert contrastive_loss(eye, eye, 100.0).item() < 1e-6
    assert sigmoid_loss(eye, eye, 100.0, -50.0).item() < 1e-6
    assert contrastive_loss(eye, eye.roll(1, 0), 100.0).item() == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_contrastive_logits_are_fp32_under_autocast(loss):
    """All matrix products are float32, and the loss equals one computed in float64. In bfloat16,
    logits near 100 are 0.5 apart."""
    images, texts = F.normalize(torch.randn(2, 32, 64) * 0.05 + torch.randn(64), dim=-1)
    extra = (torch.tensor(100.0),) if loss == "softmax" else (torch.tensor(100.0), -95.0)
    function = contrastive_loss if loss == "softmax" else sigmoid_loss
    with torch.autocast("cpu", dtype=torch.bfloat16), Made() as made:
        value = function(images, texts, *extra)
    products = [t.dtype for name, t in made.tensors if name.startswith(("mm", "addmm", "matmul"))]
    assert products and set(products) == {torch.float32}
    logits = 100 * images.double() @ texts.double().T
    if loss == "softmax":
        target = torch.arange(32)
        exact = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    else:
        signs = 2 * torch.eye(32) - 1
        exact = -F.logsigmoid(signs * (logits - 95)).sum() / 32
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


# -----------------------------------------------------------------------------
# The whole model's loss


def test_losses_at_the_first_step_are_those_that_theory_gives():
    """Contrastive: ln B. Classification: ln V + 1/2 = 11.31, since the logits have variance 1."""
    model = small(vocab_size=49408, context_length=77, embed_dim=512)
    tokens = torch.randint(1, 49000, (64, 20))
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    out = model(torch.randn(64, 3, 16, 16), tokens)
    assert out["contrastive_loss"].item() == pytest.approx(math.log(64), abs=0.5)
    assert out["classification_loss"].item() == pytest.approx(math.log(49408) + 0.5, abs=0.1)
    assert out["loss"].item() == pytest.approx(
        out["contrastive_loss"].item() + out["classification_loss"].item()
    )


def test_one_batch_can_be_overfitted():
    """The contrastive loss goes to 0, the classification loss to the entropy of its labels."""
    V, B = 40, 8
    model = small(vocab_size=V, embed_dim=64).train()
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
    assert all(label[i, top[i]].min() > 0 for i in range(B))  # words of the caption


def test_cls_weight_scales_the_word_loss_and_nothing_else():
    images = torch.rand(3, 3, 16, 16)
    for weight in (0.4, 1.0, 1.6):
        out = small(cls_weight=weight)(images, CAPTIONS)
        expected = out["contrastive_loss"] + weight * out["classification_loss"]
        torch.testing.assert_close(out["loss"], expected)
