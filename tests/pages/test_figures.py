"""Test that docs/figures.py draws the results of the study, as the pages show them."""

import numpy as np
import pytest
from material import run
from PIL import Image

from docs import figures


def pixels(folder, name):
    return np.asarray(Image.open(folder / name).convert("L"), int)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Return the folder with the pictures, drawn anew."""
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "ASSETS", folder)
        patch.setenv("MPLBACKEND", "Agg")
        assert not run(figures.main)
    return folder


@pytest.mark.parametrize("name", ["found.png", "recipes.png"])
def test_the_results_of_the_study_are_drawn(name, drawn):
    """A font of another machine may move a few letters."""
    shown = pixels(figures.ASSETS, name)

    again = pixels(drawn, name)

    assert again.shape == shown.shape
    assert np.abs(again - shown).mean() < 5
