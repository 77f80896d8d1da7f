"""The built-in world: pictures and captions agree, and validation asks what it should."""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import data
from scripts import scenes, walk

NAMES = {*scenes.CLOTHS, *scenes.PATTERNS, *scenes.BORDERS, *scenes.COLOURS, *scenes.SHAPES}


def read(folder, split, n):
    """Draw n samples. -> list of (fields of .json, words of the setting, looks of the objects)."""
    scenes.write_shard((f"{split}.tar", split, range(n)), folder, scenes.SETTINGS)
    pairs, samples = data.Pairs([f"{folder}/{split}.tar"], None, 0), []
    for row in pairs.index.tolist():
        fields = json.loads(pairs.read(row, data.JSON))
        picture = data.load_image(pairs.read(row, data.IMAGE), 72).permute(1, 2, 0)
        assert has(picture, scenes.draw(fields["scene"]), 40).mean() > 0.99  # JPEG changes it
        assert pairs.texts(row, "txt") == [fields["short"]]
        *setting, objects = fields["scene"].values()
        samples.append((fields, setting, sorted((o["colour"], o["shape"]) for o in objects)))
    return samples


def has(picture, colour, tolerance=2):
    return np.abs(np.asarray(picture).astype(int) - colour).max(axis=2) <= tolerance


def test_captions_tell_the_truth_and_validation_asks_for_what_training_never_shows(tmp_path):
    train, val = read(tmp_path, "train", 150), read(tmp_path, "val", 300)
    content = json.dumps([fields for fields, _, _ in train + val])  # the same on all machines
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "358ee5b63dffca28"
    assert [len({*names}) for names in zip(*scenes.HELD_OUT)] == [8, 8]  # each colour and shape
    assert not {*scenes.HELD_OUT} & {look for _, _, looks in train for look in looks}
    assert {*scenes.HELD_OUT} <= {look for _, _, looks in val for look in looks}
    assert len({(*setting, *looks) for _, setting, looks in val}) == 300  # no caption fits two
    tokenizer = data.Tokenizer(scenes.vocabulary())
    texts = ["a photo of a red star.", "a picture of a ring.", "a photo of the blue.", "a pink."]
    for fields, setting, looks in train:
        facts = {*setting, *(word for look in looks for word in look)}
        assert NAMES.intersection(re.findall(r"\w+", fields["long"])) == facts
        assert NAMES.intersection(re.findall(r"\w+", fields["short"])) <= facts
        for colour, shape in looks:
            assert f"{'an' if colour == 'orange' else 'a'} {colour} {shape}" in fields["long"]
        texts += fields["short"], fields["long"]
    assert all(len(tokenizer.encode(x)) == len(re.findall(r"\w+|[^\w ]", x)) <= 14 for x in texts)


def test_a_picture_shows_what_its_scene_says():
    for i, (colour, shape) in enumerate(scenes.COMBINATIONS):
        scene = scenes.make_scene(random.Random(i), [(colour, shape)], count=1)
        picture, (x0, y0, x1, y1) = scenes.draw(scene), scene["objects"][0]["box"]
        inside = has(picture, scenes.COLOURS[colour])
        y, x = inside.nonzero()
        assert len(x) > 30 and min(x0, y0) >= 0 and max(x1, y1) <= 1
        assert 72 * x0 - 1 <= x.min() and x.max() <= 72 * x1 + 1
        assert 72 * y0 - 1 <= y.min() and y.max() <= 72 * y1 + 1
        assert inside[round(36 * (y0 + y1)), round(36 * (x0 + x1))] == (shape != "ring")
        assert has(picture, scenes.BORDERS[scene["border"]])[::71, ::71].sum() >= 3  # corners
        assert has(picture, scenes.CLOTHS[scene["cloth"]]).mean() > 0.1
    light = np.array(scenes.CLOTHS["navy"]) + 22
    pictures = [scenes.draw_setting("navy", pattern, "gold", 288) for pattern in scenes.PATTERNS]
    assert [round(has(x, light).mean(), 1) for x in pictures] == [0, 0.3, 0.4, 0.1]
    for i in range(200):
        scene = scenes.make_scene(random.Random(i), scenes.COMBINATIONS, count=2)
        a, b = (o["box"] for o in scene["objects"])
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_class_folders_hold_what_their_names_say(tmp_path):
    scenes.write_classes(tmp_path)
    counts = {("colour", name): 40 for name in scenes.COLOURS}
    counts |= {("shape", name): 40 for name in scenes.SHAPES}
    counts |= {("colour_shape", " ".join(look)): 10 for look in scenes.COMBINATIONS}
    counts |= {("held_out", " ".join(look)): 40 for look in scenes.HELD_OUT}
    root = tmp_path / "zeroshot"
    assert Counter(path.parts[-3:-1] for path in root.glob("*/*/*.jpg")) == counts
    assert len([*(root / "held_out").iterdir()]) == 64  # names to choose from
    for path in root.glob("colour*/*/*.jpg"):
        assert has(Image.open(path), scenes.COLOURS[path.parent.name.split()[0]], 25).sum() > 30


def test_walk_finds_the_losses_that_theory_gives(capsys):
    """At their start: the contrastive loss is near ln B, the word loss near ln V + 1/2."""
    walk.main([])
    for line in capsys.readouterr().out.splitlines()[-2:]:
        _, loss, *_, theory = line.split()
        assert float(loss) == pytest.approx(float(theory), abs=0.3)


def test_a_world_is_drawn_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError):  # in a process that draws
        scenes.make_scenes(tmp_path / "broken", train=0, val=1, settings=["no setting"])
    assert [*tmp_path.iterdir()] == []


def small_world(folder):
    scenes.make_scenes(folder, train=2, val=1)
    return {path.name for path in folder.glob("*.t*")}


WORLD = {"train-00000.tar", "val-00000.tar", "vocab.tiktoken"}


# Locks a file until its standard input ends
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_run_has_left_is_removed_and_what_another_one_draws_is_not(tmp_path):
    dead, alive = tmp_path / ".scenes-dead", tmp_path / ".scenes-alive"
    for folder in (dead, alive):
        (folder / "scenes").mkdir(parents=True)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, alive / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()  # it has locked its folder

    drawn = small_world(tmp_path / "scenes")

    other.communicate()
    assert drawn == WORLD
    assert {path.name for path in tmp_path.iterdir()} == {"scenes", ".scenes-alive"}


def test_scenes_that_another_run_finishes_first_are_used(tmp_path, monkeypatch):
    faster = tmp_path / "scenes" / "of the other.tar"

    def vocabulary():  # while this run draws, the folder appears
        faster.parent.mkdir()
        faster.touch()
        return ""

    monkeypatch.setattr(scenes, "vocabulary", vocabulary)

    drawn = small_world(tmp_path / "scenes")

    assert drawn == {faster.name}
    assert [*tmp_path.iterdir()] == [faster.parent]
