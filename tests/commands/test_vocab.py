"""Test scripts/vocab.py, which makes a vocabulary of the words in the captions of shards."""

from material import png, run, write_shard

from common.tokenizer import tokenizer_for
from scripts import vocab


def test_a_vocabulary_has_the_most_frequent_words_of_training(tmp_path, capsys):
    """The 517 tokens are 512 for the bytes, three words, start and end. The word "a" is not among
    them, because it is a byte, which has a token already. The caption that is not UTF-8 is left
    out. The vocabulary lacks dog's and !!, two of the twelve words in the other captions. No word
    of a prompt is added, because its token would never be trained."""
    picture = png("red")
    captions = [b"a red dog's", b"the red dog!!", b"the Red dog", b"a dog", b"\xff"]
    train = write_shard(tmp_path / "train-0.tar", [{"png": picture, "txt": c} for c in captions])
    val = write_shard(tmp_path / "val-0.tar", [{"png": picture, "txt": b"a cat"}])

    assert not run(vocab.main, train, val, "--size", 517)
    assert not run(vocab.main, train, "--size", 517, "--out", tmp_path / "other.tiktoken")

    assert (tmp_path / "other.tiktoken").read_text() == (tmp_path / "vocab.tiktoken").read_text()
    tokenizer = tokenizer_for([train])  # the file lies beside the shards
    words = [tokenizer.decode([i]) for i in range(512, tokenizer.start)]
    assert words == ["red", "dog", "the"]
    assert f"{10 / 12:.1%}" in capsys.readouterr().out
