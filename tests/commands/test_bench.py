"""What bench.py predicts is what a step keeps, and its commands run without a GPU, too."""

import json
from itertools import accumulate

import pytest
import torch
from material import TOKENIZER, coloured, run

from scripts import bench
from superclip import LayerNorm


@pytest.fixture
def options(shallow, tmp_path):
    """A shallow model of 6 x 6 patches and some 500 tokens, in bfloat16."""
    (tmp_path / "words.tiktoken").write_text(TOKENIZER.vocab)
    return ["--model=tiny", "--device=cpu", f"--vocab={tmp_path}/words.tiktoken", "--batch_size=8"]


def test_predicted_activations_are_what_autograd_saves(options):
    """And on a GPU, autocast keeps the inputs of layer norms as float32: two bytes more each."""
    step, saved, inputs = bench.Run(options), {}, []
    torch.backends.cuda.enable_flash_sdp(True)  # the attention of a GPU
    for module in step.model.modules():
        if isinstance(module, LayerNorm) and module is not step.model.visual.ln_pre:  # has float32
            module.register_forward_hook(lambda _, x, __: inputs.append(x[0].numel()))

    def pack(x):  # views share a storage, which counts once
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), step.autocast:
        graph = step.model.features_and_terms(**step.batch)
    for x in (*step.model.state_dict().values(), *step.batch.values()):
        saved.pop(x.untyped_storage().data_ptr(), None)
    by_hand = sum(saved.values()) + 2 * sum(inputs)
    assert bench.predict_memory(options)["activations"] == pytest.approx(by_hand, rel=0.02), graph


def test_a_predicted_peak_has_the_size_of_its_parts(options):
    weights = sum(p.nbytes for p in bench.Run(options).model.parameters())
    plain = bench.predict_memory([*options, "--batch_size=128"])
    # AdamW's two moments are there, but few of the gradients while the activations are.
    assert 1 < (plain["peak"] - 3 * weights) / plain["activations"] < 1.3
    # In micro-batches a pair adds its pixels, and less than ten copies of its features.
    micro = [[*options, "--micro_batch_size=8", f"--batch_size={n}"] for n in (16, 32)]
    small, large = map(bench.predict_memory, micro)
    assert small["activations"] == large["activations"]
    assert 0 <= (large["peak"] - small["peak"]) / 16 - 3 * 72**2 < 10 * (2 * 128 * 4)


def test_ratios_are_taken_within_a_round_and_the_first_does_not_count():
    clock = accumulate([0, 9, 0, 9, 0, 1, 0, 3, 0, 2, 0, 2, 0, 4, 0, 2])
    rows = dict(bench.race({"a": int, "b": int}, 3, lambda: next(clock)))
    assert rows["b"] == {"seconds": [2, 2, 3], "ratio to a": [0.5, 1, 3]}


def test_commands_run_and_keep_their_numbers(options, tmp_path):
    shard, path = coloured(tmp_path / "a.tar", *8 * ["a red dog"]), tmp_path / "numbers.json"
    few = [*options, f"--train_data={shard}", "--batch_size=4", "--image_size=24", "--workers=1"]
    names = ("images/s", "TFLOP/s", "peak, GB", "loss")
    for command, counts in (("data", [2, 0, 0, 0]), ("cuda", [1, 4, 3, 5])):
        assert not run(bench.main, command, "--repeat=1", "--json", path, *few)
        rows = json.loads(path.read_text())
        assert [sum(name in row for row in rows) for name in names] == counts
    errors = {row["gradient"]: row["relative error"] for row in rows if "gradient" in row}
    assert all((error < 1e-5) == ("float32" in name) for name, error in errors.items())
