"""scripts/classes.py: shards become folders of classes."""

import json

import numpy as np
import pytest
from material import COLOURS, error_of, png, write_shard

import eval as evaluation
from scripts import classes


def write_samples(path, *names):
    """A shard with a grey picture for each of these names, which are in the field `type`. Returns
    the pictures."""
    pictures = [png(COLOURS["grey"], np.random.default_rng(i)) for i in range(len(names))]
    samples = []
    for name, picture in zip(names, pictures):
        # .json comes first, so that a shard that is cut at its end lacks a picture.
        samples.append({"json": json.dumps({"type": name}).encode(), "png": picture})
    write_shard(path, samples)
    return pictures


def sort_into(out, shard, *options):
    classes.main([str(shard), "--field", "type", "--out", str(out), *options])


def images_of(folder):
    """What is in a folder of classes: dict of class -> list of its images as bytes."""
    found = {}
    for path in sorted(folder.rglob("*.jpg")):
        found.setdefault(path.parent.name, []).append(path.read_bytes())
    return found


def test_a_field_sorts_the_images_into_folders(tmp_path):
    names = ["red", "blue", "red", "grey", "blue", "red", 7, None]
    pictures = write_samples(tmp_path / "0.tar", *names)
    out = tmp_path / "new" / "classes"

    sort_into(out, tmp_path / "0.tar", "--largest", "2", "--at_most", "2")

    assert images_of(out) == {"red": [pictures[0], pictures[2]], "blue": [pictures[1], pictures[4]]}
    assert evaluation.ClassFolders(out, 20).classes == ["blue", "red"]


def test_each_class_has_a_folder_of_its_own_inside_the_new_one(tmp_path):
    """Some characters cannot be in the name of a folder, and no name may lead out of it."""
    pictures = write_samples(tmp_path / "0.tar", "a/b", "a_b", "../up", "a\\b", ".hidden")

    sort_into(tmp_path / "out", tmp_path / "0.tar")

    folders = ["a_b", "a_b 2", "_._up", "a_b 3", "_hidden"]
    assert images_of(tmp_path / "out") == {x: [p] for x, p in zip(folders, pictures)}
    assert {path.name for path in tmp_path.iterdir()} == {"0.tar", "out"}


def test_an_image_that_cannot_be_read_is_left_out_and_counted(tmp_path, capsys):
    pictures = write_samples(tmp_path / "0.tar", "red", "red")
    shard = tmp_path / "cut.tar"
    content = (tmp_path / "0.tar").read_bytes()
    shard.write_bytes(content[: content.index(pictures[1]) + 100])

    sort_into(tmp_path / "out", shard)

    assert images_of(tmp_path / "out") == {"red": pictures[:1]}
    assert "cannot be read: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "field, name, named",
    [
        pytest.param("type", "red", "out", id="the folder is there"),
        pytest.param("colour", "red", "colour", id="no such field"),
        pytest.param("type", "x" * 300, "too long", id="the name of a class is too long"),
    ],
)
def test_nothing_is_written_after_a_mistake(field, name, named, tmp_path, capsys):
    write_samples(tmp_path / "0.tar", "first", name)
    out = tmp_path / "out"
    if named == "out":
        out.mkdir()
    before = sorted(tmp_path.rglob("*"))

    error = error_of(capsys, classes.main, tmp_path / "0.tar", "--field", field, "--out", out)

    assert named in error
    assert sorted(tmp_path.rglob("*")) == before
