"""What a GPU computes is what a CPU computes. Skipped where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from material import COLOURS, TINY, coloured
from one_step import KEEP, N, V, assert_same_gradients, losses_and_gradients, micro_batches

import train
from data import words_to_tiktoken
from scripts import bench
from superclip import PRESETS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def gradients_of(monkeypatch):
    """gradients_of(options, device, ...) -> the gradients of train.py's first step, on the CPU."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which rounds convolutions

    def compute(options, device, micro=False, dtype="float32"):
        torch.compiler.reset()
        args = train.make_parser().parse_args(["--model=tiny", *options])
        model, _ = train.make_model(args, None, V, torch.device(device))
        torch.backends.cuda.enable_flash_sdp(True)  # which make_model switches off for a CPU
        scaler = torch.amp.GradScaler(device, 1024, enabled=dtype == "float16")
        autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")
        parts = micro_batches(2 if micro else N, keep=KEEP)
        batches = ({name: x.to(device) for name, x in part.items()} for part in parts)
        _, gradients = losses_and_gradients(model, batches, micro, autocast, scaler)
        return {name: x.cpu() / scaler.get_scale() for name, x in gradients.items()}

    return compute


@pytest.mark.parametrize("micro", [False, True], ids=["plain", "micro"])
@pytest.mark.parametrize("option", ["--no-compile", "--compile", "--grad_checkpointing"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float16", 0.01)])
def test_gradients_are_those_of_a_cpu(gradients_of, option, micro, dtype, tolerance):
    gradients = gradients_of([option], "cuda", micro, dtype)

    assert_same_gradients(gradients, gradients_of([], "cpu"), tolerance)


@pytest.fixture
def logged_by(tmp_path):
    """logged_by(*options) -> what twelve steps of train.py log in a column: a list of numbers."""
    coloured(tmp_path / "train.tar", *16 * [*COLOURS])
    (tmp_path / "vocab.tiktoken").write_text(words_to_tiktoken(list(COLOURS)))

    def start(*options, processes=1, column="loss"):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", "train.py", f"--train_data={tmp_path}"]
        command += ["--model=tiny", "--batch_size=16", "--steps=12", "--log_every=1"]
        command += ["--workers=1", f"--out_dir={out}", "--dtype=float32", *options]
        environment = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}  # no rounding
        subprocess.run(command, cwd=Path(train.__file__).parent, env=environment, check=True)
        lines = (out / "log.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line]
        return [row[column] for row in rows if column in row]

    return start


@pytest.mark.parametrize("option", ["--no-compile", "--compile", "--micro_batch_size=4"])
def test_a_run_has_the_losses_of_a_run_on_the_cpu(logged_by, option):
    assert logged_by(option) == pytest.approx(logged_by("--device=cpu"), rel=0.01)


def test_a_run_in_float16_starts_with_the_loss_of_the_cpu_and_learns(logged_by):
    """Its first steps find the loss scale."""
    losses = logged_by("--dtype=float16")

    assert losses[0] == pytest.approx(logged_by("--device=cpu")[0], rel=0.01)
    assert losses[-1] < losses[0]


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_two
def test_the_second_gpu_has_the_losses_of_the_first(logged_by):
    first = logged_by("--device=cuda:0")

    assert logged_by("--device=cuda:1") == pytest.approx(first, rel=1e-3)


@needs_two
@pytest.mark.parametrize("options", [[], ["--micro_batch_size=4"]], ids=["plain", "micro"])
def test_two_gpus_have_the_losses_of_one(logged_by, options):
    first = logged_by("--device=cuda:0")

    assert logged_by(*options, processes=2) == pytest.approx(first, rel=1e-3)


def test_a_step_needs_the_memory_that_bench_predicts(logged_by):
    options = ["--model=ViT-B-32", "--batch_size=64", "--dtype=bfloat16", "--no-compile"]
    predicted = bench.predict_memory([*options, "--vocab=clip"])["peak"]

    measured = logged_by(*options, "--vocab=clip", column="memory_gb")[-1] * 2**30

    assert measured == pytest.approx(predicted, rel=0.1)
