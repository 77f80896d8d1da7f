"""The built-in world: pictures and captions agree, and validation asks what it should."""

import hashlib
import json
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import data
from scripts import scenes

NAMES = {*scenes.CLOTHS, *scenes.PATTERNS, *scenes.BORDERS, *scenes.COLOURS, *scenes.SHAPES}


class Sample(NamedTuple):
    """What the members of one sample say."""

    fields: dict  # of .json
    caption: str  # of .txt
    picture: np.ndarray  # (72, 72, 3)

    def setting(self):
        """Cloth, pattern and border, as words."""
        return [value for name, value in self.fields["scene"].items() if name != "objects"]

    def looks(self):
        """Colour and shape of the objects, in alphabetical order."""
        return sorted((o["colour"], o["shape"]) for o in self.fields["scene"]["objects"])

    def facts(self):
        """All words that are true of the scene."""
        return {*self.setting(), *(word for look in self.looks() for word in look)}


def draw(folder, split, n):
    """Draws the first n samples of the world, and reads them from their shard."""
    scenes.write_shard((f"{split}.tar", split, range(n)), folder, scenes.SETTINGS)
    pairs = data.Pairs([f"{folder}/{split}.tar"], None, 0)
    samples = []
    for row in pairs.index.tolist():
        fields = json.loads(pairs.read(row, data.JSON))
        picture = data.load_image(pairs.read(row, data.IMAGE), 72).permute(1, 2, 0).numpy()
        samples.append(Sample(fields, *pairs.texts(row, "txt"), picture))
    return samples


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """150 samples of training."""
    return draw(tmp_path_factory.mktemp("train"), "train", 150)


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    """300 samples of validation."""
    return draw(tmp_path_factory.mktemp("val"), "val", 300)


def has(picture, colour, tolerance=2):
    """Where a picture has a colour, or that of another picture: (height, width) of booleans."""
    return np.abs(np.asarray(picture).astype(int) - colour).max(axis=2) <= tolerance


# ---- captions


def test_the_world_is_the_same_on_all_machines(train, val):
    """Its captions and places, up to the last digit. Every number of the README is one of it."""
    content = json.dumps([sample.fields for sample in train + val])

    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "358ee5b63dffca28"


def test_a_long_caption_names_all_that_is_there_and_nothing_else(train):
    for sample in train:
        named = NAMES.intersection(re.findall(r"\w+", sample.fields["long"]))

        assert named == sample.facts()


def test_a_long_caption_names_each_object_with_its_own_colour(train):
    for sample in train:
        for colour, shape in sample.looks():
            article = "an" if colour == "orange" else "a"
            assert f"{article} {colour} {shape}" in sample.fields["long"]


def test_a_short_caption_tells_no_lie_and_is_the_one_of_the_txt(train):
    for sample in train:
        named = NAMES.intersection(re.findall(r"\w+", sample.fields["short"]))

        assert named <= sample.facts()
        assert sample.caption == sample.fields["short"]


def test_each_word_of_a_caption_or_prompt_is_one_token(train):
    """And a caption fits the context of 16 tokens, with start and end."""
    tokenizer = data.Tokenizer(scenes.vocabulary())
    texts = ["a photo of a red star.", "a picture of a ring.", "a photo of the blue.", "a pink."]
    for sample in train:
        texts += [sample.fields["short"], sample.fields["long"]]

    for text in texts:
        words = re.findall(r"\w+|[^\w ]", text)
        assert len(tokenizer.encode(text)) == len(words) <= 14, text


# ---- training and validation


def test_held_out_combinations_are_shown_by_validation_alone(train, val):
    in_training = {look for sample in train for look in sample.looks()}
    in_validation = {look for sample in val for look in sample.looks()}

    assert not in_training & {*scenes.HELD_OUT}
    assert {*scenes.HELD_OUT} <= in_validation


def test_each_colour_and_each_shape_is_held_out_once():
    colours, shapes = zip(*scenes.HELD_OUT)

    assert sorted(colours) == sorted(scenes.COLOURS)
    assert sorted(shapes) == sorted(scenes.SHAPES)


def test_no_caption_of_validation_fits_two_pictures(val):
    assert len({(*sample.setting(), *sample.looks()) for sample in val}) == len(val)


# ---- pictures


def test_the_picture_is_that_of_the_scene(train):
    """Up to what JPEG changes."""
    for sample in train:
        assert has(sample.picture, scenes.draw(sample.fields["scene"]), 40).mean() > 0.99


