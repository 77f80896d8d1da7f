"""The head's words and where they are seen: by the slow formula, by hand, and as a picture."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from material import (
    COLOURS,
    TOKENIZER,
    Seer,
    coloured,
    error_of,
    make_model,
    result_of,
    write_shard,
)
from PIL import Image

import data
import eval as evaluation
from data import words_to_tiktoken
from scripts import words
from scripts.pictures import GAP
from scripts.scenes import vocabulary


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
    """Two scenes on a grid of 6 x 6 patches, with a red square and a blue ring in each."""
    samples = []
    for i in range(2):
        pixels = np.zeros((24, 24, 3), np.uint8)
        pixels[0:8, 4 * i : 4 * i + 8, 0] = 255  # the red square in row 0 and column i
        pixels[16 - 4 * i : 24 - 4 * i, 4:12, 2] = 255  # the blue ring in row 4 - i and column 1
        Image.fromarray(pixels).save(tmp_path / "x.png")
        objects = [thing("red", "square", i, 0), thing("blue", "ring", 1, 4 - i)]
        scene = json.dumps({"scene": {"objects": objects}}).encode()
        samples.append({"png": (tmp_path / "x.png").read_bytes(), "json": scene, "txt": b"red"})
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


def test_words_of_several_tokens_are_not_looked_for(shard_of_scenes):
    tokenizer = data.Tokenizer(words_to_tiktoken(["ring", "square", "blue"]))  # no red
    pairs = data.Pairs([shard_of_scenes], tokenizer, 24)

    _, found = words.read_scene(pairs, pairs.index[0].tolist())

    assert [tokenizer.decode([i]) for i, _ in found] == ["square", "blue", "ring"]


def test_the_picture_is_red_where_a_word_loses_and_blue_where_it_gains(tmp_path):
    image = torch.full((3, 16, 16), 128, dtype=torch.uint8)
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0] = 1.0
    maps[0, 3, 3] = -1.0
    maps[1, 0, 3] = 0.5
    found = [("red", 0.5, 1), ("ring", 0.1, 2)]

    words.draw_words([("one.png", image, found, maps)], 2, tmp_path / "words.png")

    sheet = Image.open(tmp_path / "words.png")
    step = words.CELL + GAP
    assert sheet.format == "PNG"
    assert sheet.width == GAP + 3 * step

    def colour_of_patch(cell, x, y):
        """The colour in the middle of the patch in column x and row y of a cell."""
        side = words.CELL // 4
        return sheet.getpixel(
            (GAP + cell * step + x * side + side // 2, GAP + y * side + side // 2)
        )

    red = colour_of_patch(1, 0, 0)
    blue = colour_of_patch(1, 3, 3)
    neutral = colour_of_patch(1, 1, 1)
    weak = colour_of_patch(2, 3, 0)
    assert red[0] > 150 > red[2]
    assert blue[2] > 150 > blue[0]
    assert len(set(neutral)) == 1
    assert red[1] < weak[1] < neutral[1]  # half the fall, half the colour
    assert weak[0] > weak[2]
    assert colour_of_patch(0, 0, 0) == (128, 128, 128)  # the photograph


def test_files_and_folders_are_looked_at_once(folders, checkpoint, tmp_path, capsys):
    """Of hidden files, links and broken images nothing is shown."""
    broken = folders / "red" / "0.png"
    broken.write_bytes(b"no image")
    link = folders / "green" / "link.png"
    link.symlink_to("0.png")
    (folders / ".ipynb_checkpoints").mkdir()
    (folders / ".ipynb_checkpoints" / "x.png").write_text("no image")
    argv = ["--checkpoint", checkpoint, "--k", 3, "--image", folders / "blue" / "1.png", folders]

    result, printed = result_of(capsys, words.main, tmp_path / "result.json", *argv)

    files = set(folders.glob("[!.]*/*.png"))
    assert result["images"].keys() == {str(file) for file in files - {broken, link}}
    assert f"skipped {broken}" in printed
    for file, found in result["images"].items():
        top = ", ".join(f"{part['word']} {part['probability']:.3f}" for part in found)
        assert f"{file}: {top}\n" in printed
        assert len(found) == 3


def test_a_picture_of_many_images_stays_small(folders, checkpoint, tmp_path, capsys):
    for i in range(20):
        Image.new("RGB", (9, 9), COLOURS["grey"]).save(folders / "blue" / f"grey{i}.png")
    argv = ["--checkpoint", checkpoint, "--image", folders, "--out", tmp_path / "words.png"]

    _, printed = result_of(capsys, words.main, tmp_path / "result.json", *argv)

    assert "24 of 32 images" in printed
    assert Image.open(tmp_path / "words.png").width == GAP + 9 * (words.CELL + GAP)


def test_the_score_of_the_maps_is_printed_and_kept(shard_of_scenes, checkpoint, tmp_path, capsys):
    argv = ["--checkpoint", checkpoint, "--data", shard_of_scenes]

    result, printed = result_of(capsys, words.main, tmp_path / "result.json", *argv)

    assert result["localisation"]["n"] == 2
    assert "right place" in printed


def test_a_word_of_ones_own_takes_the_place_of_the_top_words(folders, checkpoint, tmp_path, capsys):
    argv = [
        "--checkpoint",
        checkpoint,
        "--image",
        folders / "red",
        "--word",
        "red",
        "--word",
        "ring",
    ]

    result, _ = result_of(capsys, words.main, tmp_path / "result.json", *argv)

    model = make_model()
    for file, found in result["images"].items():
        probabilities = model.class_logits(evaluation.read_image(file, 16)[None]).softmax(dim=1)[0]
        assert [part["word"] for part in found] == ["red", "ring"]
        for part in found:
            i = TOKENIZER.encode(part["word"])
            assert part["probability"] == pytest.approx(probabilities[i].item())


def test_a_word_that_is_no_token_is_named(checkpoint, capsys):
    error = error_of(capsys, words.main, "--checkpoint", checkpoint, "--word", "zebra")

    assert "zebra" in error


def test_without_images_the_validation_pictures_of_the_run_are_shown(tmp_path, capsys):
    """At even distances, by their captions."""
    captions = [
        f"a {colour} ring number {i}" for i in range(4) for colour in ("red", "green", "blue")
    ]
    shard = coloured(tmp_path / "val.tar", *captions)
    run = {"val_data": [shard], "val_captions": None, "captions": ["txt"]}
    path = tmp_path / "best.pt"
    evaluation.write_checkpoint(path, make_model(), TOKENIZER.vocab, header={"arguments": run})

    result, _ = result_of(capsys, words.main, tmp_path / "x.json", "--checkpoint", path)

    assert [name.split('"')[1] for name in result["images"]] == captions[::2]


def test_without_images_or_a_run_scenes_are_drawn_for_a_model_of_scenes(tmp_path, capsys):
    model = make_model(vocab_size=data.Tokenizer(vocabulary()).vocab_size)
    evaluation.write_checkpoint(tmp_path / "tiny.pt", model, vocabulary())
    argv = ["--checkpoint", tmp_path / "tiny.pt", "--out", tmp_path / "words.png"]

    result, printed = result_of(capsys, words.main, tmp_path / "result.json", *argv)

    drawn = list(words.draw_scenes(16))
    assert list(result["images"]) == [picture.name for picture in drawn]
    assert (drawn[0].image != drawn[1].image).any()
    assert "4 of 4 images" in printed


def test_without_images_or_a_run_any_other_model_needs_some(checkpoint, capsys):
    error = error_of(capsys, words.main, "--checkpoint", checkpoint)

    assert "--image" in error
