"""The head's words and where they are seen: by the slow formula, by hand, and as a picture."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from material import COLOURS, TOKENIZER, error_of, make_model, result_of, write_shard
from PIL import Image

import data
import eval as evaluation
from data import words_to_tiktoken
from scripts import words
from scripts.pictures import GAP


@torch.no_grad()
def test_top_words_are_the_softmax_of_the_head():
    model, images = make_model(), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    names = ["red", "green", "blue", "q-"]
    shown = [TOKENIZER.encode(name)[0] for name in names[:3]] + [data.BYTES.index(ord("q"))]
    hidden = [0, TOKENIZER.start, TOKENIZER.end]  # no words
    model.head.linear.bias[shown + hidden] += 9.0
    probabilities = model.class_logits(images).softmax(dim=1)
    for row, found in zip(probabilities, evaluation.top_words(model, TOKENIZER, images, k=4)):
        assert {(word, i) for word, _, i in found} == set(zip(names, shown))
        assert [p for _, p, _ in found] == sorted(row[shown].tolist(), reverse=True)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 3])
def test_word_maps_are_those_of_the_slow_loop(window):
    model = make_model()
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)  # a grid of 4 x 4 patches
    ids = [TOKENIZER.encode(word)[0] for word in ("red", "ring", "a")]
    falls, maps = evaluation.word_maps(model, image, ids, window, batch_size=3)
    whole = model.class_logits(image[None]).log_softmax(dim=1)[0, ids]
    total, times, slow = torch.zeros(3, 4, 4), torch.zeros(4, 4), []
    for y, x in itertools.product(range(5 - window), repeat=2):
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[y : y + window, x : x + window] = True
        keep = torch.tensor([[p for p in range(16) if not inside.flatten()[p]]])
        slow.append(whole - model.class_logits(image[None], keep).log_softmax(dim=1)[0, ids])
        total += slow[-1][:, None, None] * inside
        times += inside
    torch.testing.assert_close(falls, torch.stack(slow, dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps, total / times, atol=1e-5, rtol=1e-4)


class Seer:
    """A head that says red and square the louder, the more red patches it is shown, and blue and
    ring the more blue ones."""

    logit_scale, visual = torch.tensor(1.0), SimpleNamespace(grid=6)

    def __init__(self, loudness):
        self.loudness = loudness

    def class_logits(self, images, keep=None):
        patches = F.avg_pool2d(images.float(), 4).flatten(2) / 255  # (B, 3, 36)
        if keep is not None:
            patches = patches.gather(2, keep[:, None].expand(-1, 3, -1))
        logits = torch.zeros(len(images), TOKENIZER.vocab_size)
        for word, channel in (("red", 0), ("square", 0), ("blue", 2), ("ring", 2)):
            logits[:, TOKENIZER.encode(word)[0]] = self.loudness * patches[:, channel].sum(dim=1)
        return logits


@pytest.fixture
def scenes(tmp_path):
    """Two scenes on a grid of 6 x 6 patches, with a red square and a blue ring of 2 x 2 patches in
    each, and two grey things that no colour or shape tells apart."""
    samples = []
    for i in range(2):
        looks = ("red", "square", i, 0), ("blue", "ring", 1, 4 - i)
        pixels, objects = np.zeros((24, 24, 3), np.uint8), []
        for colour, shape, x, y in (*looks, ("grey", "thing", 4, 0), ("grey", "thing", 4, 4)):
            if colour != "grey":
                pixels[4 * y : 4 * y + 8, 4 * x : 4 * x + 8, 0 if colour == "red" else 2] = 255
            box = [(x + 0.1) / 6, (y + 0.1) / 6, (x + 1.9) / 6, (y + 1.9) / 6]
            objects.append({"colour": colour, "shape": shape, "box": box})
        Image.fromarray(pixels).save(tmp_path / "x.png")
        scene = json.dumps({"scene": {"objects": objects}}).encode()
        samples.append({"png": (tmp_path / "x.png").read_bytes(), "json": scene, "txt": b"red"})
    return write_shard(tmp_path / "scenes.tar", samples)


def test_localisation_by_hand(scenes):
    """One of 5 x 5 windows has its centre on a word's object. A head that does not look is right by
    chance, and one of NaN never. A scene counts once, with its words of one token."""
    for loudness, value in ((1, 1.0), (-1, 0.0), (0, 1 / 25), (math.nan, 0.0)):
        pairs = data.Pairs([scenes], TOKENIZER, 24)
        s = words.localisation(Seer(loudness), pairs, window=2)
        assert s["value"] == pytest.approx(value) and s["chance"] == pytest.approx(1 / 25)
        assert s["n"] == 2
    pairs.tokenizer = data.Tokenizer(words_to_tiktoken(["ring", "square", "blue"]))  # no red
    _, found = words.read_scene(pairs, pairs.index[0].tolist())
    assert [pairs.tokenizer.decode([i]) for i, _ in found] == ["square", "blue", "ring"]


def test_the_picture_is_red_where_a_word_loses_and_blue_where_it_gains(tmp_path):
    image, maps = torch.full((3, 16, 16), 128, dtype=torch.uint8), torch.zeros(2, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3], maps[1, 0, 3] = 1.0, -1.0, 0.5
    found = [("red", 0.5, 1), ("ring", 0.1, 2)]
    words.draw_words([("one.png", image, found, maps)], 2, tmp_path / "words.png")
    sheet = Image.open(tmp_path / "words.png")
    assert sheet.format == "PNG" and sheet.width == GAP + 3 * (words.CELL + GAP)

    def patch(cell, x, y):
        """The colour in the middle of the patch in column x and row y of a cell."""
        left, side = GAP + cell * (words.CELL + GAP), words.CELL // 4
        return sheet.getpixel((left + x * side + side // 2, GAP + y * side + side // 2))

    red, blue, neutral, weak = patch(1, 0, 0), patch(1, 3, 3), patch(1, 1, 1), patch(2, 3, 0)
    assert red[0] > 150 > red[2] and blue[2] > 150 > blue[0] and len(set(neutral)) == 1
    assert red[1] < weak[1] < neutral[1] and weak[0] > weak[2]  # half the fall, half the colour
    assert patch(0, 0, 0) == (128, 128, 128)  # the photograph


def test_words_command(folders, scenes, checkpoint, tmp_path, capsys):
    """Of files and folders, each image once, no hidden ones, at most 24 of them in the picture."""
    (folders / "red" / "0.png").write_bytes(b"no image")
    (folders / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/x.png", "blue/notes.txt"):
        (folders / name).write_text("no image")
    for i in range(20):
        Image.new("RGB", (9, 9), COLOURS["grey"]).save(folders / "blue" / f"grey{i}.png")
    (folders / "green" / "link.png").symlink_to("0.png")
    out, files = tmp_path / "words.png", [folders / "blue" / "1.png", folders]
    argv = ["--checkpoint", checkpoint, "--k", 3, "--image", *files, "--out", out]
    argv += ["--data", scenes, "--limit", 1]
    result, printed = result_of(capsys, words.main, tmp_path / "result.json", *argv)
    others = folders / "red" / "0.png", folders / "green" / "link.png"
    readable = {str(file) for file in folders.glob("[!.]*/*.png") if file not in others}
    assert result["images"].keys() == readable
    for file, found in result["images"].items():
        top = ", ".join(f"{part['word']} {part['probability']:.3f}" for part in found)
        assert f"{file}: {top}\n" in printed and len(found) == 3
    assert f"skipped {folders / 'red' / '0.png'}" in printed
    assert f"wrote {out}: 24 of 31 images" in printed
    assert result["localisation"]["n"] == 1
    assert evaluation.format_score("right place", result["localisation"]) in printed


def test_words_of_drawn_scenes_and_a_word_of_ones_own(checkpoint, tmp_path, capsys):
    """Without images, scenes are drawn on the spot. --word takes the place of the top words."""
    path, model = tmp_path / "result.json", make_model()
    argv = ["--checkpoint", checkpoint, "--word", "red", "--word", "ring"]
    result, _ = result_of(capsys, words.main, path, *argv, "--out", tmp_path / "words.png")
    drawn = [image for _, image in words.draw_scenes(16)]
    expected = model.class_logits(torch.stack(drawn)).softmax(dim=1)
    assert len(drawn) == 4 and (drawn[0] != drawn[1]).any()
    for row, found in zip(expected, result["images"].values(), strict=True):
        assert [part["word"] for part in found] == ["red", "ring"]
        chances = [row[TOKENIZER.encode(word)].item() for word in ("red", "ring")]
        assert [part["probability"] for part in found] == pytest.approx(chances)
    assert "zebra" in error_of(capsys, words.main, *argv, "--word", "zebra")
