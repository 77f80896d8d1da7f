"""scripts/classes.py: shards become folders of classes."""

import json

import numpy as np
from material import COLOURS, error_of, png, write_shard

import eval as evaluation
from scripts import classes


def test_a_field_sorts_the_images_into_folders(tmp_path, capsys):
    """The largest classes alone, so many images of each. No name leads out of the folder, and what
    has no such field is left out."""
    names = ["red", "../up", "red", "blue", "_._up", "red", 7, None]
    pictures = [png(COLOURS["grey"], np.random.default_rng(i)) for i in range(len(names))]
    fields = [json.dumps({"type": name} if name else {}).encode() for name in names]
    samples = [{"png": picture, "json": field} for picture, field in zip(pictures, fields)]
    shard, out = write_shard(tmp_path / "0.tar", samples), tmp_path / "new" / "classes"
    argv = [str(shard), "--field", "type", "--largest", "2", "--at_most", "2", "--out", str(out)]
    classes.main(argv)
    dataset = evaluation.ClassFolders(out, 20)
    assert dataset.classes == ["_._up", "red"]
    found = [(path.read_bytes(), label) for path, label in dataset.samples]
    assert found == [(pictures[1], 0), (pictures[4], 0), (pictures[0], 1), (pictures[2], 1)]
    assert str(out) in error_of(capsys, classes.main, *argv)
    argv[2] = "colour"
    assert "colour" in error_of(capsys, classes.main, *argv[:-1], tmp_path / "other")
