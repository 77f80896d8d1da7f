"""Test the built-in world. It is the same on every machine, and its parts fit each other."""

import hashlib
import json
import re
from functools import partial

import numpy as np
import pytest
from children import ROOT
from PIL import Image, ImageChops

from common import scenes
from common.cli import InputError, new_folder
from common.tokenizer import Tokenizer

SAMPLES = [*scenes.make_samples("train", range(150)), *scenes.make_samples("val", range(300))]


def test_seed_0_is_the_same_world_on_all_machines_and_another_seed_is_not():
    """Captions and places are equal to the last digit: the numbers in the README need them. If you
    change them or the vocabulary, increase VERSION in common/scenes.py, and write the new number
    and hash here."""
    fields = [{"short": short, "long": long, "scene": scene} for _, scene, short, long in SAMPLES]

    content = json.dumps([fields, scenes.vocabulary()]).encode()

    assert (scenes.VERSION, hashlib.sha256(content).hexdigest()[:16]) == (1, "278ca6f6386eaef4")
    assert not any(x in SAMPLES for x in scenes.make_samples("val", range(50), seed=1))


def test_pictures_look_as_before(scenes_folder, tmp_path):
    """tests/scenes.png shows pictures of all colours, patterns, borders and shapes. If you change
    how they look, increase VERSION in common/scenes.py, and replace tests/scenes.png by the picture
    that this test leaves in the folder that it names."""
    pictures = [scenes.draw(scene) for _, scene, *_ in SAMPLES[-24:]]
    pictures += map(Image.open, sorted(scenes_folder.glob("zeroshot/held_out/*/000.jpg")))
    before = Image.open(ROOT / "tests" / "scenes.png")

    row = Image.fromarray(np.hstack(pictures))

    row.save(tmp_path / "scenes.png")
    difference = ImageChops.difference(row.reduce(6), before.reduce(6))

    # Mean colours of 6 x 6 pixels differ by up to 3 levels between versions of Pillow. They differ
    # by more than 4 if a colour has changed by 8 levels, or the size of a shape by 5 %.
    assert max(high for _, high in difference.getextrema()) <= 4, tmp_path


def test_of_two_first_runs_at_once_the_second_uses_the_scenes_of_the_first(tmp_path, monkeypatch):
    """The first one is ready while the second one draws."""
    folder = tmp_path / "scenes"
    vocabulary = scenes.vocabulary
    small = partial(scenes.make_scenes, train=2, val=2, pictures=4)

    def first_is_ready():
        monkeypatch.setattr(scenes, "vocabulary", vocabulary)
        small(folder)
        (folder / "first").touch()
        return ""

    monkeypatch.setattr(scenes, "make_scenes", small)
    monkeypatch.setattr(scenes, "vocabulary", first_is_ready)

    scenes.find_or_make_scenes(folder)

    assert (folder / "first").exists()


def test_scenes_of_another_version_are_refused(tmp_path, monkeypatch):
    """Otherwise a run would train on old pictures. The first versions wrote no number."""
    scenes.make_scenes(tmp_path / "scenes", train=2, val=2, pictures=4)
    scenes.find_or_make_scenes(tmp_path / "scenes")

    monkeypatch.setattr(scenes, "VERSION", scenes.VERSION + 1)

    for folder in (tmp_path / "scenes", tmp_path):
        with pytest.raises(InputError, match="this version"):
            scenes.find_or_make_scenes(folder)


def test_a_hidden_folder_that_a_killed_run_has_left_does_not_block(tmp_path):
    """In a container the next run may have the same process id, as here."""
    killed, other = (new_folder(tmp_path / "scenes") for _ in range(2))
    killed.__enter__()

    with other as folder:
        (folder / "shard.tar").touch()

    assert (tmp_path / "scenes" / "shard.tar").exists()


def test_each_word_of_a_caption_is_one_token_and_a_caption_fits_the_context():
    tokenizer = Tokenizer(scenes.vocabulary())

    for *_, long in SAMPLES:
        assert len(tokenizer.encode(long)) == len(re.findall(r"\w+|[^\w ]", long)) <= 14


def test_a_picture_has_the_colour_of_its_class_and_held_out_has_all_names(scenes_folder):
    for path in scenes_folder.glob("zeroshot/colour*/*/*.jpg"):
        colour = scenes.COLOURS[path.parent.name.split()[0]]
        distance = np.abs(np.asarray(Image.open(path)).astype(int) - colour).max(axis=2)
        assert (distance <= 25).sum() > 30, path  # pixels

    sizes = [len([*path.iterdir()]) for path in scenes_folder.glob("zeroshot/held_out/*")]
    assert sorted(sizes) == 56 * [0] + 8 * [4]
