"""scripts/show.py and vocab.py: what shards hold, told before training, and a vocabulary of it."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from material import COLOURS, coloured, png, write_shard, write_tar
from PIL import Image

import data
from data import words_to_tiktoken
from scripts import show, vocab

PNG = png(COLOURS["red"], np.random.default_rng(0))


@pytest.fixture
def folder(tmp_path):
    words = "a red green blue dog cat 1 2 3".split()
    (tmp_path / "vocab.tiktoken").write_text(words_to_tiktoken(words))
    return tmp_path


def printed_by(capsys, *argv):
    show.main(list(map(str, argv)))
    return capsys.readouterr().out


def captioned(*captions):
    return [{"png": PNG, "txt": caption.encode()} for caption in captions]


def test_show_counts_prints_and_draws(folder, capsys):
    samples = captioned(*(f"a red dog {i}" for i in range(5)), "A red  dog 1")
    samples += [{"png": b"?", "txt": b"a dog"}, {"txt": b"a cat"}, {"png": PNG}, {"v2.png": PNG}]
    path = write_shard(folder / "0.tar", samples)
    printed = printed_by(capsys, path, path, "--picture", folder / "grid.png")
    lines = [line.split() for line in printed.splitlines()]
    assert "8 samples in 1 shards, 7 captions (txt)" in printed
    assert "captions with a twin: 2 (28.6%)" in printed and "2 x a red dog 1" in printed
    assert ["not", "used:", "4"] in lines
    named = {line[1].rstrip(":") for line in lines if line and line[0].endswith("0.tar")}
    assert {"0006", "0007", "0008", "*.v2.png"} <= named
    # Label weights by hand: caption "a red dog 3", seven captions, "3" in one of them.
    weights = {"a": math.log(8 / 8), "red": math.log(8 / 7), "3": math.log(8 / 2)}
    share = {word: weight / sum(weights.values()) for word, weight in weights.items()}
    assert f"label: 3 {share['3']:.2f}  red {share['red']:.2f}  a 0.00  dog 0.00" in printed
    assert Image.open(folder / "grid.png").width > 4 * show.SIDE


def test_the_share_of_pairs_that_meet_a_twin_is_that_of_all_batches():
    repeats = Counter(a=1, b=2, c=5, d=4, e=1)
    for batch_size in (2, 6, 12):
        batches = itertools.combinations(repeats.elements(), batch_size)
        met = [sum(n for n in Counter(x).values() if n > 1) / batch_size for x in batches]
        assert show.share_with_twin(repeats, batch_size) == pytest.approx(np.mean(met))
    assert show.share_with_twin(repeats, 256) == pytest.approx(11 / 13)  # all are in the batch
    assert show.share_with_twin(Counter(a=1), 32) == 0
    large = Counter({i: 2 for i in range(10_000)})  # one of 19,999 others is the twin
    assert show.share_with_twin(large, 256) == pytest.approx(255 / 19_999)


def test_odd_texts_and_names_do_no_harm(folder, capsys):
    """Twins within a sample, half of a surrogate pair, names that are not UTF-8, no caption."""
    captions = json.dumps({"captions": ["a red dog", "A red dog", "\ud800 \ud83d\ude00 cat"]})
    path = write_shard(folder / "0.tar", [{"png": PNG, "json": captions.encode()}])
    printed = printed_by(capsys, path, "--captions", "json.captions")
    assert "3 captions" in printed and "captions with a twin: 0" in printed
    printed.encode()  # would be an error on a terminal, too
    names = "caf\udce9.png", "a.png", "\udce9.txt"
    path = write_tar(folder / "1.tar", [(name, PNG) for name in names])
    printed = printed_by(capsys, path, "--picture", folder / "grid.png")
    assert "2 samples in 1 shards, 0 captions" in printed and "not used: 3" in printed
    printed.encode()


def test_what_validation_shares_with_training_is_counted(folder, capsys):
    """An image counts if its bytes are equal, a caption if its words are."""
    other = png(COLOURS["blue"], np.random.default_rng(1))
    path = write_shard(folder / "0.tar", captioned("a red dog", "a dog"))
    both = [{"png": PNG, "txt": b"A RED  dog"}, {"png": other, "txt": b"a red dog"}]
    val = write_shard(folder / "1.tar", [*both, {"png": other, "txt": b"a cat"}])
    assert "1 of 3 images and the captions of 2\n" in printed_by(capsys, path, "--val_data", val)


def test_vocab_takes_the_most_frequent_words(tmp_path, capsys):
    captions = ["A red dog", "a Red dog!!", "the dog's red ball", "a dog"]
    path = write_shard(tmp_path / "0.tar", [*captioned(*captions), {"png": PNG, "txt": b"\xff"}])
    out = tmp_path / "vocab.tiktoken"
    vocab.main([str(path), "--size", "517", "--out", str(out)])
    assert "517 entries" in capsys.readouterr().out
    tokenizer = data.tokenizer_for([path])
    assert [tokenizer.decode([i]) for i in (512, 513)] == ["red", "dog"]
    assert tokenizer.encode("a Red dog")[1:] == [512, 513]
    vocab.main([str(path), "--out", str(out)])  # all: red, dog, !!, the, dog's, ball
    assert data.Tokenizer.from_file(out).vocab_size == 514 + 6
    assert "validation" not in capsys.readouterr().out
    both = [coloured(tmp_path / f"{side}-0.tar", "a dog") for side in ("train", "val")]
    vocab.main([*both, "--out", str(out)])  # a mistake, mostly
    assert "validation" in capsys.readouterr().out
