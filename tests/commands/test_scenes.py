"""The built-in world: it is the same everywhere, and its parts fit each other."""

import hashlib
import json
import re

import numpy as np
from PIL import Image

import scenes
from tokenizer import Tokenizer


def first_samples(split, n, **world):
    """The first n samples, as a list of (scene, short caption, long caption)."""
    return [sample for _, *sample in scenes.make_samples(split, range(n), **world)]


TRAIN = first_samples("train", 150)
VAL = first_samples("val", 300)


def test_seed_0_is_the_same_world_on_all_machines():
    """Its captions and places, up to the last digit. Every number of the README is one of it."""
    fields = [{"short": short, "long": long, "scene": scene} for scene, short, long in TRAIN + VAL]

    content = json.dumps(fields).encode()

    assert hashlib.sha256(content).hexdigest()[:16] == "358ee5b63dffca28"


def test_another_seed_draws_another_world():
    for sample in first_samples("val", 50, seed=1):
        assert sample not in VAL


def test_each_word_of_a_caption_is_one_token():
    """And a caption fits the context of 16 tokens, with start and end."""
    tokenizer = Tokenizer(scenes.vocabulary())

    for _, _, long in TRAIN:
        assert len(tokenizer.encode(long)) == len(re.findall(r"\w+|[^\w ]", long)) <= 14


def test_a_picture_has_the_colour_of_its_class(scenes_folder):
    for path in scenes_folder.glob("zeroshot/colour*/*/*.jpg"):
        colour = scenes.COLOURS[path.parent.name.split()[0]]
        distance = np.abs(np.asarray(Image.open(path)).astype(int) - colour).max(axis=2)
        assert (distance <= 25).sum() > 30, path  # pixels


def test_held_out_pictures_have_the_names_of_all_combinations_to_choose_from(scenes_folder):
    sizes = [len([*path.iterdir()]) for path in scenes_folder.glob("zeroshot/held_out/*")]

    assert sorted(sizes) == 56 * [0] + 8 * [4]
