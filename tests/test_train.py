"""Training: the same result however a run is cut up, interrupted or spread over processes."""

import errno
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from material import COLOURS, TINY, png, write_shard
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import data
import eval as evaluation
import superclip
import train
from data import words_to_tiktoken
from scripts import log
from superclip import InputError, SuperCLIP, SuperCLIPConfig, cli

TIMES = ("images_per_second", "data_wait", "memory_gb", "mfu")  # what may differ between equal runs
NOT_SCALED = torch.amp.GradScaler("cpu", enabled=False)


# ---- material


def sample(i):
    """A noisy square of one colour. Every seventh caption is long: 32 columns of tokens, not 16."""
    name = list(COLOURS)[i % 4]
    text = f"a {name} square" + (" and nothing else on it" * 4 if i % 7 == 0 else "")
    texts = {"captions": [text, f"{name} thing"]}
    image = png(COLOURS[name], np.random.default_rng(i))
    return {"png": image, "txt": text.encode(), "json": json.dumps(texts).encode()}


def write_bad_shard(path, vocab):
    """40 samples, four of them bad in different ways; the index alone shows the first of them."""
    samples = [sample(i) for i in range(40)]
    del samples[3]["txt"]
    samples[11]["png"] = samples[11]["png"][:200]
    samples[20]["txt"] = b"   "
    samples[30]["txt"] = b"\xff\xfe\xfa"
    shutil.copy(vocab, path.parent)
    return write_shard(path, samples)


@pytest.fixture
def bad_shard(shards, tmp_path):
    return write_bad_shard(tmp_path / "bad-0.tar", shards / "vocab.tiktoken")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "train-0.tar", map(sample, range(40)))
    write_shard(folder / "train-1.tar", map(sample, range(40, 70)))  # 70: no multiple of a batch
    write_shard(folder / "val-0.tar", map(sample, range(70, 90)))
    words = "a red green blue grey square thing and nothing else on it".split()
    (folder / "vocab.tiktoken").write_text(words_to_tiktoken(words))
    return folder


@pytest.fixture(autouse=True)
def small_preset_and_own_signals(monkeypatch):
    monkeypatch.setitem(superclip.PRESETS, "tiny", TINY)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def flags(shards, out, *more):
    """Twelve steps of 16 pairs, logged, saved and validated at steps that interleave."""
    base = f"--train_data {shards}/train-*.tar --val_data {shards}/val-*.tar --out_dir {out}"
    base += " --model tiny --batch_size 16 --steps 12 --learning_rate 1e-3 --workers 0"
    base += " --device cpu --log_every 2 --save_every 3 --eval_every 4"
    return [*base.split(), *map(str, more)]


def error_of(argv, capsys):
    """The sentence with which a command ends that the user got wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli(lambda _: train.main(argv))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error: " in lines[-1] and not any("Traceback" in line for line in lines)
    return lines[-1]


def log_of(out):
    """The rows of a log, as dicts. A run that was killed may have left half a line."""
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def rows(out):
    """What a run has logged, without headers and times. A resumed run may log a step twice: the
    later row counts."""
    found = {}
    for row in log_of(out):
        if "header" not in row:
            kind = next(k for k in ("loss", "validation", "final") if k in row)
            found[row["step"], kind] = {k: v for k, v in row.items() if k not in TIMES}
    return [found[key] for key in sorted(found)]


def last(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def assert_same(a, b):
    """Equal to the bit, all the way down."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):  # noqa: B905
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """A run that nothing has interrupted."""
    out = tmp_path_factory.mktemp("whole")
    with mock.patch.dict(superclip.PRESETS, tiny=TINY):
        train.main(flags(shards, out))
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


# ---- processes of their own: forked from a server that has imported torch once


