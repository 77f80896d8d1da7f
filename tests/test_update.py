"""What follows the gradients of a step: the update, and the patches that a step leaves out."""

import math

import pytest
import torch
from one_step import (
    NOT_SCALED,
    N,
    losses_and_gradients,
    make_model_without_zeros,
    micro_batches,
    write_pairs,
)

import train

# ---- the update


def test_weight_decay_is_for_matrices_alone():
    model = make_model_without_zeros(loss="sigmoid")

    groups = train.make_optimizer(model, 1.0, 1.0, 0.3).param_groups

    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    vectors = ("bias", "class_embedding", "logit_scale")
    for name, p in model.named_parameters():
        is_vector = name.endswith(vectors) or "ln" in name
        assert decay[p] == (0.0 if is_vector else 0.3), name


def test_the_optimizer_has_clips_betas_and_epsilon():
    groups = train.make_optimizer(make_model_without_zeros(), 1.0, 1.0, 0.3).param_groups

    assert {(*group["betas"], group["eps"]) for group in groups} == {(0.9, 0.98, 1e-6)}


def test_an_update_clips_the_gradient_to_length_1():
    """Adam's first moment is a tenth of the gradient."""
    model = make_model_without_zeros()
    optimizer = train.make_optimizer(model, 1e-4, 1e-4, 0.0)
    losses_and_gradients(model, micro_batches())

    norm = train.update(model, optimizer, NOT_SCALED, 1.0)

    moments = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
    assert norm > 1
    assert moments.norm().item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_an_update_has_the_factor_of_the_peak_rates_and_the_head_one_of_its_own(factor):
    """Adam's first step is as long as the rate."""
    model = make_model_without_zeros()
    optimizer = train.make_optimizer(model, 1e-4, 1e-2, 0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses_and_gradients(model, micro_batches())

    train.update(model, optimizer, NOT_SCALED, factor)

    for name, p in model.named_parameters():
        step = (p - before[name]).abs().max().item()
        rate = factor * (1e-2 if name.startswith("head.") else 1e-4)
        assert step == pytest.approx(rate, rel=0.05), name


@pytest.mark.parametrize("start, end", [(5.0, math.log(100)), (-1.0, 0.0)])
def test_an_update_keeps_the_logit_scale_between_1_and_100(start, end):
    model = make_model_without_zeros()
    model.logit_scale.data.fill_(start)
    losses_and_gradients(model, micro_batches())

    train.update(model, train.make_optimizer(model, 1e-4, 1e-4, 0.0), NOT_SCALED, 1.0)

    assert model.logit_scale.item() == pytest.approx(end)


def test_an_update_leaves_no_gradient_behind():
    model = make_model_without_zeros()
    losses_and_gradients(model, micro_batches())

    train.update(model, train.make_optimizer(model, 1e-4, 1e-4, 0.0), NOT_SCALED, 1.0)

    assert all(p.grad is None for p in model.parameters())


# ---- dropped patches


def test_each_image_keeps_patches_of_its_own():
    """A quarter of 16 patches, each of them once."""
    keep = train.patches_to_keep(0.75, 4, N, seed=3, step=5, device="cpu")

    assert keep.shape == (N, 4)
    assert all(len({*row}) == 4 for row in keep.tolist())
    assert len({*map(tuple, keep.tolist())}) > 1
    assert 0 <= keep.min() and keep.max() < 16


def test_kept_patches_are_a_function_of_seed_and_step():
    def keep(seed, step):
        return train.patches_to_keep(0.75, 4, N, seed, step, "cpu")

    assert torch.equal(keep(3, 5), keep(3, 5))
    assert not torch.equal(keep(3, 5), keep(3, 6))
    assert not torch.equal(keep(3, 5), keep(4, 5))


def test_a_micro_batch_keeps_the_patches_of_its_own_images(tmp_path):
    """Of the last 4 of 8 images, two at a time, in two steps."""
    pairs = write_pairs(tmp_path / "0.tar")
    options = ["--batch_size=8", "--patch_dropout=0.5", "--workers=0", "--seed=3"]
    args = train.make_parser().parse_args(options)

    batches = train.load_batches(args, pairs, 4, slice(4, 8), 2, 5, 7, torch.device("cpu"))

    keep = torch.cat([batch["keep"] for batch, _ in batches])
    steps = [train.patches_to_keep(0.5, 4, 8, 3, step, "cpu")[4:] for step in (5, 6)]
    assert torch.equal(keep, torch.cat(steps))


def test_without_patch_dropout_all_are_kept():
    assert train.patches_to_keep(0.0, 4, N, 3, 5, "cpu") is None
