"""scripts/curves.py: what it draws of a log."""

import json

from material import run
from PIL import Image

from scripts import curves

SCORE = {"value": 0.7, "chance": 0.1, "n": 10, "interval": [0.35, 0.9]}
BEGIN = {"header": {"steps": 30}, "step": 0}


def training_row(step, loss):
    """With a term of a fork, which is subtracted."""
    return {"step": step, "loss": 0, "contrastive_loss": loss, "my_loss": -loss, "grad_norm": 1}


def validation_row(step, r1):
    zeroshot = dict.fromkeys(["x/held_out", "a/x/seen", "b/x/seen"], SCORE)
    return {"step": step, "mean_r1": r1, "val_contrastive_loss": 2 - r1, "zeroshot": zeroshot}


def test_a_log_is_read_as_the_resumed_run_left_it(tmp_path):
    """It was killed after step 25, and went on from step 10. A score has the name of its folder,
    and of those above it where several have that name."""
    rows = [BEGIN, training_row(10, 2.5), training_row(20, 9.0), validation_row(20, 0.9)]
    rows += [training_row(25, 9.0), {**BEGIN, "step": 10}]
    rows += [training_row(20, 1.5), validation_row(20, 0.25)]
    rows += [training_row(30, 0.5), validation_row(30, 0.5)]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, rows)))

    found = curves.curves_of(log)

    assert found["contrastive_loss"] == [(10, 2.5), (20, 1.5), (30, 0.5)]
    assert found["my_loss"] == [(10, -2.5), (20, -1.5), (30, -0.5)]
    assert found["val_contrastive_loss"] == [(20, 1.75), (30, 1.5)]
    assert found["R@1 (%)"] == [(20, 25), (30, 50)]
    for name in ("held_out", "a/x/seen", "b/x/seen"):
        assert found[f"{name} (%)"] == [(20, 70), (30, 70)]
    assert not run(curves.main, log, log, "--out", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000
