"""Test that docs/figures.py draws the scores of the study, as the pages show them."""

import numpy as np
from material import run
from PIL import Image

from docs import figures


def test_the_scores_of_the_study_are_drawn(tmp_path, monkeypatch):
    """A font of another machine may move a few letters."""
    shown = np.asarray(Image.open(figures.ASSETS / "found.png").convert("L"), int)
    monkeypatch.setattr(figures, "ASSETS", tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    assert not run(figures.main)

    drawn = np.asarray(Image.open(tmp_path / "found.png").convert("L"), int)
    assert drawn.shape == shown.shape
    assert np.abs(drawn - shown).mean() < 5
