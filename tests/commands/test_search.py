"""Test scripts/search.py: a slow search finds the same. Test its file of features."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from material import error_of, photo, run, small_model, write_checkpoint
from PIL import Image

import eval as evaluation
from common.images import load_image
from scripts import search

TEXTS = ["a photo of the red zebra", "blue thing " * 200]  # the second is longer than the context


@pytest.fixture
def folders(folders, monkeypatch):
    """Return the folders of conftest.py, with pictures that random weights can tell apart."""
    for i, file in enumerate(sorted(folders.rglob("*.png"))):
        photo(i).save(file)
    monkeypatch.chdir(folders)
    return folders


def test_the_ranking_is_the_slow_and_obvious_one(folders, checkpoint, capsys):
    """The second search takes the features from a file, which other programs can read. The sheet
    has four pictures in a row, so the 14 that are found fill four rows."""
    argv = ["--checkpoint", checkpoint, "--images", ".", *TEXTS, "--k", 7, "--features", "x.npz"]
    argv += ["--out", "../found.png"]

    printed = []
    for _ in range(2):
        assert not run(search.main, *argv)
        printed.append(capsys.readouterr().out)

    assert printed[0] == printed[1]
    assert "lacks these words: zebra." in printed[0]
    results = re.findall(r"^ +(-?[01]\.\d{3})  (\S+)$", printed[0], re.M)
    found = [{name: float(score) for score, name in part} for part in (results[:7], results[7:])]
    model, tokenizer, _ = evaluation.load(checkpoint)
    files = sorted(Path().rglob("*.png"))
    features = torch.cat([model.encode_image(load_image(file, 16)[None]) for file in files])
    for scores_of, query in zip(found, model.encode_text(tokenizer(TEXTS)), strict=True):
        scores = (features @ query).tolist()
        best = sorted(zip(scores, map(str, files)), reverse=True)[:7]
        assert scores_of == pytest.approx({name: score for score, name in best}, abs=6e-4)
    width, height = Image.open("../found.png").size
    assert width > 4 * search.SIDE and height > 4 * search.SIDE
    kept = np.load("x.npz")
    assert kept["names"].tolist() == [str(file.resolve()) for file in files]
    np.testing.assert_allclose(kept["features"], features, atol=1e-5)


def test_only_new_and_changed_files_are_encoded(folders, checkpoint):
    """We set all kept features to zero. Features that are still zero were not computed again. A
    search of fewer pictures leaves the file as it is, and one of others keeps their features."""
    argv = ["--checkpoint", checkpoint, TEXTS[0], "--features", "x.npz", "--images"]

    def encoded():
        assert not run(search.main, *argv, "red")
        kept = dict(np.load("x.npz"))
        names = {Path(name).name for name, x in zip(kept["names"], kept["features"]) if x.any()}
        kept["features"][:] = 0
        np.savez("x.npz", **kept)
        return names

    assert encoded() == {"0.png", "1.png", "2.png", "3.png"}
    assert encoded() == set()
    Path("red/2.png").rename("red/9.png")
    photo(77).save("red/1.png")
    Path("red/link.png").symlink_to("nowhere.png")  # It is skipped.
    assert encoded() == {"1.png", "9.png"}
    assert len(np.load("x.npz")["names"]) == 4  # without 2.png
    before = Path("x.npz").read_bytes()
    assert not run(search.main, *argv, "red/9.png")
    assert Path("x.npz").read_bytes() == before
    assert not run(search.main, *argv, "blue")
    assert encoded() == {path.name for path in Path("blue").iterdir()}


def test_features_of_another_checkpoint_are_refused(folders, checkpoint, capsys):
    other = write_checkpoint("other.pt", small_model(cls_weight=0))
    argv = ["--images", "red", TEXTS[0], "--features", "x.npz"]
    assert not run(search.main, "--checkpoint", other, *argv)
    before = Path("x.npz").read_bytes()

    assert "x.npz" in error_of(capsys, search.main, "--checkpoint", checkpoint, *argv)
    assert Path("x.npz").read_bytes() == before
