"""The commands of scripts/bench.py run without a GPU, too."""

import json

import pytest
from material import TOKENIZER, coloured, error_of, run

from scripts import bench


@pytest.fixture
def options(shallow, tmp_path):
    """A shallow model of 6 x 6 patches and some 500 tokens, in bfloat16."""
    (tmp_path / "words.tiktoken").write_text(TOKENIZER.vocab)
    return ["--model=tiny", "--device=cpu", f"--vocab={tmp_path}/words.tiktoken", "--batch_size=8"]


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
    "cuda": {"images/s": 1, "TFLOP/s": 5, "loss": 5},
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