@pytest.mark.parametrize("look", scenes.COMBINATIONS, ids=" ".join)
def test_an_object_has_its_colour_inside_its_box_and_a_ring_has_a_hole(look):
    colour, shape = look
    scene = scenes.make_scene(random.Random(shape), [look], count=1)
    x0, y0, x1, y1 = scene["objects"][0]["box"]

    inside = has(scenes.draw(scene), scenes.COLOURS[colour])

    y, x = inside.nonzero()
    assert len(x) > 30
    assert min(x0, y0) >= 0 and max(x1, y1) <= 1
    assert 72 * x0 - 1 <= x.min() and x.max() <= 72 * x1 + 1
    assert 72 * y0 - 1 <= y.min() and y.max() <= 72 * y1 + 1
    assert inside[round(36 * (y0 + y1)), round(36 * (x0 + x1))] == (shape != "ring")


def test_a_picture_shows_its_border_in_the_corners_and_its_cloth():
    for seed in range(30):
        scene = scenes.make_scene(random.Random(seed), scenes.COMBINATIONS, count=1)

        picture = scenes.draw(scene)

        corners = has(picture, scenes.BORDERS[scene["border"]])[::71, ::71]
        assert corners.sum() >= 3  # an object may hide one
        assert has(picture, scenes.CLOTHS[scene["cloth"]]).mean() > 0.1


def test_patterns_differ_in_how_much_of_the_cloth_is_light():
    light = np.array(scenes.CLOTHS["navy"]) + 22

    pictures = [scenes.draw_setting("navy", pattern, "gold", 288) for pattern in scenes.PATTERNS]

    assert [round(has(picture, light).mean(), 1) for picture in pictures] == [0, 0.3, 0.4, 0.1]


def test_no_object_hides_another():
    for seed in range(200):
        scene = scenes.make_scene(random.Random(seed), scenes.COMBINATIONS, count=2)
        a, b = (o["box"] for o in scene["objects"])

        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


# ---- folders of classes


@pytest.fixture(scope="module")
def zeroshot():
    """The folders of single objects, by colour, shape or both. They are soon deleted, because 1,600
    files cost a disk seconds once they are written to it."""
    with tempfile.TemporaryDirectory() as folder:
        scenes.write_classes(Path(folder))
        yield Path(folder, "zeroshot")


def test_class_folders_have_equal_numbers_of_pictures(zeroshot):
    expected = {
        **{("colour", name): 40 for name in scenes.COLOURS},
        **{("shape", name): 40 for name in scenes.SHAPES},
        **{("colour_shape", " ".join(look)): 10 for look in scenes.COMBINATIONS},
        **{("held_out", " ".join(look)): 40 for look in scenes.HELD_OUT},
    }

    assert Counter(path.parts[-3:-1] for path in zeroshot.glob("*/*/*.jpg")) == expected


def test_held_out_objects_have_64_names_to_choose_from(zeroshot):
    assert len([*(zeroshot / "held_out").iterdir()]) == 64


def test_class_folders_hold_what_their_names_say(zeroshot):
    for path in zeroshot.glob("colour*/*/*.jpg"):
        colour = scenes.COLOURS[path.parent.name.split()[0]]

        assert has(Image.open(path), colour, 25).sum() > 30, path


# ---- the folder that is drawn


def test_a_world_is_drawn_whole_or_not_at_all(few_looks, tmp_path):
    with pytest.raises(ValueError):  # in a process that draws
        scenes.make_scenes(tmp_path / "broken", train=0, val=1, settings=["no setting"])

    assert [*tmp_path.iterdir()] == []


WORLD = {"train-00000.tar", "val-00000.tar", "vocab.tiktoken"}


def draw_small_world(folder):
    """Draws three scenes. Returns the names of the files."""
    scenes.make_scenes(folder, train=2, val=1)
    return {path.name for path in folder.glob("*.t*")}


# Locks a file until its standard input ends
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_run_has_left_is_removed_and_what_another_one_draws_is_not(
    few_looks, tmp_path
):
    dead, alive = tmp_path / ".scenes-dead", tmp_path / ".scenes-alive"
    for folder in (dead, alive):
        (folder / "scenes").mkdir(parents=True)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, alive / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()  # it has locked its folder

    drawn = draw_small_world(tmp_path / "scenes")

    other.communicate()
    assert drawn == WORLD
    assert {path.name for path in tmp_path.iterdir()} == {"scenes", ".scenes-alive"}


def test_scenes_that_another_run_finishes_first_are_used(few_looks, tmp_path, monkeypatch):
    faster = tmp_path / "scenes" / "of the other.tar"

    def vocabulary():  # while this run draws, the folder appears
        faster.parent.mkdir()
        faster.touch()
        return ""

    monkeypatch.setattr(scenes, "vocabulary", vocabulary)

    drawn = draw_small_world(tmp_path / "scenes")

    assert drawn == {faster.name}
    assert [*tmp_path.iterdir()] == [faster.parent]
