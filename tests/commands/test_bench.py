"""The commands of scripts/bench.py run without a GPU, too."""

import re

import pytest
from material import TOKENIZER, run, write_captions

from scripts import bench

RIVALS = {
    "data": ["data.py", "webdataset and open_clip"],
    "step": ["CLIP", "SuperCLIP", "open_clip"],
}


@pytest.mark.parametrize("command", RIVALS)
def test_each_rival_has_a_line_with_its_speed(command, tmp_path, capsys):
    (tmp_path / "words.tiktoken").write_text(TOKENIZER.vocab)
    shard = write_captions(tmp_path / "a.tar", *8 * ["a red dog"])
    options = f"--model=tiny --device=cpu --batch_size=4 --train_data={shard} --repeat=1".split()

    assert not run(bench.main, command, *options, f"--vocab={tmp_path}/words.tiktoken")

    printed = capsys.readouterr().out
    assert re.findall(r"^(.+): [\d,.]+ images/s", printed, re.M) == RIVALS[command]


def test_ratios_are_taken_within_a_round_and_the_first_does_not_count(capsys):
    """Of four rounds, a takes 9, 1, 2 and 4 seconds, and b takes 9, 3, 2 and 2."""
    clock = iter([0, 9, 9, 18, 18, 19, 19, 22, 22, 24, 24, 26, 26, 30, 30, 32])

    seconds = bench.race({"a": int, "b": int}, 3, lambda: next(clock))
    bench.print_speeds(seconds, images=8)

    assert seconds == {"a": [1, 2, 4], "b": [3, 2, 2]}
    a, b = capsys.readouterr().out.splitlines()
    assert "4.0 images/s" in a and "2 (1-4) seconds" in a
    assert "1 (0.5-3) times" in b
