"""scripts/curves.py: what it draws of a log."""

import json

from material import run
from matplotlib import pyplot as plt

from scripts import curves

SCORE = {"value": 0.7, "chance": 0.1, "n": 10, "interval": [0.35, 0.9]}
BEGIN = {"header": {"steps": 30}, "step": 0}


def training_row(step, loss):
    """With a term of a fork, which is subtracted."""
    return {"step": step, "loss": 0, "contrastive_loss": loss, "my_loss": -loss, "grad_norm": 1}


def validation_row(step, r1):
    zeroshot = dict.fromkeys(["x/held_out", "a/x/seen", "b/x/seen"], SCORE)
    ways = {"there": {"R@1": {"chance": 0.02}}, "back": {"R@1": {"chance": 0.04}}}
    row = {"step": step, "mean_r1": r1, "val_contrastive_loss": 2 - r1}
    return {**row, "validation": ways, "zeroshot": zeroshot}


def write_log(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_log_is_read_as_the_resumed_run_left_it(tmp_path):
    """It was killed after step 25, and went on from step 10. A score has the name of its folder,
    and of those above it where several have that name."""
    rows = [BEGIN, training_row(10, 2.5), training_row(20, 9.0), validation_row(20, 0.9)]
    rows += [training_row(25, 9.0), {**BEGIN, "step": 10}]
    rows += [training_row(20, 1.5), validation_row(20, 0.25)]
    rows += [training_row(30, 0.5), validation_row(30, 0.5)]

    found, chances = curves.curves_of(write_log(tmp_path / "log.jsonl", *rows))

    assert found["contrastive_loss"] == [(10, 2.5), (20, 1.5), (30, 0.5)]
    assert found["my_loss"] == [(10, -2.5), (20, -1.5), (30, -0.5)]
    assert found["val_contrastive_loss"] == [(20, 1.75), (30, 1.5)]
    assert (found["R@1"], chances["R@1"]) == ([(20, 25), (30, 50)], 3)
    for name in ("zero-shot held_out", "zero-shot a/x/seen", "zero-shot b/x/seen"):
        assert (found[name], chances[name]) == ([(20, 70), (30, 70)], 10)


def test_losses_come_first_and_a_run_has_the_name_of_its_folder(tmp_path):
    """Or that of its file. A run may have a term that another lacks."""
    clip = training_row(10, 2.5)
    del clip["my_loss"]
    first = write_log(tmp_path / "out_clip" / "log.jsonl", BEGIN, validation_row(0, 0.1), clip)
    second = write_log(tmp_path / "mine.jsonl", BEGIN, training_row(10, 2.5))

    assert not run(curves.main, first, second, "--out", tmp_path / "curves.png")

    figure = plt.gcf()
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:4] == ["contrastive loss", "my loss", "val contrastive loss", "R@1"]
    assert len(titles) == 7
    assert figure.axes[3].get_ylim() == (0, 100)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["out_clip", "mine.jsonl"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
