"""One step of train.py, on eight small pairs, for tests that compare its gradients."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from material import TINY
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train
from superclip import PAD, SuperCLIP, SuperCLIPConfig
from tokenizer import trim

N = 8  # pairs of all processes
V = 40  # vocabulary
KEEP = torch.arange(N)[:, None] + torch.arange(0, 9, 2)  # 5 of 16 patches of each pair
FLOAT32 = nullcontext()
NOT_SCALED = torch.amp.GradScaler("cpu", enabled=False)


class ForkedSuperCLIP(SuperCLIP):
    """What a fork may do: a second head, whose term looks at each pair alone. (docs/fork.md has a
    term that compares pairs, and test_fork.py tests it.)"""

    def __init__(self, config):
        super().__init__(config)
        self.second = nn.Linear(config.embed_dim, 1)

    def pairs_alone(self, *batch, **more):
        images, texts, terms = super().pairs_alone(*batch, **more)
        answers = self.second(images)
        return images, texts, {**terms, "second_loss": answers.square().mean()}

    def pairs_together(self, images, texts, terms):
        second = terms.pop("second_loss")
        losses = super().pairs_together(images, texts, terms)
        return {**losses, "second_loss": second, "loss": losses["loss"] + 0.3 * second}


def make_model_without_zeros(kind=SuperCLIP, **changes):
    """A model in training, in which no zeros are left that could hide a wrong gradient."""
    torch.manual_seed(0)
    model = kind(SuperCLIPConfig(**{**TINY, "vocab_size": V, **changes})).train()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    return model


def model_of(*options, device="cpu"):
    """The model that a run with these options starts with."""
    args = train.make_parser().parse_args(["--model=tiny", *options])
    model, _ = train.build_model(args, None, V, torch.device(device))
    return model


def make_captions(T, generator):
    """N captions (N, T), each one token shorter than the one before it."""
    captions = torch.randint(1, V - 2, (N, T), generator=generator)
    captions[:, 0] = V - 2
    for i in range(N):
        captions[i, T - 1 - i] = V - 1
        captions[i, T - i :] = PAD
    return captions


def micro_batches(size=N, local=slice(None), keep=None):
    """The pairs of `local` as a list of batches of this size, each trimmed to its longest caption,
    as the loader does it."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokens = make_captions(12, generator)
    label_tokens = make_captions(20, generator)
    batches = []
    for pairs in torch.arange(N)[local].split(size):
        batch = {"images": images[pairs], "tokens": trim(tokens[pairs])}
        batch["label_tokens"] = trim(label_tokens[pairs])
        if keep is not None:
            batch["keep"] = keep[pairs]
        batches.append(batch)
    return batches


def losses_and_gradients(model, batches, autocast=FLOAT32, scaler=NOT_SCALED):
    """A step as train.py makes it, which depends on whether there are several micro-batches.
    Returns a dict of losses, and a dict of the gradients of what is trained."""
    if len(batches) > 1:
        losses = train.grad_cache_step(model, batches, autocast, scaler)
    else:
        ddp_model = model
        if dist.is_initialized():
            ddp_model = DistributedDataParallel(model, broadcast_buffers=False)
        losses = train.plain_step(ddp_model, batches[0], autocast, scaler)
    losses = {name: x.detach() for name, x in losses.items() if name.endswith("_loss")}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return losses, gradients


def assert_same_gradients(gradients, expected, tolerance=1e-5):
    """No element differs by more than this share of the largest one, and no gradient is zero."""
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (gradients[name] - gradient).abs().max() < tolerance * largest, name
