"""scripts/show.py: what shards hold, told before training."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from material import COLOURS, png, run, write_shard, write_tar
from PIL import Image

from data import words_to_tiktoken
from scripts import show

PNG = png(COLOURS["red"], np.random.default_rng(0))


@pytest.fixture
def folder(tmp_path):
    """An empty folder with a vocabulary."""
    words = "a red green blue dog cat 1 2 3".split()
    (tmp_path / "vocab.tiktoken").write_text(words_to_tiktoken(words))
    return tmp_path


def captioned(*captions):
    return [{"png": PNG, "txt": caption.encode()} for caption in captions]


@pytest.fixture
def dogs(folder):
    """A shard of eight samples with seven captions, two of which are the same words. Four parts of
    the shard are no sample, or cannot be used."""
    samples = captioned(*(f"a red dog {i}" for i in range(5)), "A red  dog 1")
    samples += [{"png": b"?", "txt": b"a dog"}, {"txt": b"a cat"}, {"png": PNG}, {"v2.png": PNG}]
    return write_shard(folder / "0.tar", samples)


def printed_by(capsys, *argv):
    """What show prints of shards."""
    capsys.readouterr()
    assert not run(show.main, *argv)
    return capsys.readouterr().out


# ---- counts


def test_samples_and_captions_are_counted(dogs, capsys):
    """A shard that is named twice counts once."""
    printed = printed_by(capsys, dogs, dogs)

    assert "8 samples in 1 shards, 7 captions (txt)" in printed


def test_captions_with_a_twin_are_counted(dogs, capsys):
    """Their words are equal, whatever the case and the white space."""
    printed = printed_by(capsys, dogs)

    assert "captions with a twin: 2 (28.6%)" in printed
    assert "2 x a red dog 1" in printed


def test_what_cannot_be_used_is_named(dogs, capsys):
    """No image, no caption, an image that cannot be read, and a name with a second dot."""
    lines = [line.split() for line in printed_by(capsys, dogs).splitlines()]

    assert ["not", "used:", "4"] in lines
    named = {line[1].rstrip(":") for line in lines if line and line[0].endswith("0.tar")}
    assert {"0006", "0007", "0008", "*.v2.png"} <= named


def test_label_weights_by_hand(dogs, capsys):
    """Of "a red dog 3": of seven captions, "3" is in one, "red" in six, "a" and "dog" in all."""
    weights = {"3": math.log(8 / 2), "red": math.log(8 / 7), "a": 0, "dog": 0}

    printed = printed_by(capsys, dogs)

    shares = [f"{word} {weight / sum(weights.values()):.2f}" for word, weight in weights.items()]
    assert f"label: {'  '.join(shares)}" in printed


def test_the_picture_is_drawn(dogs, folder, capsys):
    printed_by(capsys, dogs, "--picture", folder / "grid.png")

    assert Image.open(folder / "grid.png").width > 4 * show.SIDE


def test_what_validation_shares_with_training_is_counted(folder, capsys):
    """An image counts if its bytes are equal, a caption if its words are."""
    other = png(COLOURS["blue"], np.random.default_rng(1))
    train = write_shard(folder / "0.tar", captioned("a red dog", "a dog"))
    both = [{"png": PNG, "txt": b"A RED  dog"}, {"png": other, "txt": b"a red dog"}]
    val = write_shard(folder / "1.tar", [*both, {"png": other, "txt": b"a cat"}])

    printed = printed_by(capsys, train, "--val_data", val)

    assert "1 of 3 images and the captions of 2\n" in printed


# ---- twins in a batch


@pytest.mark.parametrize("batch_size", [2, 6, 12])
def test_the_share_of_pairs_that_meet_a_twin_is_that_of_all_batches(batch_size):
    """Of all that can be made of these 13 captions, one by one."""
    repeats = Counter(a=1, b=2, c=5, d=4, e=1)
    shares = []
    for batch in itertools.combinations(repeats.elements(), batch_size):
        twins = [n for n in Counter(batch).values() if n > 1]
        shares.append(sum(twins) / batch_size)

    assert show.share_with_twin(repeats, batch_size) == pytest.approx(np.mean(shares))


EXTREMES = {
    "a batch of all": (Counter(a=1, b=2, c=5, d=4, e=1), 256, 11 / 13),
    "no twins": (Counter(a=1), 32, 0),
    "one of 19,999 others is the twin": (Counter({i: 2 for i in range(10_000)}), 256, 255 / 19_999),
}


@pytest.mark.parametrize("repeats, batch_size, share", EXTREMES.values(), ids=EXTREMES)
def test_the_share_that_meets_a_twin_by_hand(repeats, batch_size, share):
    assert show.share_with_twin(repeats, batch_size) == pytest.approx(share)


# ---- odd texts


def test_twins_within_a_sample_and_half_of_a_surrogate_pair_do_no_harm(folder, capsys):
    captions = {"captions": ["a red dog", "A red dog", "\ud800 \ud83d\ude00 cat"]}
    sample = {"png": PNG, "json": json.dumps(captions).encode()}
    path = write_shard(folder / "0.tar", [sample])

    printed = printed_by(capsys, path, "--captions", "json.captions")

    assert "3 captions" in printed and "captions with a twin: 0" in printed
    printed.encode()  # would be an error on a terminal, too


def test_names_that_are_not_utf8_and_samples_without_captions_do_no_harm(folder, capsys):
    names = ["caf\udce9.png", "a.png", "\udce9.txt"]
    path = write_tar(folder / "1.tar", [(name, PNG) for name in names])

    printed = printed_by(capsys, path, "--picture", folder / "grid.png")

    assert "2 samples in 1 shards, 0 captions" in printed and "not used: 3" in printed
    printed.encode()
