"""Test that docs/figures.py draws the pictures of the pages."""

import re
import shutil

from children import ROOT
from material import run

from docs import figures

PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("study/*.md")]
OF_SCRIPTS = {"curve.png", "words.png"}  # scripts.curves and scripts.words draw these


def test_each_png_of_the_pages_is_drawn_by_a_command(tmp_path, monkeypatch):
    shutil.copy(figures.ASSETS / "tiny.pt", tmp_path)
    monkeypatch.setattr(figures, "ASSETS", tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    assert not run(figures.main)

    shown = set()
    for page in PAGES:
        shown |= {*re.findall(r"!\[[^]]*\]\(\S*/(\S+\.png)\)", page.read_text())}
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn | OF_SCRIPTS == shown
