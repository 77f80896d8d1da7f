"""Test which curves scripts/curves.py draws from logs."""

import json

from material import run
from matplotlib import pyplot as plt

from scripts import curves

BEGIN = {"header": {"steps": 30}, "step": 0}
WAYS = {"there": {"R@1": {"chance": 0.02}}, "back": {"R@1": {"chance": 0.04}}}
SCORE = {"value": 0.7, "chance": 0.1, "n": 10, "interval": [0.35, 0.9]}
ZEROSHOT = {"x/held_out": SCORE, "a/b": SCORE, "c/b": SCORE}
VALIDATION = {
    "step": 20,
    "mean_r1": 0.25,
    "validation": WAYS,
    "zeroshot": ZEROSHOT,
    "val_group": 4,
    "val_contrastive_loss": 1.5,
}
TRAINING = {"step": 20, "loss": 0, "contrastive_loss": 2.5}


def write_log(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_panel_for_each_loss_and_score_and_a_line_for_each_run(tmp_path):
    """The panels of losses come first, also the panel of a term that a fork adds. Folders with the
    same last name have their paths as titles."""
    first = [BEGIN, VALIDATION, TRAINING]
    second = [BEGIN, {**TRAINING, "my_term": -1}]
    logs = write_log(tmp_path / "a.jsonl", first), write_log(tmp_path / "B.jsonl", second)

    assert not run(curves.main, *logs, "--out", tmp_path / "curves.svg")

    axes = plt.gcf().axes
    found = {}  # {title of a panel: the values of each line}
    for axis in axes:
        found[axis.get_title()] = [[*line.get_ydata()] for line in axis.get_lines()]
    names = [f"zero-shot {name} (%)" for name in ("held out", "a/b", "c/b")]
    assert [*found] == ["contrastive loss", "my term", "val contrastive loss", *names, "R@1 (%)"]
    scores = 3 * [[[70], [10, 10]]]
    assert [*found.values()] == [[[2.5], [2.5]], [[-1]], [[1.5]], *scores, [[25], [3, 3]]]
    [legend] = plt.gcf().legends
    assert [text.get_text() for text in legend.get_texts()] == [*map(str, logs)]
    assert (tmp_path / "curves.svg").stat().st_size > 10_000
