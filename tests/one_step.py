"""One step of train.py, on eight small pairs, for tests that compare its gradients."""

from contextlib import nullcontext

import torch
from material import TINY, TOKENIZER, write_good_shard

import train
from data import Pairs, trim
from superclip import PAD, SuperCLIP, SuperCLIPConfig

N = 8  # pairs of all processes
P = 16  # patches
V = 40  # vocabulary
KEEP = torch.rand(N, P, generator=torch.Generator().manual_seed(2)).argsort(dim=1)[:, :5]
FLOAT32 = nullcontext()
NOT_SCALED = torch.amp.GradScaler("cpu", enabled=False)


class ForkedSuperCLIP(SuperCLIP):
    """What a fork may do: a third term, which asks the patches of an image to agree less."""

    def terms_of_each_pair(self, image_tokens, label_tokens):
        terms = super().terms_of_each_pair(image_tokens, label_tokens)
        mean_patch = image_tokens[:, 1:].float().mean(dim=1)
        return {**terms, "agreement_loss": mean_patch.square().sum(dim=1).mean()}

    def total_loss(self, terms):
        ours = {name: x for name, x in terms.items() if name != "agreement_loss"}
        return super().total_loss(ours) + 0.3 * terms.get("agreement_loss", 0.0)


def make_model_without_zeros(kind=SuperCLIP, **changes):
    """A model in training, in which no zeros are left that could hide a wrong gradient."""
    torch.manual_seed(0)
    model = kind(SuperCLIPConfig(**{**TINY, "vocab_size": V, **changes})).train()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    return model


def make_captions(T, generator):
    """N captions (N, T), each one token shorter than the one before it."""
    captions = torch.randint(1, V - 2, (N, T), generator=generator)
    for i, caption in enumerate(captions):
        caption[0] = V - 2
        caption[T - 1 - i] = V - 1
        caption[T - i :] = PAD
    return captions


def micro_batches(size=N, local=slice(None), keep=None, T=12, T_label=20):
    """An iterator over the pairs of `local`, `size` at a time, each trimmed to its longest caption,
    as the loader does it. T, T_label: length of the longest caption, and label, of all."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokens = make_captions(T, generator)
    label_tokens = make_captions(T_label, generator)
    for pairs in torch.arange(N)[local].split(size):
        yield {
            "images": images[pairs],
            "tokens": trim(tokens[pairs]),
            "label_tokens": trim(label_tokens[pairs]),
            "keep": None if keep is None else keep[pairs],
        }


def write_pairs(path):
    """Sixteen pairs, which lie in a shard."""
    return Pairs([write_good_shard(path, 16)], TOKENIZER, 16)


def losses_and_gradients(model, batches, micro=False, autocast=FLOAT32, scaler=NOT_SCALED):
    """A step as train.py makes it. Returns a dict of losses, and a dict of gradients."""
    if micro:
        losses = train.grad_cache_step(model, batches, autocast, scaler)
    else:
        losses = train.plain_step(train.distribute(model), next(batches), autocast, scaler)
    losses = {name: x.detach() for name, x in losses.items() if name.endswith("_loss")}
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(gradients, expected, tolerance=1e-5):
    """No element differs by more than this share of the largest one, and no gradient is zero."""
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (gradients[name] - gradient).abs().max() < tolerance * largest, name
