"""The label of a caption has V entries, nearly all of them 0. It is never made: not kept for the
backward pass, and not for a moment."""

import pytest
import torch
import torch.nn.functional as F
from material import make_model
from torch.utils._python_dispatch import TorchDispatchMode

from superclip import classification_loss

B, T, V = 8, 12, 5000


class Watch(TorchDispatchMode):
    """Notes each operation that makes a tensor of B x V numbers or more, whatever its shape and
    dtype. One that returns a view of its input, or the input itself, makes none. What the kernel of
    an operation such as logsumexp needs while it runs is not seen, and no label is in it."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for alias, tensor in zip(operation._schema.returns, self.tensors_in(result)):
            if alias.alias_info is None and tensor.numel() >= B * V:
                self.made.append(f"{operation.__name__} {tuple(tensor.shape)}")
        return result

    @staticmethod
    def tensors_in(result):
        results = result if isinstance(result, (tuple, list)) else [result]
        return [x for x in results if isinstance(x, torch.Tensor)]


@pytest.fixture
def batch():
    """Logits (B, V), captions (B, T) and the weights of V tokens."""
    logits = torch.randn(B, V, requires_grad=True)
    captions = torch.randint(1, V - 2, (B, T))
    return logits, captions, torch.rand(V)


def test_the_loss_makes_nothing_of_the_size_of_its_logits(batch):
    with Watch() as watch:
        classification_loss(*batch)

    assert watch.made == []


def test_logits_of_16_bits_are_copied_once_in_float32(batch):
    logits, captions, weights = batch

    with Watch() as watch:
        classification_loss(logits.bfloat16(), captions, weights)

    assert watch.made == 2 * [f"_to_copy.default {(B, V)}"]  # the first one is of this test


def test_of_a_whole_forward_pass_the_logits_alone_are_so_large():
    """The counts of a training step and the weights of words are (V,)."""
    model = make_model(vocab_size=V).train()
    images = torch.randint(0, 256, (B, 3, 16, 16), dtype=torch.uint8)
    captions = torch.randint(1, V - 2, (B, T))

    with Watch() as watch:
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
    with Watch() as watch:
        loss(*batch)

    assert len(watch.made) > 1
