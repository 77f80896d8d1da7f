"""What bench.py predicts is what a step keeps, and its commands run without a GPU, too."""

import json

import pytest
import torch
from material import TOKENIZER, coloured, error_of, run

from scripts import bench
from superclip import LayerNorm


@pytest.fixture
def options(shallow, tmp_path):
    """A shallow model of 6 x 6 patches and some 500 tokens, in bfloat16."""
    (tmp_path / "words.tiktoken").write_text(TOKENIZER.vocab)
    return ["--model=tiny", "--device=cpu", f"--vocab={tmp_path}/words.tiktoken", "--batch_size=8"]


def saved_bytes(step):
    """The bytes that autograd keeps for the backward pass of a step, without weights and batch."""
    storages = {}

    def pack(x):  # views share a storage, which counts once
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), step.autocast:
        graph = step.model.features_and_terms(**step.batch)
    for x in (*step.model.state_dict().values(), *step.batch.values()):
        storages.pop(x.untyped_storage().data_ptr(), None)
    del graph  # which has kept them alive until here
    return sum(storages.values())


def test_predicted_activations_are_what_autograd_saves(options):
    """And on a GPU, autocast keeps the inputs of layer norms as float32: two bytes more each."""
    step = bench.Run(options)
    torch.backends.cuda.enable_flash_sdp(True)  # the attention of a GPU
    numbers = []  # in the inputs of layer norms
    for module in step.model.modules():
        if isinstance(module, LayerNorm) and module is not step.model.visual.ln_pre:  # has float32
            module.register_forward_hook(lambda _, x, __: numbers.append(x[0].numel()))

    predicted = bench.predict_memory(options)["activations"]

    assert predicted == pytest.approx(saved_bytes(step) + 2 * sum(numbers), rel=0.02)


def test_a_micro_batch_needs_the_activations_of_a_batch_of_its_size(options):
    plain = bench.predict_memory(options)
    micro = bench.predict_memory([*options, "--micro_batch_size=8", "--batch_size=16"])

    assert micro["activations"] == pytest.approx(plain["activations"], rel=0.02)


def test_ratios_are_taken_within_a_round_and_the_first_does_not_count():
    seconds = {"a": [9, 1, 2, 4], "b": [9, 3, 2, 2]}  # of four rounds
    now = 0
    times = []  # what the clock shows before and after each turn
    for turn in zip(seconds["a"], seconds["b"]):
        for length in turn:
            times += [now, now + length]
            now += length
    clock = iter(times)

    rows = dict(bench.race({"a": int, "b": int}, 3, lambda: next(clock)))

    assert rows["a"]["seconds"] == [1, 2, 4]  # least, median, most
    assert rows["b"]["seconds"] == [2, 2, 3]
    assert rows["b"]["ratio to a"] == [0.5, 1, 3]


@pytest.fixture
def few(options, smallest, tmp_path):
    """Options for a run of the smallest model on eight pairs."""
    shard = coloured(tmp_path / "a.tar", *8 * ["a red dog"])
    return [*options, f"--train_data={shard}", "--batch_size=4", "--workers=1"]


COMMANDS = {
    "data": {"images/s": 2},
    "loader": {"images/s": 1},
    "step": {"TFLOP/s": 5},
    "cuda": {"images/s": 1, "TFLOP/s": 5, "peak, GB": 3, "loss": 5},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_and_keep_their_numbers(command, few, tmp_path):
    """So many rows have a number of this name."""
    path = tmp_path / "numbers.json"

    assert not run(bench.main, command, "--repeat=1", "--json", path, *few)

    rows = json.loads(path.read_text())
    for name, n in COMMANDS[command].items():
        assert sum(name in row for row in rows) == n
    for row in rows:
        if "gradient" in row:
            assert (row["relative error"] < 1e-5) == ("float32" in row["gradient"])


@pytest.mark.parametrize("command", ["data", "loader"])
def test_a_batch_of_more_than_all_pairs_is_refused(command, few, capsys):
    error = error_of(capsys, bench.main, command, *few, "--batch_size=9")

    assert "--batch_size" in error
