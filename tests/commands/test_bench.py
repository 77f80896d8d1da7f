"""The commands of scripts/bench.py run without a GPU, too."""

import json

import pytest
from material import TOKENIZER, run, write_captions

from scripts import bench

# How many rows have a number of this name
COMMANDS = {
    "data": {"images/s": 2, "ratio to data.py": 2},
    # which runs "step" and "loader", too
    "cuda": {"relative error": 9, "ratio to CLIP": 4, "TFLOP/s": 4, "images/s": 1, "memory_gb": 5},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_and_keep_their_numbers(command, tmp_path, capsys):
    """And in float32, with micro-batches and with checkpointing the gradient is the same. No next
    command is told, because the run's folder is gone."""
    (tmp_path / "words.tiktoken").write_text(TOKENIZER.vocab)
    shard = write_captions(tmp_path / "a.tar", *8 * ["a red dog"])
    numbers = tmp_path / "numbers.json"
    options = f"--model=tiny --device=cpu --batch_size=4 --workers=1 --train_data={shard}".split()
    options += [f"--vocab={tmp_path}/words.tiktoken", "--repeat=1", f"--json={numbers}"]

    assert not run(bench.main, command, *options)

    assert "--checkpoint" not in capsys.readouterr().out
    rows = json.loads(numbers.read_text())
    assert {name: sum(name in row for row in rows) for name in COMMANDS[command]} == (
        COMMANDS[command]
    )
    for row in rows:
        if "gradient" in row:
            assert (row["relative error"] < 1e-5) == ("float32" in row["gradient"])


def test_ratios_are_taken_within_a_round_and_the_first_does_not_count():
    """Of four rounds, a takes 9, 1, 2 and 4 seconds, and b takes 9, 3, 2 and 2."""
    clock = iter([0, 9, 9, 18, 18, 19, 19, 22, 22, 24, 24, 26, 26, 30, 30, 32])

    rows = dict(bench.race({"a": int, "b": int}, 3, lambda: next(clock)))

    assert rows["a"]["seconds"] == [1, 2, 4]  # least, median, most
    assert rows["b"]["ratio to a"] == [0.5, 1, 3]
