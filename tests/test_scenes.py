"""The built-in world: pictures and captions agree, and validation asks what it should."""

import json
import random
import re
from unittest import mock

import numpy as np
import pytest
import torch
from material import error_of

import data
from scripts import scenes
from superclip import InputError


def draw(folder):
    with mock.patch("os.cpu_count", return_value=1):  # each process imports torch, which is slow
        scenes.make_scenes(folder, train=150, val=300, per_shard=100)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds") / "scenes"
    draw(folder)
    return folder


def read(world, part):
    """-> list of (short, long, scene) of a part's shards."""
    pairs = data.Pairs(data.expand([f"{world}/{part}-*.tar"]), None, 0)
    about = [json.loads(pairs.read(row, data.JSON)) for row in pairs.index.tolist()]
    return [(a["short"], a["long"], a["scene"]) for a in about]


def pairs_of(scene):
    return [(o["colour"], o["shape"]) for o in scene["objects"]]


def test_a_long_caption_names_everything_and_a_short_one_nothing_else(world):
    known = {*scenes.CLOTHS, *scenes.PATTERNS, *scenes.BORDERS, *scenes.COLOURS, *scenes.SHAPES}
    for short, long, scene in read(world, "train"):
        facts = [scene["cloth"], scene["pattern"], scene["border"]]
        facts += [word for pair in pairs_of(scene) for word in pair]
        named = [word for word in re.findall(r"\w+", long) if word in known]
        assert sorted(named) == sorted(facts)
        for colour, shape in pairs_of(scene):
            assert f"{'an' if colour == 'orange' else 'a'} {colour} {shape}" in long
        assert {word for word in re.findall(r"\w+", short) if word in known} <= set(facts)


def test_every_word_of_a_caption_and_of_a_prompt_is_one_token(world):
    tokenizer = data.Tokenizer.from_file(world / "vocab.tiktoken")
    prompts = ["a photo of a red star.", "a picture of a ring.", "a photo of the blue.", "a pink."]
    for text in [text for caption in read(world, "train") for text in caption[:2]] + prompts:
        tokens = len(tokenizer.encode(text))
        assert tokens == len(re.findall(r"\w+|[^\w ]", text)) <= 14, text


def test_eight_pairs_of_colour_and_shape_are_in_validation_only(world):
    assert len(scenes.HELD_OUT) == 8 and len(scenes.SEEN) == 56
    for words in zip(*scenes.HELD_OUT):  # every colour and every shape once
        assert len(set(words)) == 8
    seen = {pair for _, _, scene in read(world, "train") for pair in pairs_of(scene)}
    assert not seen & set(scenes.HELD_OUT)
    seen = {pair for _, _, scene in read(world, "val") for pair in pairs_of(scene)}
    assert seen >= set(scenes.HELD_OUT)


def test_long_captions_of_validation_are_true_of_one_picture_only(world):
    rows = read(world, "val")
    facts = {(s["cloth"], s["pattern"], s["border"], *sorted(pairs_of(s))) for _, _, s in rows}
    assert len(facts) == len(rows) == 300


def test_objects_lie_inside_the_picture_and_apart_from_each_other():
    rng = random.Random(0)
    for _ in range(300):
        boxes = [o["box"] for o in scenes.make_scene(rng, scenes.COMBINATIONS)["objects"]]
        assert all(0 <= v <= 1 for box in boxes for v in box)
        if len(boxes) == 2:
            a, b = boxes
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_a_picture_shows_what_its_scene_says(colour):
    for i, shape in enumerate(scenes.SHAPES):
        scene = scenes.make_scene(random.Random(i), [(colour, shape)], count=1)
        pixels = np.asarray(scenes.draw(scene)).astype(int)
        x0, y0, x1, y1 = scene["objects"][0]["box"]
        x, y = round(72 * (x0 + x1) / 2), round(72 * (y0 + y1) / 2)
        on_border = pixels[0, 0] if y > 36 or x > 36 else pixels[71, 71]
        assert np.abs(on_border - scenes.BORDERS[scene["border"]]).max() <= 2
        inside = np.abs(pixels - scenes.COLOURS[colour]).max(axis=2) <= 2
        rows, columns = inside.nonzero()
        assert len(rows) > 30  # and all of them within the box
        assert 72 * y0 - 1 <= rows.min() and rows.max() <= 72 * y1 + 1
        assert 72 * x0 - 1 <= columns.min() and columns.max() <= 72 * x1 + 1
        assert inside[y, x] == (shape != "ring")  # a ring has a hole
        cloth = np.abs(pixels - scenes.CLOTHS[scene["cloth"]]).max(axis=2) <= 2
        assert 0.1 < cloth.mean() < 0.9


def test_patterns_differ():
    pictures = [np.asarray(scenes.draw_setting("navy", p, "gold", 288)) for p in scenes.PATTERNS]
    shares = [(picture == scenes.CLOTHS["navy"]).all(axis=2).mean() for picture in pictures]
    assert shares[0] > 0.75  # plain cloth, and a border round it
    assert [round(shares[0] - share, 1) for share in shares[1:]] == [0.3, 0.4, 0.1]


def test_class_folders_hold_what_their_names_say(world):
    def names(kind):
        folders = (world / "zeroshot" / kind).iterdir()
        return {folder.name: len(list(folder.iterdir())) for folder in folders}

    assert names("colour") == dict.fromkeys(scenes.COLOURS, 40)
    assert names("shape") == dict.fromkeys(scenes.SHAPES, 40)
    assert names("colour_shape") == {f"{c} {s}": 10 for c, s in scenes.COMBINATIONS}
    held_out = {f"{c} {s}": 40 if (c, s) in scenes.HELD_OUT else 0 for c, s in scenes.COMBINATIONS}
    assert names("held_out") == held_out
    picture = data.load_image(
        (world / "zeroshot" / "colour_shape" / "red star" / "000.jpg").read_bytes(), 72
    )
    red = torch.tensor(scenes.COLOURS["red"])[:, None, None]
    assert ((picture - red).abs().amax(dim=0) < 20).sum() > 30


def test_a_world_is_drawn_whole_or_not_at_all_and_the_same_each_time(world, tmp_path, capsys):
    draw(tmp_path / "again")
    for path in world.rglob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert "is there already" in error_of(capsys, scenes.main, "--out", world)
    with pytest.raises(InputError):
        scenes.make_scenes(world)
    with pytest.raises(ValueError):  # in a process that draws
        scenes.make_scenes(tmp_path / "broken", train=1, val=1, settings=["no setting"])
    with pytest.raises(InputError):  # or it would look for another scene forever
        scenes.make_scenes(tmp_path / "few", val=1001, settings=scenes.SETTINGS[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_batch_four_times_as_large_takes_half_as_many_steps_at_twice_the_rate():
    small, large = scenes.built_in(64), scenes.built_in(256)
    steps = [20_000 * d["epochs"] / b for d, b in ((small, 64), (large, 256))]
    assert steps[0] == pytest.approx(2 * steps[1], rel=1e-3)
    assert large["learning_rate"] == pytest.approx(2 * small["learning_rate"], rel=1e-3)
    assert scenes.built_in() == scenes.built_in(32)
