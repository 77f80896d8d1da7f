"""The head's words and where they are seen: by the slow formula, by hand, and as a picture."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from material import (
    TOKENIZER,
    Seer,
    coloured,
    encoded,
    error_of,
    make_model,
    result_of,
    write_shard,
)
from PIL import Image

import data
import eval as evaluation
from scripts import words
from scripts.pictures import GAP


@torch.no_grad()
def test_top_words_are_the_softmax_of_the_head():
    model = make_model()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    names = ["red", "green", "blue", "q-"]
    shown = [TOKENIZER.encode(name)[0] for name in names[:3]] + [data.BYTES.index(ord("q"))]
    no_words = [0, TOKENIZER.start, TOKENIZER.end]
    model.head.linear.bias[shown + no_words] += 9.0

    found = evaluation.top_words(model, TOKENIZER, images, k=4)

    probabilities = model.class_logits(images).softmax(dim=1)
    for row, words_of_image in zip(probabilities, found, strict=True):
        assert {(word, i) for word, _, i in words_of_image} == set(zip(names, shown))
        assert [p for _, p, _ in words_of_image] == sorted(row[shown].tolist(), reverse=True)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 3])
def test_word_maps_are_those_of_the_slow_loop(window):
    """One window after the other is left out, on a grid of 4 x 4 patches."""
    model = make_model()
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    ids = [TOKENIZER.encode(word)[0] for word in ("red", "ring", "a")]

    falls, maps = words.word_maps(model, image, ids, window, batch_size=3)

    whole = model.class_logits(image[None]).log_softmax(dim=1)[0, ids]
    slow_falls = []
    total = torch.zeros(3, 4, 4)
    times = torch.zeros(4, 4)
    for y, x in itertools.product(range(5 - window), repeat=2):
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[y : y + window, x : x + window] = True
        keep = (~inside).flatten().nonzero().T  # (1, patches that are left)
        fall = whole - model.class_logits(image[None], keep).log_softmax(dim=1)[0, ids]
        slow_falls.append(fall)
        total += fall[:, None, None] * inside
        times += inside
    torch.testing.assert_close(falls, torch.stack(slow_falls, dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps, total / times, atol=1e-5, rtol=1e-4)


def thing(colour, shape, x, y):
    """An object of 2 x 2 patches, as the file of a scene has it."""
    box = [(x + 0.1) / 6, (y + 0.1) / 6, (x + 1.9) / 6, (y + 1.9) / 6]
    return {"colour": colour, "shape": shape, "box": box}


@pytest.fixture
def shard_of_scenes(tmp_path):
    """Two scenes on a grid of 6 x 6 patches, with a red square and a blue ring in each. Purple is
    no token of the vocabulary."""
    samples = []
    for i in range(2):
        pixels = np.zeros((24, 24, 3), np.uint8)
        pixels[0:8, 4 * i : 4 * i + 8, 0] = 255  # the red square in row 0 and column i
        pixels[16 - 4 * i : 24 - 4 * i, 4:12, 2] = 255  # the blue ring in row 4 - i and column 1
        objects = [thing("red", "square", i, 0), thing("blue", "ring", 1, 4 - i)]
        objects += [thing("purple", "purple", 4, 0)]
        scene = json.dumps({"scene": {"objects": objects}}).encode()
        picture = encoded(Image.fromarray(pixels), "PNG")
        samples.append({"png": picture, "json": scene, "txt": b"red"})
    return write_shard(tmp_path / "scenes.tar", samples)


LOUDNESS = {
    "looks at the object": (1, 1.0),
    "looks away from it": (-1, 0.0),
    "does not look": (0, 1 / 25),
    "is NaN": (math.nan, 0.0),
}


@pytest.mark.parametrize("loudness, value", LOUDNESS.values(), ids=LOUDNESS)
def test_localisation_by_hand(shard_of_scenes, loudness, value):
    """One of 5 x 5 windows has its centre on a word's object. A scene counts once."""
    pairs = data.Pairs([shard_of_scenes], TOKENIZER, 24)
    pictures = [words.read_scene(pairs, row) for row in pairs.index.tolist()]

    score = words.localisation(Seer(loudness), pictures, window=2)

    assert score["value"] == pytest.approx(value)
    assert score["chance"] == pytest.approx(1 / 25)
    assert score["n"] == 2


