"""scripts/show.py: what shards hold, told before training."""

import pytest
from material import png, run, write_shard
from PIL import Image

from scripts import show
from tokenizer import words_to_tiktoken

PNG = png("red")


@pytest.fixture
def dogs(tmp_path):
    """A shard of eight samples with seven captions, two of which are the same words. Four parts of
    the shard are no sample, or cannot be used. A vocabulary lies beside it."""
    words = "a red green blue dog cat 1 2 3".split()
    (tmp_path / "vocab.tiktoken").write_text(words_to_tiktoken(words))
    captions = ["a red dog 0", "a red dog 1", "a red dog 2", "a red dog 3", "a red dog 4"]
    captions.append("A red dog 1")
    samples = [{"png": PNG, "txt": caption.encode()} for caption in captions]
    samples += [
        {"png": b"?", "txt": b"a dog dog"},
        {"txt": b"a cat"},
        {"png": PNG},
        {"v2.png": PNG},
    ]
    return write_shard(tmp_path / "0.tar", samples)


@pytest.fixture
def printed(dogs, capsys):
    """What show prints of the shard. That it is named twice does not count."""
    assert not run(show.main, dogs, dogs)
    return capsys.readouterr().out


def test_samples_and_captions_are_counted_and_equal_ones_are_twins(printed):
    """Captions are equal if their words are."""
    assert "8 samples in 1 shards, 7 captions" in printed
    assert "captions with a twin: 2 (28.6%)" in printed


def test_what_cannot_be_used_is_named(dogs, printed):
    """No image, no caption, an image that cannot be read, and a name with a second dot."""
    assert "not used: 4\n" in printed
    for key in ("0006", "0007", "0008", "*.v2.png"):
        assert f"such as {dogs}:{key}\n" in printed


def test_label_weights_by_hand(printed):
    """Of "a red dog 3": of seven captions, "3" is in one, "red" in six, "a" and "dog" in all. So
    their weights are log(8 / 2) = 1.386, log(8 / 7) = 0.134 and 0, which add up to 1.52."""
    assert "label: 3 0.91  red 0.09  a 0.00  dog 0.00" in printed


def test_the_picture_is_drawn(dogs, tmp_path):
    assert not run(show.main, dogs, "--picture", tmp_path / "grid.png")

    assert Image.open(tmp_path / "grid.png").width > 4 * show.SIDE
