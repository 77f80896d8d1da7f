"""scripts/walk.py: the losses of a model that knows nothing are those that theory gives."""

import pytest

from scripts import walk


def test_walk_finds_the_losses_that_theory_gives(capsys, monkeypatch):
    """The contrastive loss is near ln B, the word loss near ln V + 1/2."""
    monkeypatch.undo()  # conftest.py's smaller model

    walk.main([])

    for line in capsys.readouterr().out.splitlines()[-2:]:
        _, loss, *_, theory = line.split()
        assert float(loss) == pytest.approx(float(theory), abs=0.3)
