"""What bench.py predicts is what a step needs, and all parts of `bench.py cuda` run on a CPU."""

import json

import pytest
import torch
from material import error_of, run

from data import words_to_tiktoken
from scripts import bench
from superclip import LayerNorm, contrastive_loss


@pytest.fixture
def options(shallow, tmp_path, monkeypatch):
    """A model of 6 x 6 patches and 600 tokens, computed as a CPU does it. It is shallow, because
    fake tensors take as long for a small block as for a large one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # main() changes it
    vocab = tmp_path / "words.tiktoken"
    vocab.write_text(words_to_tiktoken("a photo of the red dog and its ball".split()))
    return ["--model=tiny", "--device=cpu", f"--vocab={vocab}", "--batch_size=8", "--workers=1"]


def predict(options, *more):
    return bench.predict_memory([*options, *more])


def test_predicted_weights_gradients_and_moments_have_the_bytes_of_real_ones(options):
    run, predicted = bench.Run(options), predict(options)
    run.backward()
    weights = list(run.model.state_dict().values())
    gradients = [p.grad for p in run.model.parameters()]
    run.update()
    moments = [x for state in run.optimizer.state.values() for x in state.values()]
    for name, tensors in (("weights", weights), ("gradients", gradients), ("moments", moments)):
        assert predicted[name] == sum(x.numel() * x.element_size() for x in tensors), name


def test_predicted_activations_are_those_that_autograd_saves(options):
    run, saved = bench.Run(options), {}
    known = {x.untyped_storage().data_ptr() for x in run.model.state_dict().values()}
    known |= {x.untyped_storage().data_ptr() for x in run.parts[0].values()}

    def pack(x):  # views share a storage, which counts once
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), run.autocast:
        tokens, weights = run.parts[0]["tokens"], run.model.token_weights()
        graph = run.model.features_and_word_loss(run.parts[0]["images"], tokens, tokens, weights)
    counted = sum(n for pointer, n in saved.items() if pointer not in known)
    assert predict(options)["activations"] == pytest.approx(counted, rel=0.02), len(graph)


@pytest.mark.parametrize("way", bench.WAYS)
def test_the_predicted_peak_is_that_of_a_step_with_real_tensors(options, way):
    more = [option.replace("64", "2") for option in bench.WAYS[way]]
    gb = bench.compare_memory([*options, *more], measured=True)
    assert gb["peak"] == pytest.approx(gb["measured peak"], rel=0.001)


def test_checkpointing_needs_less_and_a_gpu_keeps_float32_inputs_of_layer_norms(
    options, monkeypatch
):
    plain, less = predict(options), predict(options, "--grad_checkpointing")
    assert less["activations"] < plain["activations"] / 3 and less["peak"] < plain["peak"]
    # float32 adds two bytes to each element of bfloat16.
    run, sizes = bench.Run(options), []
    for module in run.model.modules():
        if isinstance(module, LayerNorm) and module is not run.model.visual.ln_pre:  # has float32
            module.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].numel()))
    run.backward()
    gpu = [option for option in options if option != "--device=cpu"]
    with monkeypatch.context() as patched:  # the same attention, but the CPU's layer norms
        flash = torch.backends.cuda.enable_flash_sdp
        patched.setattr(bench, "compute_as_cuda", lambda _: flash(True))
        without = predict(gpu)["activations"]
    assert predict(gpu)["activations"] - without == pytest.approx(2 * sum(sizes), rel=0.02)


def test_the_memory_of_micro_batches_grows_with_the_batch_by_pixels_and_features_only(options):
    small, large = (predict(options, "--micro_batch_size=4", f"--batch_size={n}") for n in (8, 16))
    assert small["activations"] == large["activations"]
    assert predict(options, "--batch_size=16")["activations"] > 2.5 * small["activations"]
    # A pair has 3 x 72 x 72 bytes of pixels, and 2 x 128 features in float32, of which a step
    # holds several copies, gradients among them; the similarities of all pairs are small here.
    pair = 3 * 72**2 + 10 * 2 * 128 * 4
    assert 8 * 3 * 72**2 <= large["peak"] - small["peak"] < 8 * pair


def test_similarities_of_all_pairs_are_counted():
    """The two float32 matrices N x N, and at least one gradient of such a size."""
    images, texts = torch.randn(2, 1024, 4, requires_grad=True).unbind()
    with bench.LiveBytes() as live:
        contrastive_loss(images, texts, 1.0).backward()
    assert 3 <= live.peak / (4 * 1024**2) <= 6


def test_a_part_that_fails_says_so():
    def fail(text):
        raise torch.OutOfMemoryError(text)

    failed = {"failed": "OutOfMemoryError: CUDA out of memory."}
    assert bench.attempt(fail, "CUDA out of memory.\nmore") == failed
    assert bench.attempt(dict) == {}
    assert sum(bench.SHARES.values()) < 8 * 60


def test_a_rehearsal_of_all_that_needs_a_gpu(options, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise torch.OutOfMemoryError("too small a card")

    monkeypatch.setattr(bench, "compare_gradients", broken)
    monkeypatch.setitem(bench.REHEARSAL, "batches", (2,))
    monkeypatch.setattr(bench, "WAYS", {"plain": []})
    path = tmp_path / "bench.json"
    small = [*options[1:], "--batch_size=4", "--image_size=24"]
    assert not run(bench.main, "cuda", "--repeat", 1, "--json", path, *small)
    content, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert content["machine"]["torch"] == torch.__version__
    parts = {}
    for row in content["rows"]:
        parts.setdefault(row["part"], []).append(row)
        assert f"| {row['part']} | {row['what']} |" in printed
        assert ("failed" in row) == (row["part"] == "gradients"), row
    assert parts.keys() == bench.SHARES.keys()
    assert len(parts["step"]) == 4 and all(row["images/s"] > 0 for row in parts["step"])
    assert all(row["measured peak"] > row["weights"] for row in parts["memory, GB"])
    assert parts["loader"][0]["images/s"] > 0
    assert parts["train.py"][0]["loss"] < parts["train.py"][0]["loss at first"]


def test_gradients_agree_with_those_of_the_cpu_in_float32(options):
    same = bench.compare_gradients(options[1:3], "--dtype=float32", "--micro_batch_size=4")
    assert same["losses differ by"] < 1e-5 and same["gradients, relative"] < 1e-4
    rough = bench.compare_gradients(options[1:3], "--dtype=bfloat16")
    assert 1e-4 < rough["gradients, relative"] < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "unused")
    assert error_of(capsys, bench.main, "cuda") == "error: there is no CUDA device here"
