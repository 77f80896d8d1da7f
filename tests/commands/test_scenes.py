"""The built-in world: pictures and captions agree, and validation asks what it should."""

import hashlib
import json
import random
import re

import numpy as np
import pytest
from PIL import Image

import data
from scripts import scenes
from tokenizer import Tokenizer

NAMES = {*scenes.CLOTHS, *scenes.PATTERNS, *scenes.BORDERS, *scenes.COLOURS, *scenes.SHAPES}


def first_samples(split, n, **world):
    """The first n samples, as a list of (scene, short caption, long caption)."""
    return [sample for _, *sample in scenes.make_samples(split, range(n), **world)]


TRAIN = first_samples("train", 150)
VAL = first_samples("val", 300)


def setting_of(scene):
    return [scene["cloth"], scene["pattern"], scene["border"]]


def looks_of(scene):
    return sorted((thing["colour"], thing["shape"]) for thing in scene["objects"])


def has(picture, colour, tolerance=2):
    """Where a picture has a colour, or that of another picture: (height, width) of booleans."""
    return np.abs(np.asarray(picture).astype(int) - colour).max(axis=2) <= tolerance


def test_seed_0_is_the_same_world_on_all_machines():
    """Its captions and places, up to the last digit. Every number of the README is one of it."""
    fields = [{"short": short, "long": long, "scene": scene} for scene, short, long in TRAIN + VAL]

    content = json.dumps(fields).encode()

    assert hashlib.sha256(content).hexdigest()[:16] == "358ee5b63dffca28"


def test_another_seed_draws_another_world():
    for sample in first_samples("val", 50, seed=1):
        assert sample not in VAL


def test_only_so_many_settings_occur():
    settings = scenes.some_settings(3, seed=0)

    drawn = first_samples("train", 50, settings=settings)

    assert {tuple(setting_of(scene)) for scene, _, _ in drawn} == {*settings}


# ---- captions


def test_a_long_caption_names_all_that_is_there_and_a_short_one_tells_no_lie():
    for scene, short, long in TRAIN:
        facts = setting_of(scene)
        for colour, shape in looks_of(scene):
            facts += [colour, shape]
            assert f" {colour} {shape}" in long  # each with its own colour

        assert NAMES.intersection(re.findall(r"\w+", long)) == {*facts}
        assert NAMES.intersection(re.findall(r"\w+", short)) <= {*facts}


def test_each_word_of_a_caption_is_one_token():
    """And a caption fits the context of 16 tokens, with start and end."""
    tokenizer = Tokenizer(scenes.vocabulary())

    for _, _, long in TRAIN:
        assert len(tokenizer.encode(long)) == len(re.findall(r"\w+|[^\w ]", long)) <= 14


# ---- training and validation


def test_held_out_combinations_are_shown_by_validation_alone():
    in_training = {look for scene, _, _ in TRAIN for look in looks_of(scene)}
    in_validation = {look for scene, _, _ in VAL for look in looks_of(scene)}

    assert not in_training & {*scenes.HELD_OUT}
    assert {*scenes.HELD_OUT} <= in_validation


# ---- pictures


@pytest.mark.parametrize("look", [*zip(scenes.COLOURS, scenes.SHAPES)], ids=" ".join)
def test_an_object_has_its_colour_inside_its_box_and_a_ring_has_a_hole(look):
    colour, shape = look
    scene = scenes.make_scene(random.Random(shape), [look], count=1)
    box = 72 * np.array(scene["objects"][0]["box"])
    x, y = box.reshape(2, 2).mean(axis=0).round().astype(int)

    inside = has(scenes.draw(scene), scenes.COLOURS[colour])

    assert Image.fromarray(inside).getbbox() == pytest.approx(box, abs=7)
    assert inside[y, x] == (shape != "ring")


# ---- the folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A drawn world with few samples."""
    folder = tmp_path_factory.mktemp("world") / "scenes"
    scenes.make_scenes(folder, train=2, val=1)
    return folder


def test_a_picture_is_that_of_its_scene(folder):
    """As far as JPEG does not change it."""
    shards = data.Shards(data.expand([folder]))

    for i in range(len(shards)):
        fields = json.loads(shards.read(i, data.JSON))
        picture = shards.image(i, 72).permute(1, 2, 0)
        assert shards.captions(i) == [fields["short"]]
        assert has(picture, scenes.draw(fields["scene"]), 40).mean() > 0.99


def test_a_picture_has_the_colour_of_its_class(folder):
    for path in folder.glob("zeroshot/colour*/*/*0.jpg"):
        colour = scenes.COLOURS[path.parent.name.split()[0]]
        assert has(Image.open(path), colour, 25).sum() > 30, path


def test_held_out_pictures_have_the_names_of_all_combinations_to_choose_from(folder):
    sizes = [len([*path.iterdir()]) for path in folder.glob("zeroshot/held_out/*")]

    assert sorted(sizes) == 56 * [0] + 8 * [40]
