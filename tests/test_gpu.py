"""What a GPU computes is what a CPU computes. Skipped where there is none."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from material import COLOURS, coloured, rows_of, write_vocabulary
from one_step import KEEP, N, V, assert_same_gradients, losses_and_gradients, micro_batches

import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def gradients_of(options, device, size=N, dtype="float32"):
    """The gradients of train.py's first step, on the CPU."""
    torch.compiler.reset()
    torch.backends.cudnn.allow_tf32 = False  # which rounds convolutions
    args = train.make_parser().parse_args(["--model=tiny", *options])
    model, _ = train.make_model(args, None, V, torch.device(device))
    torch.backends.cuda.enable_flash_sdp(True)  # which make_model switches off for a CPU
    autocast, _ = train.precision(torch.device(device), dtype)
    scaler = torch.amp.GradScaler(device, 1024, enabled=dtype == "float16")
    batches = []
    for batch in micro_batches(size, keep=KEEP):
        batches.append({name: x.to(device) for name, x in batch.items()})
    _, gradients = losses_and_gradients(model, batches, autocast, scaler)
    return {name: x.cpu() / scaler.get_scale() for name, x in gradients.items()}


@pytest.mark.usefixtures("smallest")
@pytest.mark.parametrize("size", [N, 2], ids=["plain", "micro"])
@pytest.mark.parametrize("option", ["--no-compile", "--compile", "--grad_checkpointing"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float16", 0.01)])
def test_gradients_are_those_of_a_cpu(option, size, dtype, tolerance):
    gradients = gradients_of([option], "cuda", size, dtype)

    assert_same_gradients(gradients, gradients_of([], "cpu"), tolerance)


@pytest.fixture
def losses_of(tmp_path):
    """losses_of(*options) -> the losses that twelve steps of train.py log, a list of numbers."""
    coloured(tmp_path / "train.tar", *16 * [*COLOURS])
    write_vocabulary(tmp_path)

    def start(*options, processes=1):
        out = tempfile.mkdtemp(dir=tmp_path)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", "train.py", f"--train_data={tmp_path}"]
        command += ["--model=tiny", "--batch_size=16", "--steps=12", "--log_every=1"]
        command += ["--workers=1", f"--out_dir={out}", "--dtype=float32", *options]
        environment = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}  # no rounding
        subprocess.run(command, cwd=Path(train.__file__).parent, env=environment, check=True)
        return [row["loss"] for row in rows_of(out, "loss")]

    return start


@pytest.mark.parametrize("option", ["--no-compile", "--compile", "--micro_batch_size=4"])
def test_a_run_has_the_losses_of_a_run_on_the_cpu(losses_of, option):
    assert losses_of(option) == pytest.approx(losses_of("--device=cpu"), rel=0.01)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [[], ["--micro_batch_size=4"]], ids=["plain", "micro"])
def test_two_gpus_have_the_losses_of_one(losses_of, options):
    first = losses_of("--device=cuda:0")

    assert losses_of(*options, processes=2) == pytest.approx(first, rel=1e-3)
