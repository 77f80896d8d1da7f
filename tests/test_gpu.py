"""Test that a GPU computes the same as a CPU. Without a GPU the tests are skipped."""

import pytest
import torch
from test_step import KEEP, assert_same_gradients, losses_and_gradients, make_batch, model_of

import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def gradients_of(options, device, dtype="float32"):
    """Return the gradients of train.py's first step on a device, moved to the CPU."""
    torch.compiler.reset()
    model = model_of(*options, device=device)
    autocast, _ = train.precision(torch.device(device), dtype)
    scaler = torch.amp.GradScaler(device, 1024, enabled=dtype == "float16")
    batch = {name: x.to(device) for name, x in make_batch(keep=KEEP).items()}
    _, gradients = losses_and_gradients(model, batch, autocast, scaler)
    return {name: x.cpu() / scaler.get_scale() for name, x in gradients.items()}


@pytest.mark.parametrize("size", [[], ["--micro_batch_size=2"]], ids=["plain", "micro"])
@pytest.mark.parametrize("option", ["--no-compile", "--compile"])
@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-4), ("float16", 0.01), ("bfloat16", 0.05)]
)
def test_gradients_are_those_of_a_cpu(option, size, dtype, tolerance):
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("needs Ampere or newer")

    gradients = gradients_of([option, *size], "cuda", dtype)

    assert_same_gradients(gradients, gradients_of([], "cpu"), tolerance)
