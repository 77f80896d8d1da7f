"""What follows the gradients of a step: the update."""

import math

import pytest
import torch
from one_step import NOT_SCALED, losses_and_gradients, make_model_without_zeros, micro_batches
from torch.nn.utils import get_total_norm

import train


def updated(model, scaler=NOT_SCALED, factor=1.0):
    """The model after a step, its optimizer, and the norm of the gradient."""
    optimizer = train.make_optimizer(model, 1e-4, 0.0)
    losses_and_gradients(model, micro_batches(), scaler=scaler)
    norm = train.update(model, optimizer, scaler, factor)
    return model, optimizer, norm


def test_weight_decay_is_for_matrices_alone():
    model = make_model_without_zeros(loss="sigmoid")

    groups = train.make_optimizer(model, 1.0, 0.3).param_groups

    assert {(*group["betas"], group["eps"]) for group in groups} == {(0.9, 0.98, 1e-6)}  # CLIP's
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {p: 0.3 if p.ndim >= 2 else 0.0 for p in model.parameters()}


def test_an_update_clips_the_gradient_to_length_1():
    """Without the loss scale of float16. Adam's first moment is a tenth of the gradient."""
    _, gradients = losses_and_gradients(make_model_without_zeros(), micro_batches())
    scaler = torch.amp.GradScaler("cpu", 1024)

    _, optimizer, norm = updated(make_model_without_zeros(), scaler)

    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert norm.item() == pytest.approx(get_total_norm(gradients.values()).item(), rel=1e-5)
    assert get_total_norm(moments).item() == pytest.approx(0.1, rel=1e-4)


def test_each_parameter_has_the_factor_of_the_peak_rate():
    """Adam's first step is as long as the rate, here a quarter of the peak."""
    before = dict(make_model_without_zeros().named_parameters())

    model, _, _ = updated(make_model_without_zeros(), factor=0.25)

    for name, p in model.named_parameters():
        step = (p - before[name]).abs().max().item()
        assert step == pytest.approx(0.25e-4, rel=0.05), name


@pytest.mark.parametrize("start, end", [(5.0, math.log(100)), (-1.0, 0.0)])
def test_an_update_keeps_the_logit_scale_between_1_and_100(start, end):
    model = make_model_without_zeros()
    model.logit_scale.data.fill_(start)

    updated(model)

    assert model.logit_scale.item() == pytest.approx(end)
