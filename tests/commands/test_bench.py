"""The commands of scripts/bench.py run without a GPU, too."""

import re

import pytest
from material import TOKENIZER, run, write_captions

from scripts import bench

# What each command compares, and a number that each of its lines must have
COMMANDS = {
    "data": (["data.py", "webdataset and open_clip"], "images/s"),
    "step": (["CLIP", "SuperCLIP", "open_clip", "matrix product"], "TFLOP/s"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_rival_has_a_line_with_its_speed(command, tmp_path, capsys):
    rivals, unit = COMMANDS[command]
    (tmp_path / "words.tiktoken").write_text(TOKENIZER.vocab)
    shard = write_captions(tmp_path / "a.tar", *8 * ["a red dog"])
    options = f"--model=tiny --device=cpu --batch_size=4 --train_data={shard} --repeat=1".split()

    assert not run(bench.main, command, *options, f"--vocab={tmp_path}/words.tiktoken")

    printed = capsys.readouterr().out
    assert re.findall(rf"^{command} ([^,]+), .*{unit} \d", printed, re.M) == rivals


def test_ratios_are_taken_within_a_round_and_the_first_does_not_count():
    """Of four rounds, a takes 9, 1, 2 and 4 seconds, and b takes 9, 3, 2 and 2."""
    clock = iter([0, 9, 9, 18, 18, 19, 19, 22, 22, 24, 24, 26, 26, 30, 30, 32])

    rows = dict(bench.race({"a": int, "b": int}, 3, lambda: next(clock)))

    assert rows["a"]["seconds"] == [1, 2, 4]  # least, median, most
    assert rows["b"]["ratio to a"] == [0.5, 1, 3]