def test_the_picture_is_red_where_a_word_loses_and_blue_where_it_gains(tmp_path):
    image = torch.full((3, 16, 16), 128, dtype=torch.uint8)
    maps = torch.zeros(1, 4, 4)
    maps[0, 0] = torch.tensor([1.0, 0.5, 0.0, -1.0])  # the first row

    words.draw_words([("one.png", image, [("red", 0.5, 1)], maps)], 2, tmp_path / "words.png")

    sheet = Image.open(tmp_path / "words.png")
    side = words.CELL // 4
    x = GAP + words.CELL + GAP + side // 2  # the middle of the first patch of the map
    y = GAP + side // 2
    red, weak, neutral, blue = (sheet.getpixel((x + i * side, y)) for i in range(4))
    assert sheet.getpixel((GAP, GAP)) == (128, 128, 128)  # the photograph
    assert red[0] > 150 > red[2]
    assert blue[2] > 150 > blue[0]
    assert len(set(neutral)) == 1
    assert red[1] < weak[1] < neutral[1]  # half the fall, half the colour


def test_files_and_folders_are_looked_at_once(folders, checkpoint, tmp_path, capsys):
    """A link is no other file, and a broken image is skipped."""
    broken = folders / "red" / "0.png"
    broken.write_bytes(b"no image")
    link = folders / "green" / "link.png"
    link.symlink_to("0.png")
    argv = ["--checkpoint", checkpoint, "--k", 3, "--image", folders / "blue" / "1.png", folders]

    result, printed = result_of(capsys, words.main, tmp_path / "result.json", *argv)

    files = set(folders.glob("*/*.png")) - {broken, link}
    assert result["images"].keys() == {str(file) for file in files}
    assert f"skipped {broken}" in printed
    for file, found in result["images"].items():
        top = ", ".join(f"{part['word']} {part['probability']:.3f}" for part in found)
        assert f"{file}: {top}\n" in printed


def test_the_score_of_the_maps_is_printed_and_kept(shard_of_scenes, checkpoint, tmp_path, capsys):
    argv = ["--checkpoint", checkpoint, "--data", shard_of_scenes]

    result, printed = result_of(capsys, words.main, tmp_path / "result.json", *argv)

    assert evaluation.format_score("right place", result["localisation"]) in printed
    assert result["localisation"]["n"] == 2


def test_a_word_of_ones_own_takes_the_place_of_the_top_words(folders, checkpoint, tmp_path, capsys):
    file = folders / "red" / "0.png"
    argv = ["--checkpoint", checkpoint, "--image", file, "--word", "ring", "--word", "red"]

    result, _ = result_of(capsys, words.main, tmp_path / "result.json", *argv)

    logits = make_model().class_logits(evaluation.read_image(file, 16)[None])[0]
    expected = [logits.softmax(dim=0)[TOKENIZER.encode(word)].item() for word in ("ring", "red")]
    found = result["images"][str(file)]
    assert [part["word"] for part in found] == ["ring", "red"]
    assert [part["probability"] for part in found] == pytest.approx(expected)


def test_a_word_that_is_no_token_is_named(checkpoint, capsys):
    assert "zebra" in error_of(capsys, words.main, "--checkpoint", checkpoint, "--word", "zebra")


def test_without_images_the_validation_pictures_of_the_run_are_shown(tmp_path, capsys):
    """At even distances, by the captions that it validated on."""
    texts = [f"a {colour} ring number {i}" for i in range(6) for colour in ("red", "blue")]
    arguments = {"val_data": [coloured(tmp_path / "val.tar", *texts)]}
    arguments |= {"val_captions": ["txt"], "captions": ["json.short"]}
    path = tmp_path / "best.pt"
    header = {"arguments": arguments}
    evaluation.write_checkpoint(path, make_model(), TOKENIZER.vocab, header=header)

    result, _ = result_of(capsys, words.main, tmp_path / "x.json", "--checkpoint", path)

    assert [name.split('"')[1] for name in result["images"]] == texts[::2]


def test_without_images_or_a_run_a_model_needs_some(checkpoint, capsys):
    """But for one of the built-in scenes (pages/test_tiny_model.py)."""
    assert "--image" in error_of(capsys, words.main, "--checkpoint", checkpoint)