@pytest.fixture(scope="module")
def start():
    """start(job, *args) -> a running process; its output goes to a file beside its out_dir."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo.testing", "torchvision", "open_clip", "pytest"])

    started = []

    def start(job, output, *args):
        process = context.Process(target=child, args=(job, str(output), *args))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()  # which hangs, should a test have failed


def child(job, output, *args):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # its own children: data workers
    superclip.PRESETS["tiny"] = TINY
    job(*args)


def finish(process):
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# ---- the schedule and the optimizer


def test_learning_rate_by_hand():
    rate = [train.learning_rate_at(step, 8.0, 4, 12) for step in range(13)]
    assert rate[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]  # a quarter more each step, up to the peak
    assert rate[8] == pytest.approx(4.0)  # half way down
    assert rate[10] == pytest.approx(4 * (1 - math.sqrt(0.5)))
    assert rate[12] == pytest.approx(0.0)
    assert train.learning_rate_at(0, 8.0, 0, 12) == 8.0  # without warm-up


def test_weight_decay_is_for_matrices_alone():
    model = small_model(loss="sigmoid")
    args = SimpleNamespace(weight_decay=0.3, learning_rate=1.0)
    optimizer = train.make_optimizer(model, args)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        matrix = name.endswith("weight") and "ln_" not in name and ".ln." not in name
        matrix |= "proj" in name and "bias" not in name or "positional" in name
        assert decay[id(p)] == (0.3 if matrix else 0.0), name


def test_the_head_has_a_learning_rate_of_its_own():
    model = small_model()
    optimizer = train.make_optimizer(model, SimpleNamespace(weight_decay=0.0, learning_rate=1.0))
    step_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train.update(model, optimizer, NOT_SCALED, 1e-4, 1e-2)
    for name, p in model.named_parameters():
        step = (p - before[name]).abs().max().item()  # Adam's first step is as long as the rate
        assert step == pytest.approx(1e-2 if name.startswith("head.") else 1e-4, rel=0.05), name


# ---- one step


def small_model(**changes):
    torch.manual_seed(0)
    model = SuperCLIP(SuperCLIPConfig(**{**TINY, "vocab_size": 40, **changes})).train()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)  # no zeros left that could hide a wrong gradient
    return model


def small_batch(B=10, T=12, T_label=20):
    generator = torch.Generator().manual_seed(1)
    batch = {
        "images": torch.randint(0, 256, (B, 3, 16, 16), dtype=torch.uint8, generator=generator)
    }
    for name, length in (("tokens", T), ("label_tokens", T_label)):
        tokens = torch.randint(1, 38, (B, length), generator=generator)
        tokens[:, 0], tokens[:, -1] = 38, 39
        batch[name] = tokens
    return batch


def step_of(model, micro_batch_size=10, keep=None, autocast=None, towers=None):
    """Losses and gradients of a batch of ten pairs, in micro-batches."""
    model.zero_grad()
    batch = {name: x.split(micro_batch_size) for name, x in small_batch().items()}
    parts = [dict(zip(batch, values)) for values in zip(*batch.values())]
    losses = train.forward_backward(
        towers or train.Towers(model), model, parts, keep, slice(0, 10), autocast or nullcontext(),
        NOT_SCALED,
    )  # fmt: skip
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_step_has_the_losses_and_gradients_of_the_model_itself():
    """The step works on copies of the features. Autograd through model(...)["loss"] does not."""
    for loss in ("softmax", "sigmoid"):
        model, plain = small_model(loss=loss), small_model(loss=loss)
        losses, gradients = step_of(model)
        out = plain(*small_batch().values())
        out["loss"].backward()
        for name, value in losses.items():
            torch.testing.assert_close(value, out[name].detach())
        for name, p in plain.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad)


@pytest.mark.parametrize("cls_weight", [0.7, 0.0])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_micro_batches_give_the_gradients_of_the_whole_batch(loss, dropout, cls_weight):
    models = [small_model(loss=loss, cls_weight=cls_weight) for _ in range(2)]
    keep = torch.rand(10, 16).argsort(dim=1)[:, :5] if dropout else None
    (losses, gradients), (micro_losses, micro_gradients) = (
        step_of(model, m, keep) for model, m in zip(models, (10, 4), strict=True)  # 4 + 4 + 2
    )  # fmt: skip
    torch.testing.assert_close(micro_losses, losses, atol=1e-5, rtol=1e-5)
    scale = max(g.abs().max() for g in gradients.values())
    for name, gradient in gradients.items():
        assert (micro_gradients[name] - gradient).abs().max() < 1e-5 * scale, name
        assert gradient.abs().max() > 0
    if cls_weight:
        assert models[0].num_captions == models[1].num_captions == 10
        assert torch.equal(models[0].token_counts, models[1].token_counts)


def test_micro_batches_hold_no_more_than_their_size_at_a_time():
    model, sizes = small_model(), []
    model.visual.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    step_of(model, 4)
    assert sizes == [4, 4, 2, 4, 4, 2]


def test_grad_checkpointing_changes_no_gradient():
    model = small_model()
    other = small_model()
    other.visual.transformer.grad_checkpointing = other.text.transformer.grad_checkpointing = True
    torch.testing.assert_close(step_of(other, 4), step_of(model, 4))


def test_dropped_patches_depend_on_seed_and_step_alone():
    args = SimpleNamespace(patch_dropout=0.5, seed=3, batch_size=8)

    def of(step, rows=slice(0, 8)):
        return train.patches_to_keep(args, step, 16, rows, "cpu")

    assert of(5).shape == (8, 8) and torch.equal(of(5), of(5)) and not torch.equal(of(5), of(6))
    assert all(len(set(row)) == 8 for row in of(5).tolist())
    assert torch.equal(torch.cat([of(5, slice(0, 4)), of(5, slice(4, 8))]), of(5))  # two processes


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_logits_of_the_contrastive_loss_are_fp32_under_bfloat16(loss):
    model, seen = small_model(loss=loss), []
    name = "cross_entropy" if loss == "softmax" else "binary_cross_entropy_with_logits"
    real = getattr(F, name)

    def spy(logits, *args, **options):
        seen.append(logits.dtype)
        return real(logits, *args, **options)

    for micro_batch_size in (10, 4):
        with mock.patch.object(F, name, spy):
            autocast = torch.autocast("cpu", torch.bfloat16)
            losses, gradients = step_of(model, micro_batch_size, autocast=autocast)
    assert seen and set(seen) == {torch.float32}
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients.values())


@pytest.mark.parametrize("micro_batch_size, dropout", [(8, 0.0), (4, 0.5)])
def test_captions_of_other_lengths_recompile_the_text_tower_alone(
    micro_batch_size, dropout, monkeypatch
):
    """A realistic sequence of lengths. The image tower is compiled once, or twice where it runs
    without gradients first; the text tower once more, for all other lengths; and so are the
    losses. Nothing breaks a graph, and the results are those of the eager model."""
    torch._dynamo.reset()
    plain, counters = small_model(), {}
    compiled = small_model()

    def counted(name, **options):
        counters[name] = CompileCounterWithBackend("aot_eager")  # inductor needs a C++ compiler
        return dict(backend=counters[name], fullgraph=True, **options)

    compiled.visual.compile(**counted("visual"))
    compiled.text.compile(**counted("text"))
    for name in ("word_loss", "pair_loss"):
        setattr(compiled, name, torch.compile(getattr(compiled, name), **counted(name)))
    keep = torch.rand(8, 16).argsort(dim=1)[:, :8] if dropout else None
    rows = slice(0, 8)
    for T, T_label in ((16, 32), (32, 32), (16, 48), (48, 16), (32, 64), (16, 16)):
        batch = {k: x.split(micro_batch_size) for k, x in small_batch(8, T, T_label).items()}
        parts = [dict(zip(batch, values)) for values in zip(*batch.values())]
        losses = [
            train.forward_backward(
                train.Towers(m), m, parts, keep, rows, nullcontext(), NOT_SCALED
            )
            for m in (compiled, plain)
        ]  # fmt: skip
        torch.testing.assert_close(*losses)
    runs = 1 if micro_batch_size == 8 else 2  # without gradients, and with them
    assert counters["visual"].frame_count == runs
    assert counters["text"].frame_count <= 2 * runs and counters["pair_loss"].frame_count == 1
    assert counters["word_loss"].frame_count <= 2 * runs
    torch._dynamo.reset()


# ---- runs


def test_a_run_learns_and_its_log_says_how(whole):
    header = log_of(whole)[0]["header"]
    for name in ("arguments", "config", "samples", "data_fingerprint", "parameters", "device"):
        assert header[name]
    for name in ("dtype", "processes", "python", "torch", "commit", "date"):
        assert name in header
    losses = [row for row in rows(whole) if "loss" in row]
    assert [row["step"] for row in losses] == [2, 4, 6, 8, 10, 12]
    for row in losses:
        assert row["loss"] == pytest.approx(row["contrastive_loss"] + row["classification_loss"])
        assert 1 <= row["logit_scale"] <= 100 and row["grad_norm"] > 0
        assert row["epoch"] == pytest.approx(16 * row["step"] / 70, abs=1e-4)
        rate = train.learning_rate_at(row["step"] - 1, 1e-3, 1, 12)
        assert row["learning_rate"] == pytest.approx(rate)
        assert row["bad_samples"] == 0
    assert losses[-1]["classification_loss"] < losses[0]["classification_loss"] - 0.5
    timed = log_of(whole)[1]
    assert all(timed[name] >= 0 for name in TIMES if name != "mfu") and timed["mfu"] is None
    validations = [row for row in rows(whole) if "validation" in row]
    assert [row["step"] for row in validations] == [4, 8, 12]
    assert max(row["mean_r1"] for row in validations) == last(whole)["best"]


def test_flops_are_those_of_the_papers_formula():
    """Three times the forward pass of every matrix product, two operations a multiplication; the
    patch convolution needs no gradient at its input. ViT-B/16 by hand."""
    config = SuperCLIPConfig.preset("ViT-B-16")

    def tower(tokens, width, layers):  # qkv, out, MLP; queries x keys, weights x values
        return layers * (12 * tokens * width**2 + 2 * tokens**2 * width)

    for T, K in ((16, 196), (77, 98)):
        patches = 196 * 768 * 768  # all of them are embedded, before some are dropped
        macs = tower(K + 1, 768, 12) + 768 * 512 + 768 * 49408 + tower(T, 512, 12) + 512 * 512
        assert log.pair_flops(config, T, K) == pytest.approx(6 * macs + 4 * patches, rel=1e-3)


def test_the_share_of_the_peak_is_logged_where_the_peak_is_known(shards, tmp_path, monkeypatch):
    assert log.peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert log.peak_tflops("NVIDIA H100 PCIe") == 756
    assert log.peak_tflops("NVIDIA A100-SXM4-40GB") == 312 and log.peak_tflops("NVIDIA A10") == 125
    assert log.peak_tflops("NVIDIA L40") is log.peak_tflops("NVIDIA RTX A1000") is None
    assert log.peak_tflops("AMD EPYC, 2 cores") is None
    monkeypatch.setattr(log, "PEAK_TFLOPS", {"cores": 1e-3})
    train.main(flags(shards, tmp_path, "--dtype", "bfloat16", "--patch_dropout", 0.5))
    config = SuperCLIPConfig(**last(tmp_path)["config"])
    for row in log_of(tmp_path)[1:]:
        if "loss" in row:  # captions have 16 or 32 tokens
            low, high = (row["images_per_second"] * log.pair_flops(config, T, 8) / 1e9
                         for T in (16, 32))  # fmt: skip
            assert 0.98 * low - 0.001 <= row["mfu"] <= 1.02 * high + 0.001


def test_the_summary_says_which_model_its_scores_are_of(shards, tmp_path, capsys):
    calls = []

    def falling(result):  # the second of three validations is the best
        calls.append(result)
        different = [r for i, r in enumerate(calls) if r not in calls[:i]]
        return (0.5, 0.9, 0.25)[different.index(result)]

    with mock.patch("eval.mean_r1", falling):
        train.main(flags(shards, tmp_path))
    output = capsys.readouterr().out
    assert f"the last step, which is in {tmp_path}/last.pt" in output and "R@1 of 90.0 %" in output
    assert evaluation.read_checkpoint(tmp_path / "best.pt")["step"] == 8


def test_a_fine_tuning_that_harms_ends_with_its_start_as_the_best(whole, shards, tmp_path, capsys):
    argv = without_model(flags(shards, tmp_path, "--init_from", whole / "last.pt"))
    with mock.patch("eval.mean_r1", side_effect=[0.9, *[0.5] * 99]):
        train.main(argv)
    assert "R@1 of 90.0 %" in capsys.readouterr().out
    start, best = last(whole)["model"], last(tmp_path, "best.pt")
    assert best["step"] == 0 and all(torch.equal(start[k], x) for k, x in best["model"].items())
    assert last(tmp_path)["best"] == 0.9


@pytest.mark.parametrize("length, few", [(["--epochs", 3], True), (["--steps", 3], False)])
def test_a_run_of_few_steps_says_so_unless_they_were_asked_for(
    length, few, shards, tmp_path, capsys
):
    argv = flags(shards, tmp_path)
    steps = argv.index("--steps")
    train.main([*argv[:steps], *argv[steps + 2 :], *map(str, length)])
    assert ("these are few steps" in capsys.readouterr().out) == few


def test_wandb_gets_what_the_log_gets(shards, tmp_path, monkeypatch):
    sent = []
    run = SimpleNamespace(log=lambda row, step: sent.append((row, step)))
    wandb = SimpleNamespace(init=lambda **_: run, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train.main(flags(shards, tmp_path, "--wandb", "project"))
    log = log_of(tmp_path)[1:]
    assert [row for row, _ in sent] == log and all(row["step"] == step for row, step in sent)
    assert any("mean_r1" in row for row in log) and "final" in log[-1]


def test_without_git_there_is_no_commit(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    train.main(flags(shards, tmp_path, "--steps", 1))
    assert log_of(tmp_path)[0]["header"]["commit"] == ""


def test_checkpoints_load_anywhere(whole):
    content = last(whole)  # weights_only
    assert content["step"] == 12 and content["samples"] == 192
    assert content["model"]["num_captions"] == 192
    model, tokenizer, preprocess = evaluation.load(whole / "best.pt")
    assert not model.training and tokenizer.decode(tokenizer.encode("A red thing")) == "a red thing"
    assert model.encode_image(preprocess(Image.new("RGB", (30, 20)))[None]).shape == (1, 16)
    assert not list(whole.glob(".*"))


@pytest.mark.parametrize(
    "more",
    [
        ["--patch_dropout", 0.5, "--loss", "sigmoid", "--grad_checkpointing"],
        ["--dtype", "bfloat16", "--micro_batch_size", 6, "--label_captions", "json.captions"],
        ["--cls_weight", 0, "--captions", "json.captions", "--context_length", 16],
    ],
    ids=["sigmoid", "bfloat16", "plain CLIP"],
)
def test_other_ways_to_train(shards, tmp_path, more):
    train.main(flags(shards, tmp_path, *more))
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert losses[-1] < losses[0]
    assert ("head.linear.weight" in last(tmp_path)["model"]) == ("--cls_weight" not in more)


def without_model(argv):
    return [a for a in argv if a not in ("--model", "tiny")]


def test_init_from_starts_with_the_weights_and_the_vocabulary_of_the_checkpoint(
    whole, shards, tmp_path, capsys
):
    """Whatever lies beside the new shards: here another vocabulary of the same size."""
    for shard in shards.glob("train-*.tar"):
        shutil.copy(shard, tmp_path)
    words = "a red green blue grey square thing and nothing else on that".split()
    (tmp_path / "vocab.tiktoken").write_text(words_to_tiktoken(words))
    argv = without_model(flags(tmp_path, tmp_path / "out", "--learning_rate", 0, "--steps", 1))
    train.main(
        [*argv, "--val_data", str(shards / "val-0.tar"), "--init_from", str(whole / "best.pt")]
    )
    assert f"{whole / 'best.pt'}: " in capsys.readouterr().out  # that is what the model is called
    before, after = last(whole, "best.pt"), last(tmp_path / "out")
    assert after["vocab"] == before["vocab"] and after["config"] == before["config"]
    for name, weights in before["model"].items():
        counter = name in ("token_counts", "num_captions")
        assert torch.equal(weights, after["model"][name]) != counter, name


def test_init_from_plain_clip_gets_a_new_head_and_cls_weight_0_takes_it_away(
    whole, shards, tmp_path, capsys
):
    more = ["--learning_rate", 0, "--steps", 1]
    for name, start, weight in (("clip", whole, 0), ("super", tmp_path / "clip", 1)):
        argv = flags(shards, tmp_path / name, *more, "--init_from", start / "last.pt")
        train.main([*without_model(argv), "--cls_weight", str(weight)])
        said = "has no word head" in capsys.readouterr().out
        model = last(tmp_path / name)["model"]
        assert said == ("head.linear.weight" in model) == bool(weight)
        assert torch.equal(model["visual.proj"], last(whole)["model"]["visual.proj"])


def test_fine_tuning_is_gentle_and_says_what_there_was_before(
    whole, shards, tmp_path, monkeypatch, capsys
):
    """Loaded weights get a low rate and a new head a higher one; a run is scored before step 1."""
    train.main([*flags(shards, tmp_path / "clip", "--steps", 1), "--cls_weight", "0"])
    used = []
    update = train.update
    monkeypatch.setattr(train, "update", lambda *args: used.append(args[3:]) or update(*args))
    argv = without_model(flags(shards, tmp_path, "--steps", 4))
    rate = argv.index("--learning_rate")
    for start, head_rate in ((whole / "last.pt", 5e-5), (tmp_path / "clip" / "last.pt", 5e-4)):
        out, _ = tmp_path / f"out{head_rate}", used.clear()
        argv[argv.index("--out_dir") + 1] = str(out)
        capsys.readouterr()
        train.main([*argv[:rate], *argv[rate + 2 :], "--init_from", str(start)])
        printed = capsys.readouterr().out
        assert "--learning_rate 5e-05" in printed
        assert ("its learning rate is 0.0005" in printed) == (head_rate == 5e-4)
        assert max(used) == pytest.approx((5e-5, head_rate))
        first = log_of(out)[1]
        model, tokenizer, _ = evaluation.load(start)
        pairs = data.Pairs([str(shards / "val-0.tar")], tokenizer, 16, ["txt"])
        result = evaluation.retrieval(*evaluation.encode_shards(model, pairs))
        assert first["step"] == 0 and first["validation"] == result


def test_a_new_rate_of_a_resumed_run_is_the_heads_too(copy, shards, monkeypatch):
    used, update = [], train.update
    monkeypatch.setattr(train, "update", lambda *args: used.append(args[3:]) or update(*args))
    train.main(flags(shards, copy, "--resume", "--steps", 14, "--learning_rate", 1e-5))
    assert len(used) == 2 and all(0 < head == rate <= 1e-5 for rate, head in used)


def test_one_pair_in_a_hundred_is_held_out(shards, tmp_path, monkeypatch, capsys):
    """Without --val_data. The others are trained on; none is lost, and none is in both."""
    samples = [sample(i) for i in range(5)]
    path = write_shard(tmp_path / "train.tar", samples * 50)
    shutil.copy(shards / "vocab.tiktoken", tmp_path)
    tokenizer = data.Tokenizer.from_file(shards / "vocab.tiktoken")

    def open_data(rank, *more):
        args, _ = train.parse(["--train_data", str(path), "--model", "tiny", *more])
        parts = train.open_data(args, [str(path)], tokenizer, 16, rank)
        return [None if pairs is None else pairs.index.tolist() for pairs in parts]

    everything = data.Pairs([str(path)], tokenizer, 16, ["txt"]).index.tolist()
    kept, held_out = open_data(0, "--batch_size", "247")
    assert "3 pairs are held out" in capsys.readouterr().out
    assert len(kept) == 247 and sorted(kept + held_out) == sorted(everything)
    monkeypatch.setenv("RANK", "1")
    assert open_data(1, "--batch_size", "247") == [kept, None]  # rank 0 validates
    assert capsys.readouterr().out == ""  # and speaks
    assert open_data(0, "--val_data", "none", "--batch_size", "250") == [everything, None]
    with pytest.raises(InputError, match="--batch_size is more than the 247 pairs"):
        open_data(0, "--batch_size", "248")


def test_zeroshot_is_scored_at_every_validation(whole, shards, folders, tmp_path, capsys):
    train.main(flags(shards, tmp_path / "out", "--zeroshot_data", folders))
    validations = [row for row in log_of(tmp_path / "out") if "validation" in row]
    assert [row["step"] for row in validations] == [4, 8, 12]
    model, tokenizer, _ = evaluation.load(tmp_path / "out" / "last.pt")
    dataset = evaluation.ClassFolders(folders, 16)
    expected = evaluation.zeroshot(model, tokenizer, dataset, dataset.classes)["top1"]
    assert validations[-1]["zeroshot"] == {str(folders): expected}
    assert log_of(tmp_path / "out")[-1]["final"][str(folders)] == expected
    output = capsys.readouterr().out
    assert output.count(f"{folders.name} {100 * expected['value']:.1f} %") >= 1


# ---- many processes


def recorded(argv, signal_at=None):
    """A run, with the gradients of each step as one vector, and the shapes of the logits."""
    gradients, shapes, clip, entropy = [], set(), torch.nn.utils.clip_grad_norm_, F.cross_entropy

    def spy_on_clip(parameters, limit):
        parameters = list(parameters)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        if len(gradients) == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(parameters, limit)

    def spy_on_entropy(logits, target):
        shapes.add(tuple(logits.shape))
        return entropy(logits, target)

    with mock.patch("torch.nn.utils.clip_grad_norm_", spy_on_clip):
        with mock.patch("torch.nn.functional.cross_entropy", spy_on_entropy):
            train.main(argv)
    return {"gradients": torch.stack(gradients), "shapes": shapes}


RUNS = {  # at a low learning rate, for Adam makes much of the smallest difference
    "softmax": ["--patch_dropout", 0.5, "--learning_rate", 1e-5],
    "sigmoid": ["--loss", "sigmoid", "--micro_batch_size", 3, "--learning_rate", 1e-5],
    "stopped": ["--learning_rate", 1e-5],
    "bad": ["--train_data", "bad-0.tar"],
}


def one_of_two(rank, ports, shards, folder):
    """What torchrun makes of a process: its place in the environment."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[-1]))
    os.chdir(folder)
    results = {}
    try:
        train.main(flags(shards, folder / "odd", "--batch_size", 15))
    except InputError as error:
        results["odd"] = str(error)
        torch.distributed.destroy_process_group()  # in real life the process ends here
    for (name, more), port in zip(RUNS.items(), ports):  # noqa: B905
        os.environ["MASTER_PORT"] = str(port)
        # only one of the two is told to stop
        signal_at = 5 if name == "stopped" and rank == 1 else None
        results[name] = recorded(flags(shards, folder / name, *more), signal_at)
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def two(start, shards, tmp_path_factory):
    """The runs by two processes: (folder, what each process has seen)."""
    folder = tmp_path_factory.mktemp("two")
    write_bad_shard(folder / "bad-0.tar", shards / "vocab.tiktoken")
    sockets = [socket.socket() for _ in range(len(RUNS) + 1)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    ranks = [
        start(one_of_two, folder / f"{rank}.txt", rank, ports, shards, folder) for rank in (0, 1)
    ]
    for rank, process in enumerate(ranks):
        assert finish(process) == 0, (folder / f"{rank}.txt").read_text()
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_two_processes_do_what_one_does(two, shards, tmp_path, name):
    folder, ranks = two
    one = recorded(flags(shards, tmp_path, *RUNS[name]))
    gradients = one["gradients"]
    for rank in ranks:
        assert (rank[name]["gradients"] - gradients).abs().max() < 1e-5 * gradients.abs().max()
    ours, theirs = last(tmp_path)["model"], last(folder / name)["model"]
    assert torch.equal(ours["token_counts"], theirs["token_counts"]) and ours["num_captions"] == 192
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    for mine, other in zip(rows(tmp_path), rows(folder / name), strict=True):
        if "loss" in mine:
            assert other == pytest.approx(mine, rel=1e-5)
        assert mine.keys() == other.keys()


def test_two_processes_count_bad_samples_as_one_does(two, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(two[0])
    train.main(flags(shards, tmp_path, *RUNS["bad"]))
    counts = [[r["bad_samples"] for r in rows(out) if "loss" in r] for out in (tmp_path, "bad")]
    assert counts[0] == counts[1] and counts[0][-1] > 12


def test_a_process_computes_its_own_rows_of_the_similarity_matrix(two):
    assert all(rank["softmax"]["shapes"] == {(8, 16)} for rank in two[1])


def test_one_process_writes(two):
    folder, _ = two
    assert "step      2" in (folder / "0.txt").read_text()
    assert "step " not in (folder / "1.txt").read_text()
    headers = [line for line in open(folder / "softmax" / "log.jsonl") if '"header"' in line]
    assert len(headers) == 1 and json.loads(headers[0])["header"]["processes"] == 2


def test_a_batch_that_processes_cannot_share_is_refused(two):
    assert all("not divisible by 2 processes" in rank["odd"] for rank in two[1])


def test_a_run_stopped_on_two_processes_goes_on_on_one(two, shards, tmp_path):
    folder, _ = two
    stopped = shutil.copytree(folder / "stopped", tmp_path / "stopped")
    assert last(stopped)["step"] == 5  # one was asked in step 5, and both agreed at its end
    assert "--resume" in (folder / "0.txt").read_text()
    train.main(flags(shards, stopped, *RUNS["stopped"], "--resume"))
    train.main(flags(shards, tmp_path / "one", *RUNS["stopped"]))
    torch.testing.assert_close(
        last(stopped)["model"], last(tmp_path / "one")["model"], atol=1e-5, rtol=1e-5
    )


# ---- interrupted


def doomed(argv, moment=None, count=1, delay=0.0):
    """A run that kills itself the `count`-th time that it comes to a moment."""
    save, replace, rate, write = torch.save, os.replace, train.learning_rate_at, log.Log.write
    left = {moment: count}

    def now(name):
        left[name] = left.get(name, 0) - 1
        return left[name] == 0

    def saving(content, file):  # half of a checkpoint is on the disk
        if "model" in content and now("save"):
            save(content, buffer := io.BytesIO())
            file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
            file.flush()
            die()
        save(content, file)

    def replacing(old, new):  # the new checkpoint is complete, but has not replaced the old one
        if Path(new).name == "last.pt" and now("replace"):
            die()
        replace(old, new)

    def stepping(*args):  # anywhere in a step
        if now("step"):
            threading.Timer(delay, die).start()
        return rate(*args)

    def logging(log, row):  # half of a line is on the disk
        if now("log"):
            log.file.write(json.dumps(row)[:20])
            log.file.flush()
            die()
        write(log, row)

    torch.save, os.replace, train.learning_rate_at = saving, replacing, stepping
    log.Log.write = logging
    cli(lambda _: train.main(argv))


def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(whole, shards, start, tmp_path):
    rng = random.Random(0)
    moments = [("step", n, rng.uniform(0, 0.02)) for n in (1, 3)]  # at random, the first unsaved
    moments += [("save", 1), ("log", 4), ("save", 2), ("log", 1), ("replace", 1), ("log", 8)]
    out, argv = tmp_path / "out", flags(shards, tmp_path / "out", "--workers", 2)
    for number, moment in enumerate(moments):
        resume = ["--resume"] if number else []
        process = start(doomed, tmp_path / "output.txt", argv + resume, *moment)
        assert finish(process) == -signal.SIGKILL, (moment, (tmp_path / "output.txt").read_text())
    process = start(doomed, tmp_path / "output.txt", argv + ["--resume"])
    assert finish(process) == 0, (tmp_path / "output.txt").read_text()
    a, b = last(whole), last(out)
    for content in (a, b):
        content["arguments"] = {**content["arguments"], "out_dir": "", "workers": 0, "resume": 0}
    assert_same(b, a)
    assert_same(last(out, "best.pt"), last(whole, "best.pt"))
    assert rows(out) == rows(whole)


def test_sigterm_saves_and_leaves_with_a_hint(whole, shards, tmp_path, capsys):
    argv = flags(shards, tmp_path, "--save_every", 100)
    with pytest.raises(SystemExit) as ended:
        cli(lambda _: recorded(argv, signal_at=5) and None)
    assert not ended.value.code
    assert last(tmp_path)["step"] == 5
    hint = "stopped after step 5. To go on, give the same command with --resume"
    assert hint in capsys.readouterr().out
    train.main(flags(shards, tmp_path, "--resume"))
    assert_same(last(tmp_path)["model"], last(whole)["model"])
    assert_same(last(tmp_path)["optimizer"], last(whole)["optimizer"])


def signalled(argv, number):
    """Ctrl-C and schedulers send their signal to a process and its workers alike."""
    os.setpgid(0, 0)
    rate = train.learning_rate_at

    def stepping(step, *args):
        if step == 4:
            kill = [
                "kill",
                f"-{number:d}",
                "--",
                f"-{os.getpgrp()}",
            ]  # not from the parent of the workers
            subprocess.run(kill, start_new_session=True)
            time.sleep(0.1)
        return rate(step, *args)

    train.learning_rate_at = stepping
    cli(lambda _: train.main(argv))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_workers_too_loses_nothing(shards, start, tmp_path, number):
    argv = flags(shards, tmp_path / "out", "--workers", 2, "--save_every", 100)
    process = start(signalled, tmp_path / "output.txt", argv, number)
    assert finish(process) == 0, (tmp_path / "output.txt").read_text()
    assert last(tmp_path / "out")["step"] == 5
    assert "--resume" in (tmp_path / "output.txt").read_text()


# ---- checkpoints that are damaged, or cannot be written


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_ends_in_a_sentence_and_loses_nothing(copy, shards, capsys):
    truncate(copy / "last.pt")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    assert "last.pt is damaged" in error_of(flags(shards, copy, "--resume"), capsys)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, capsys):
    model, tokenizer = small_model(), SimpleNamespace(vocab="")
    path = tmp_path / "last.pt"
    assert train.save(path, model, tokenizer)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        saved = train.save(path, model, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    captured = capsys.readouterr()
    assert not saved and f"cannot write {path}" in captured.out + captured.err
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert path.read_bytes() == before


def test_a_run_goes_on_while_the_disk_is_full(shards, tmp_path, whole, capsys):
    save = torch.save

    def saving(content, file):
        if content.get("step") in (6, 9) and "optimizer" in content:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    with mock.patch("torch.save", saving):
        train.main(flags(shards, tmp_path))
    assert capsys.readouterr().out.count("No space left") == 2
    assert_same(last(tmp_path)["model"], last(whole)["model"])


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(shards, tmp_path, capsys):
    forward_backward, steps = train.forward_backward, []

    def poisoned(towers, model, *args):
        steps.append(1)
        if len(steps) == 5:
            model.visual.proj.data[0] = math.nan
        return forward_backward(towers, model, *args)

    with mock.patch("train.forward_backward", poisoned):
        message = error_of(flags(shards, tmp_path), capsys)
    assert "step 6" in message and "--learning_rate" in message and "--resume" in message
    assert last(tmp_path)["step"] == 3
    assert all(v.isfinite().all() for v in last(tmp_path)["model"].values())
    assert max(row["step"] for row in rows(tmp_path)) == 4


# ---- going on with other arguments


@pytest.mark.parametrize(
    "more, name",
    [
        (["--image_size", 32], "image_size"),
        (["--context_length", 16], "context_length"),
        (["--loss", "sigmoid"], "loss"),
        (["--cls_weight", 0], "cls_weight"),
        (["--model", "ViT-S-16"], "model"),
        (["--weight_decay", 0.5], "weight_decay"),
        (["--vocab", "other.tiktoken"], "vocab"),
    ],
)
def test_another_model_is_refused_by_name(copy, shards, capsys, monkeypatch, more, name):
    monkeypatch.chdir(copy)
    Path("other.tiktoken").write_text(words_to_tiktoken(["other", "words"]))
    before = (copy / "log.jsonl").read_bytes()
    assert name in error_of(flags(shards, copy, "--resume", *more), capsys)
    assert (copy / "log.jsonl").read_bytes() == before and last(copy)["step"] == 12


def test_other_numbers_are_allowed_and_logged(copy, shards):
    more = ["--batch_size", 32, "--steps", 8, "--learning_rate", 5e-4]
    before = [row for row in rows(copy) if "loss" in row]
    train.main(flags(shards, copy, "--resume", *more))
    headers = [row["header"]["arguments"] for row in log_of(copy) if "header" in row]
    assert [h["batch_size"] for h in headers] == [16, 32]
    after = [row for row in log_of(copy) if "loss" in row]
    assert len(after) == len(before) + 1, "rows of the first part are lost"
    assert after[-1]["step"] == 8 and after[-1]["learning_rate"] <= 5e-4
    # twelve steps of 16 pairs are six of 32
    assert last(copy)["samples"] == 256 and last(copy)["model"]["num_captions"] == 256


def test_a_run_goes_on_where_it_was_moved_to(copy, shards, tmp_path, monkeypatch):
    """Without --out_dir it is ./out that goes on, not the folder where the run began; its log may
    have stayed there."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(copy, "out")
    os.remove("out/log.jsonl")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    train.main(["--resume", "--steps", "14"])
    assert last(Path("out"))["step"] == 14
    assert [row["step"] for row in rows(Path("out")) if "loss" in row] == [14]
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_other_data_is_refused(copy, shards, tmp_path, capsys):
    shutil.copy(shards / "vocab.tiktoken", tmp_path)
    write_shard(tmp_path / "train-0.tar", map(sample, range(40)))  # the other shard is missing
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    argv = ["--out_dir", copy, "--resume", "--train_data", tmp_path / "train-0.tar"]
    assert "training data" in error_of(list(map(str, argv)), capsys)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_what_is_not_said_again_stays(copy, shards):
    train.main(["--out_dir", str(copy), "--resume", "--steps", "14"])
    assert last(copy)["step"] == 14 and last(copy)["samples"] == 14 * 16
    assert last(copy)["arguments"]["learning_rate"] == 1e-3


# ---- mistakes


def test_an_existing_run_is_not_overwritten(copy, shards, capsys):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    assert "--resume" in error_of(flags(shards, copy), capsys)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


@pytest.mark.parametrize(
    "more, words",
    [
        (["--device", "toaster"], "toaster"),
        (["--train_data", "nowhere-*.tar"], "nowhere-*.tar"),
        (["--train_data", "no_pairs.tar"], "no image-caption pairs"),
        (["--vocab", "no_vocab.txt"], "no_vocab.txt is neither"),
        (["--batch_size", "71"], "--batch_size is more than the 70 pairs"),
        (["--image_size", "30"], "image_size"),
        (["--captions", "yaml.text"], "yaml.text"),
        (["--init_from", "no_vocab.txt"], "leave --model out"),
        (["--wandb", "project"], "pip install wandb"),
        (["--epochs", "1"], "--steps or --epochs"),
        (["--epochs", "0"], "epochs"),
        (["--context_length", "1"], "context_length"),
        (["--train_data", "a{5..2}.tar"], "no shards match"),
        (["--learning_rate", "-1"], "learning_rate"),
        (["--learning_rate", "nan"], "learning_rate"),
        (["--seed", "99999999999999999999"], "seed"),
        (["--weight_decay", "-1"], "weight_decay"),
        (["--warmup_steps", "-3"], "warmup_steps"),
        (["--batch_size", "0"], "batch_size"),
        (["--micro_batch_size", "-1"], "micro_batch_size"),
        (["--log_every", "0"], "log_every"),
        (["--steps", "0"], "steps"),
        (["--patch_dropout", "1.5"], "patch_dropout"),
        (["--workers", "-1"], "workers"),
        (["--out_dir", "no_vocab.txt"], "no_vocab.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(shards, tmp_path, capsys, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    write_shard("no_pairs.tar", [{"txt": b"alone"}])
    Path("no_vocab.txt").write_text("these are no ranks\n")
    assert words in error_of(flags(shards, "out", *more), capsys)
    assert not Path("out").exists() or not list(Path("out").iterdir())  # nothing in the way


def test_out_of_memory_turns_into_advice(shards, tmp_path, capsys):
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ):
        with mock.patch("train.forward_backward", side_effect=error):
            assert "--micro_batch_size" in error_of(flags(shards, tmp_path), capsys)
    for text in (  # these need their trace
        "a bug",
        "CUDA error: an illegal memory access was encountered",
        "Caught KeyError in DataLoader worker process 0.",
    ):
        with mock.patch("train.forward_backward", side_effect=RuntimeError(text)):
            with pytest.raises(RuntimeError, match=text):
                train.main(flags(shards, tmp_path))


def test_bad_samples_are_named_once_and_counted(shards, bad_shard, tmp_path, capsys):
    train.main(flags(shards, tmp_path / "out", "--train_data", bad_shard))  # six epochs
    output = capsys.readouterr().out
    for key in ("0003", "0011", "0020", "0030"):
        assert output.count(f"bad-0.tar {key}: ") == 1
    order = [data.batch_indices(40, 16, 0, step) for step in range(12)]
    visits = [sum(sample in (3, 11, 20, 30) for _, sample in batch) for batch in order]
    counts = [row["bad_samples"] for row in rows(tmp_path / "out") if "loss" in row]
    assert counts == sorted(counts)
    for count, step in zip(counts, (2, 4, 6, 8, 10, 12)):  # what replaces them may be bad, too
        assert sum(visits[:step]) <= count <= 1.5 * sum(visits[:step]) + 1


def test_a_run_of_which_more_than_half_is_bad_ends_with_a_sentence(shards, tmp_path, capsys):
    shutil.copy(shards / "vocab.tiktoken", tmp_path)
    samples = [sample(i) | ({} if i % 3 else {"txt": b" "}) for i in range(60)]
    write_shard(tmp_path / "third.tar", samples)
    train.main(flags(shards, tmp_path / "a", "--train_data", tmp_path / "third.tar"))
    samples = [sample(i) | ({"txt": b" "} if i % 3 else {}) for i in range(60)]
    write_shard(tmp_path / "two-thirds.tar", samples)
    argv = flags(shards, tmp_path / "b", "--train_data", tmp_path / "two-thirds.tar")
    assert "more than half" in error_of(argv, capsys)
