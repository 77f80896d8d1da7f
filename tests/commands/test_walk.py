"""scripts/walk.py: the losses of a model that knows nothing are those that theory gives."""

import math

import pytest

from scripts import walk


def test_walk_finds_the_losses_that_theory_gives(capsys, monkeypatch):
    """The contrastive loss is near ln B, the word loss near ln V + 1/2."""
    monkeypatch.undo()  # conftest.py's smaller model

    walk.main([])

    lines = capsys.readouterr().out.splitlines()[-2:]
    losses = {name: float(loss) for name, loss, *_ in map(str.split, lines)}
    theory = {"contrastive_loss": math.log(256), "classification_loss": math.log(560) + 0.5}
    assert losses == pytest.approx(theory, abs=0.3)
