"""scripts/words.py: scores of localisation by hand, colours of the picture, the command."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from material import (
    TOKENIZER,
    error_of,
    make_model,
    result_of,
    run,
    write_checkpoint,
    write_shard,
)
from PIL import Image

import data
from data import words_to_tiktoken
from scripts import words


class Seer:
    """A head that says red and square the louder, the more red patches it is shown, and blue and
    ring the more blue ones."""

    logit_scale, visual = torch.tensor(1.0), SimpleNamespace(grid=6)

    def __init__(self, loudness=1):
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
    """Three scenes on a grid of 6 x 6 patches, with a red square and a blue ring of 2 x 2 patches
    in each, and two grey things that no colour or shape tells apart."""
    samples = []
    for i in range(3):
        pixels, objects = np.zeros((24, 24, 3), np.uint8), []
        for name, shape, channel, x, y in (
            ("red", "square", 0, i, 0),
            ("blue", "ring", 2, 1, 4 - i),
            ("grey", "thing", None, 4, 0),
            ("grey", "thing", None, 4, 4),
        ):
            if channel is not None:
                pixels[4 * y : 4 * y + 8, 4 * x : 4 * x + 8, channel] = 255
            box = [(x + 0.1) / 6, (y + 0.1) / 6, (x + 1.9) / 6, (y + 1.9) / 6]
            objects.append({"colour": name, "shape": shape, "box": box})
        Image.fromarray(pixels).save(tmp_path / "x.png")
        scene = json.dumps({"scene": {"objects": objects}}).encode()
        samples.append({"png": (tmp_path / "x.png").read_bytes(), "json": scene, "txt": b"red"})
    return write_shard(tmp_path / "scenes.tar", samples)


def test_localisation_is_right_for_a_model_that_looks_at_the_object(scenes):
    pairs = data.Pairs([str(scenes)], TOKENIZER, 24)
    s = words.localisation(Seer(), pairs, window=2)
    assert s["value"] == 1 and s["n"] == 3  # scenes, of four words each
    assert s["chance"] == pytest.approx(1 / 25)  # one of 5 x 5 windows has its centre there
    assert words.localisation(Seer(-1), pairs, window=2)["value"] == 0
    assert words.localisation(Seer(), pairs, window=2, limit=2)["n"] == 2


def test_a_head_that_does_not_look_localises_by_chance_and_one_of_nan_not_at_all(scenes):
    pairs = data.Pairs([str(scenes)], TOKENIZER, 24)
    s = words.localisation(Seer(0), pairs, window=2)
    assert s["value"] == pytest.approx(s["chance"])
    assert words.localisation(Seer(math.nan), pairs, window=2)["value"] == 0


def test_words_of_several_tokens_are_not_asked(scenes):
    vocab = data.Tokenizer(words_to_tiktoken(["ring", "square", "blue"]))  # no "red"
    pairs = data.Pairs([str(scenes)], vocab, 24)
    image, found = words.read_scene(pairs, pairs.index[0].tolist())
    assert image.shape == (3, 24, 24)
    assert [vocab.decode([i]) for i, _ in found] == ["square", "blue", "ring"]


def test_the_picture_is_red_where_a_word_loses_and_blue_where_it_gains(tmp_path):
    image = torch.full((3, 16, 16), 128, dtype=torch.uint8)
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3], maps[1, 0, 3] = 1.0, -1.0, 0.5
    found = [("red", 0.5, 1), ("ring", 0.1, 2)]
    rows = [("one.png", image, found, maps), ("two.png", image, found[:1], 0 * maps[:1])]
    words.draw_words(rows, 2, tmp_path / "words.png")
    sheet = Image.open(tmp_path / "words.png")
    assert sheet.format == "PNG" and sheet.width == words.GAP + 3 * (words.CELL + words.GAP)
    assert sheet.height > 2 * (words.CELL + words.FOOT)

    def middle(row, column, x, y):
        """Of the patch in column x and row y of one of the small pictures."""
        left = words.GAP + column * (words.CELL + words.GAP)
        top = words.GAP + row * (words.CELL + words.FOOT)
        place = left + (x + 0.5) * words.CELL / 4, top + (y + 0.5) * words.CELL / 4
        return sheet.getpixel(tuple(map(int, place)))

    red, blue, neutral, weak = (
        middle(0, *place) for place in ((1, 0, 0), (1, 3, 3), (1, 1, 1), (2, 3, 0))
    )
    assert red[0] > 150 > red[2] and blue[2] > 150 > blue[0] and len(set(neutral)) == 1
    assert red[1] < weak[1] < neutral[1] and weak[0] > weak[2]  # half the fall, half the colour
    assert middle(0, 0, 0, 0) == (128, 128, 128)  # the photograph
    assert middle(1, 1, 0, 0) == neutral  # a map of zeros


# ---- the command


def test_a_folder_gives_all_its_images_and_no_hidden_ones(folders):
    (folders / "red" / "notes.txt").write_text("no image")
    (folders / ".ipynb_checkpoints").mkdir()
    (folders / ".ipynb_checkpoints" / "x.png").write_bytes(b"")
    (folders / "red" / "9.JPEG").write_bytes(b"")
    found = words.image_files([folders / "blue" / "0.png", folders])  # once, though named twice
    names = [str(path.relative_to(folders)) for path in found]
    pictures = [f"{name}/{i}.png" for name in ("blue", "green", "red") for i in range(4)]
    assert names == [*pictures, "red/9.JPEG"]


def test_words_command(folders, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(words, "MAX_ROWS", 3)
    (folders / "red" / "0.png").write_bytes(b"no image")
    images = [folders / "red", folders / "blue" / "0.png"]
    argv = ["--checkpoint", checkpoint, "--k", 3, "--image", *images]
    argv += ["--out", tmp_path / "words.png"]
    result, printed = result_of(capsys, words.main, tmp_path / "result.json", *argv)
    assert list(result["images"]) == [
        *(str(folders / "red" / f"{i}.png") for i in (1, 2, 3)),
        str(folders / "blue" / "0.png"),
    ]
    for file, found in result["images"].items():
        top = ", ".join(f"{part['word']} {part['probability']:.3f}" for part in found)
        assert f"{file}: {top}\n" in printed and len(found) == 3
    assert f"skipped {folders / 'red' / '0.png'}: the image cannot be decoded" in printed
    assert f"wrote {tmp_path / 'words.png'}: 3 of 4 images" in printed
    sheet, row = Image.open(tmp_path / "words.png"), words.CELL + words.FOOT
    assert sheet.width == words.GAP + 4 * (words.CELL + words.GAP)  # the image and three words
    assert 3 * row < sheet.height < 4 * row


def test_localisation_command(scenes, checkpoint, tmp_path, capsys):
    argv = ["--checkpoint", checkpoint, "--data", scenes, "--limit", 2]
    result, printed = result_of(capsys, words.main, tmp_path / "result.json", *argv)
    assert result["localisation"]["n"] == 2 and result["images"] == {}
    assert words.evaluation.line("right place", result["localisation"]) in printed


def test_mistakes_are_one_sentence(folders, checkpoint, tmp_path, capsys):
    clip = write_checkpoint(tmp_path / "clip.pt", make_model(cls_weight=0))
    photo, broken = folders / "red" / "0.png", tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    (tmp_path / "hollow").mkdir()
    before = photo.read_bytes()
    pairs = write_shard(tmp_path / "x.tar", [{"png": before, "txt": b"red", "json": b"{}"}])
    base = ["--checkpoint", checkpoint]
    image = [*base, "--image", photo]
    # These are found before any work is done: there is no such checkpoint.
    early = ["--checkpoint", tmp_path / "none.pt", "--image", photo]
    for argv, sentence in (
        (base, "--image"),
        ([*base, "--image", broken], "broken.png: the image cannot be decoded"),
        ([*base, "--image", broken, broken, tmp_path / "hollow"], "hollow"),
        ([*base, "--image", tmp_path / "nowhere.png"], "nowhere.png"),
        ([*base, "--data", pairs], "x.tar is not a shard of the built-in data"),
        ([*base, "--data", pairs, "--out", tmp_path / "words.png"], "--image"),
        (["--checkpoint", clip, "--image", photo], "no word head"),
        ([*image, "--window", 4], "from 1 to 3"),
        ([*early, "--window", 0], "--window"),
        ([*early, "--k", 0], "--k"),
        ([*early, "--k", 21], "--k"),
        ([*early, "--limit", 0], "--limit"),
        ([*early, "--out", tmp_path / "words.txt"], "words.txt"),
        ([*early, "--out", tmp_path / "nowhere" / "words.png"], "nowhere"),
        ([*early, "--out", photo], "overwrite"),
        ([*early, "--image", folders, "--out", photo], "overwrite"),
        ([*early, "--json", tmp_path / "nowhere" / "x.json"], "folder that exists"),
    ):
        assert sentence in error_of(capsys, words.main, *argv), argv
    assert photo.read_bytes() == before and not (tmp_path / "words.png").exists()
    assert not run(words.main, *base, "--image", broken, photo)  # the other one can be read
