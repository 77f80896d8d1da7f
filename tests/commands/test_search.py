"""scripts/search.py against the slow way to search, and the file that keeps features."""

import os
from pathlib import Path

import numpy as np
import pytest
from material import (
    features_of,
    photo,
    png,
    result_of,
    run,
    small_model,
    write_checkpoint,
    write_shard,
)
from PIL import Image

import eval as evaluation
from scripts import search

TEXTS = ["a photo of the red square", "blue thing " * 200]  # the second is longer than the context


@pytest.fixture
def folders(folders, monkeypatch):
    """The usual folders, with pictures that differ enough for a model with random weights."""
    for i, file in enumerate(sorted(folders.rglob("*.png"))):
        photo(i).save(file)
    monkeypatch.chdir(folders)
    return folders


def test_the_ranking_is_the_slow_and_obvious_one(folders, checkpoint, capsys):
    argv = ["--checkpoint", checkpoint, "--images", ".", *TEXTS, "--k", 7]

    results, _ = result_of(capsys, search.main, folders / "found.json", *argv)

    model, tokenizer, _ = evaluation.load(checkpoint)
    files = sorted(Path().rglob("*.png"))
    features = features_of(checkpoint, files)
    for result, query in zip(results, model.encode_text(tokenizer(TEXTS)), strict=True):
        scores = (features @ query).tolist()
        best = sorted(zip(scores, map(str, files)), reverse=True)[:7]
        found = {one["name"]: one["score"] for one in result["found"]}
        assert [*found.values()] == pytest.approx([score for score, _ in best], abs=1e-5)
        assert found == pytest.approx({name: score for score, name in best}, abs=1e-5)


def test_shards_and_folders_are_searched_together(folders, checkpoint, capsys):
    """With captions and the names of packed files. A file that is named twice is found once."""
    picture = Path("red/0.png").read_bytes()
    sample = {"png": picture, "txt": b"a red ring", "json": b'{"image": "r.png"}'}
    write_shard("a.tar", [sample])
    argv = ["--checkpoint", checkpoint, "--data", "a.tar", "--images", "blue"]
    argv += ["--images", "blue/0.png", TEXTS[0]]

    [result], _ = result_of(capsys, search.main, folders / "found.json", *argv)

    found = [(one["name"], one["file"], one["caption"]) for one in result["found"]]
    files = [(f"blue/{i}.png", "", "") for i in range(4)]
    assert sorted(found) == [("a.tar:0000", "r.png", "a red ring"), *files]


def test_without_images_the_validation_pictures_of_the_run_are_searched(tmp_path, capsys):
    """With the captions of the run: those of json.long, where txt says something else."""
    sample = {"png": png("red"), "txt": b"short", "json": b'{"long": "a red ring"}'}
    shard = write_shard(tmp_path / "val.tar", [sample])
    options = {"val_data": [shard], "val_captions": ["json.long"], "captions": ["txt"]}
    header = {"arguments": options}
    write_checkpoint(tmp_path / "a.pt", small_model(), header=header)

    assert not run(search.main, "--checkpoint", tmp_path / "a.pt", "red")

    assert f"{shard}:0000  a red ring" in capsys.readouterr().out


# ---- the file of features


def test_another_program_can_read_the_features(folders, checkpoint, capsys):
    """With the file, the command finds what it has found without."""
    argv = ["--checkpoint", checkpoint, "--images", "blue", "--features", "x.npz", TEXTS[0]]

    first, again = [result_of(capsys, search.main, folders / "a.json", *argv) for _ in range(2)]

    assert again == first
    kept = np.load("x.npz")
    files = sorted(Path("blue").iterdir())
    assert kept["names"].tolist() == [f"{folders}/{file}" for file in files]
    np.testing.assert_allclose(kept["features"], features_of(checkpoint, files), atol=1e-5)


def test_only_new_and_changed_images_are_encoded(folders, checkpoint):
    """The edit keeps the size of the file. Features of zero tell which are as they were."""
    Image.new("RGB", (20, 20), "red").save("red/1.png", compress_level=0)
    write_shard("a.tar", [{"png": png("red")}])
    argv = ["--checkpoint", checkpoint, "--features", "x.npz", TEXTS[0]]
    argv += ["--images", "red", "--data", "a.tar"]
    assert not run(search.main, *argv)
    kept = dict(np.load("x.npz"))
    kept["features"][:] = 0
    np.savez("x.npz", **kept)

    Image.new("RGB", (20, 20), "blue").save("red/1.png", compress_level=0)
    Path("red/2.png").rename("red/9.png")
    Path("red/3.png").unlink()
    assert not run(search.main, *argv)

    kept = np.load("x.npz")
    names = [os.path.relpath(name) for name in kept["names"]]
    encoded = dict(zip(names, kept["features"].any(axis=1).tolist()))
    new = {"red/1.png": True, "red/9.png": True}
    assert encoded == {"red/0.png": False, "a.tar:0000": False, **new}
