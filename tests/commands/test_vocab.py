"""scripts/vocab.py: a vocabulary of the words in the captions of shards."""

import numpy as np
import pytest
from material import COLOURS, coloured, png, run, write_shard

import data
from scripts import vocab


@pytest.fixture
def shard(tmp_path):
    """Four captions with six words: red and dog three times, and one that is not UTF-8."""
    captions = [b"A red dog", b"a Red dog!!", b"the dog's red ball", b"a dog", b"\xff"]
    picture = png(COLOURS["red"], np.random.default_rng(0))
    return write_shard(tmp_path / "0.tar", [{"png": picture, "txt": text} for text in captions])


def words_of(path):
    """The words of a vocabulary, in order."""
    tokenizer = data.Tokenizer.from_file(path)
    return [tokenizer.decode([i]) for i in range(512, tokenizer.start)]


def test_a_vocabulary_has_all_words_that_are_longer_than_a_letter(shard, tmp_path):
    """A letter is a byte, which has a token already."""
    out = tmp_path / "vocab.tiktoken"

    assert not run(vocab.main, shard, "--out", out)

    assert words_of(out)[:2] == ["red", "dog"]
    assert {*words_of(out)} == {"red", "dog", "!!", "the", "dog's", "ball"}


def test_of_a_size_it_has_the_most_frequent_words(shard, tmp_path, capsys):
    """517 = 512 for the bytes, three words, start and end."""
    out = tmp_path / "vocab.tiktoken"

    assert not run(vocab.main, shard, "--size", 517, "--out", out)

    assert "517 entries" in capsys.readouterr().out
    assert len(words_of(out)) == 3
    tokenizer = data.tokenizer_for([shard])  # it lies beside the shards
    assert tokenizer.encode("a Red dog")[1:] == [512, 513]


def test_validation_shards_are_left_out_and_named(tmp_path, capsys):
    train = coloured(tmp_path / "train-0.tar", "a red dog")
    val = coloured(tmp_path / "val-0.tar", "a blue cat")
    out = tmp_path / "vocab.tiktoken"

    assert not run(vocab.main, train, val, "--out", out)

    assert words_of(out) == ["red", "dog"]
    assert val in capsys.readouterr().out


def test_if_all_shards_are_used_none_is_named(shard, tmp_path, capsys):
    assert not run(vocab.main, shard, "--out", tmp_path / "vocab.tiktoken")

    assert "validation" not in capsys.readouterr().out
