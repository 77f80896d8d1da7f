"""Test that docs/figures.py draws the results of the study, as the pages show them."""

import numpy as np
from material import run
from PIL import Image

from docs import figures


def pixels(path):
    return np.asarray(Image.open(path).convert("L"), int)


def test_the_results_of_the_study_are_drawn(tmp_path, monkeypatch):
    """A font of another machine may move a few letters."""
    shown = {name: pixels(figures.ASSETS / name) for name in ("found.png", "recipes.png")}
    monkeypatch.setattr(figures, "ASSETS", tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    assert not run(figures.main)

    for name, expected in shown.items():
        drawn = pixels(tmp_path / name)
        assert drawn.shape == expected.shape
        assert np.abs(drawn - expected).mean() < 5
