"""scripts/bench.py times all rivals, without a GPU, too."""

import re

from material import TOKENIZER, run

from scripts import bench


def test_each_rival_has_a_line_with_its_speed(tmp_path, capsys):
    vocab = tmp_path / "words.tiktoken"
    vocab.write_text(TOKENIZER.vocab)
    options = f"--model=tiny --device=cpu --batch_size=4 --repeat=1 --vocab={vocab}".split()

    assert not run(bench.main, *options)

    rivals = re.findall(r"^(.+): [\d,.]+ images/s", capsys.readouterr().out, re.M)
    assert rivals == ["CLIP", "SuperCLIP", "open_clip"]


def test_ratios_are_taken_within_a_round_and_the_first_does_not_count(capsys):
    """Of four rounds, a takes 9, 1, 2 and 4 seconds, and b takes 9, 3, 2 and 2."""
    clock = iter([0, 9, 9, 18, 18, 19, 19, 22, 22, 24, 24, 26, 26, 30, 30, 32])

    seconds = bench.race({"a": int, "b": int}, 3, lambda: next(clock))
    bench.print_speeds(seconds, images=8)

    a, b = capsys.readouterr().out.splitlines()
    assert "2 (1-4) seconds" in a and "1 (0.5-3) times" in b
