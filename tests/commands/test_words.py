"""The head's words and where they are seen: by the slow formula, by hand, and as a picture."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from material import (
    TOKENIZER,
    Seer,
    encoded,
    error_of,
    make_model,
    run,
    write_shard,
)
from PIL import Image

import data
import eval as evaluation
from scripts import words
from scripts.pictures import GAP


@torch.no_grad()
def test_top_words_are_the_softmax_of_the_head():
    """Padding, start and end are no words, however probable they are."""
    model = make_model()
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    ids = [TOKENIZER.encode(word)[0] for word in ("red", "green")]
    model.head.linear.bias[[*ids, 0, TOKENIZER.start, TOKENIZER.end]] += 9.0

    [found] = evaluation.top_words(model, TOKENIZER, images, k=2)

    row = model.class_logits(images).softmax(dim=1)[0]
    expected = [("red", row[ids[0]].item(), ids[0]), ("green", row[ids[1]].item(), ids[1])]
    assert found == sorted(expected, key=lambda word: -word[1])


@torch.no_grad()
def test_word_maps_are_those_of_the_slow_loop():
    """One window after the other is left out, on a grid of 4 x 4 patches."""
    model = make_model()
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    ids = [TOKENIZER.encode(word)[0] for word in ("red", "ring", "a")]

    _, maps = words.word_maps(model, image[0], ids, window=3, batch_size=3)

    whole = model.class_logits(image).log_softmax(dim=1)[0, ids]
    total = torch.zeros(3, 4, 4)
    times = torch.zeros(4, 4)
    for y, x in itertools.product(range(2), repeat=2):
        inside = torch.zeros(4, 4)
        inside[y : y + 3, x : x + 3] = 1
        keep = (inside == 0).flatten().nonzero().T  # (1, patches that are left)
        fall = whole - model.class_logits(image, keep).log_softmax(dim=1)[0, ids]
        total += fall[:, None, None] * inside
        times += inside
    torch.testing.assert_close(maps, total / times, atol=1e-5, rtol=1e-4)


@pytest.fixture
def shard_of_a_scene(tmp_path):
    """A scene of 6 x 6 patches, with a red square and a blue ring. Purple is no token."""
    pixels = np.zeros((24, 24, 3), np.uint8)
    pixels[0:8, 0:8, 0] = 255
    pixels[16:24, 4:12, 2] = 255
    objects = [
        {"colour": "red", "shape": "square", "box": [0.02, 0.02, 0.31, 0.31]},
        {"colour": "blue", "shape": "ring", "box": [0.19, 0.69, 0.48, 0.98]},
        {"colour": "purple", "shape": "purple", "box": [0.5, 0.5, 1, 1]},
    ]
    scene = json.dumps({"scene": {"objects": objects}}).encode()
    picture = encoded(Image.fromarray(pixels), "PNG")
    return write_shard(tmp_path / "0.tar", [{"png": picture, "json": scene, "txt": b"red"}])


LOUDNESS = {
    "looks at the object": (1, 1.0),
    "looks away from it": (-1, 0.0),
    "does not look": (0, 1 / 25),
}


@pytest.mark.parametrize("loudness, value", LOUDNESS.values(), ids=LOUDNESS)
def test_localisation_by_hand(shard_of_a_scene, loudness, value):
    """One of 5 x 5 windows has its centre on a word's object."""
    pairs = data.Pairs([shard_of_a_scene], TOKENIZER, 24)
    picture = words.read_scene(pairs, pairs.index[0].tolist())

    score = words.localisation(Seer(loudness), [picture], window=2)

    assert score["value"] == pytest.approx(value)
    assert score["chance"] == pytest.approx(1 / 25)


def test_the_picture_is_red_where_a_word_loses_and_blue_where_it_gains(tmp_path):
    image = torch.full((3, 16, 16), 128, dtype=torch.uint8)
    maps = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])

    words.draw_words([("one.png", image, [("red", 0.5, 1)], maps)], 2, tmp_path / "words.png")

    sheet = Image.open(tmp_path / "words.png")
    left = GAP + words.CELL + GAP  # of the map, beside the photograph
    red = sheet.getpixel((left + 9, GAP + 9))
    blue = sheet.getpixel((left + words.CELL - 9, GAP + 9))
    assert red[0] > 150 > red[2]
    assert blue[2] > 150 > blue[0]


def test_files_and_folders_are_looked_at_once(folders, checkpoint, capsys):
    broken = folders / "red" / "0.png"
    broken.write_bytes(b"no image")
    argv = ["--checkpoint", checkpoint, "--image", folders / "blue" / "1.png", folders]

    assert not run(words.main, *argv)

    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    others = [str(file) for file in folders.glob("*/*.png") if file != broken]
    assert sorted(names) == sorted([*others, f"skipped {broken}"])


def test_the_score_of_the_maps_is_printed(shard_of_a_scene, checkpoint, capsys):
    assert not run(words.main, "--checkpoint", checkpoint, "--data", shard_of_a_scene)

    assert re.search(r"right place +\d.* chance .* n 1\n", capsys.readouterr().out)


def test_a_word_of_ones_own_takes_the_place_of_the_top_words(folders, checkpoint, capsys):
    file = folders / "red" / "0.png"

    assert not run(words.main, "--checkpoint", checkpoint, "--image", file, "--word", "ring")

    assert re.fullmatch(rf"{file}: ring 0\.\d+\n", capsys.readouterr().out)


def test_a_word_that_is_no_token_is_named(checkpoint, capsys):
    assert "zebra" in error_of(capsys, words.main, "--checkpoint", checkpoint, "--word", "zebra")


def test_without_images_or_a_run_a_model_needs_some(checkpoint, capsys):
    """But for one of the built-in scenes (pages/test_tiny_model.py)."""
    assert "--image" in error_of(capsys, words.main, "--checkpoint", checkpoint)
