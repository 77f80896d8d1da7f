"""Scores on the pages are those of the run whose log the repository keeps, or of the study."""

import json
import re

import pytest
from children import ROOT

from docs import histogram
from eval import format_score
from scripts.report import scores_of

RESULTS = ROOT / "study" / "results.md"
LOG = ROOT / "study" / "reference_log.jsonl"


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_every_line_of_scores_is_one_of_the_reference_run(page):
    validations = [json.loads(line) for line in LOG.open() if '"validation"' in line]
    printed = {format_score(s["name"], s) for row in validations for s in scores_of(row)}

    shown = re.findall(r"^\S.* % +chance .* n [\d,]+$", (ROOT / page).read_text(), re.M)

    assert shown
    assert [line for line in shown if line.replace("_", " ") not in printed] == []


# "93.6 -> 87.8, -5.8 ± 5.3", or the same in three columns of a table
DIFFERENCE = re.compile(r"([\d.]+)(?: ->| % \|) ([\d.]+)(?:,| % \|) ([+-][\d.]+ ± [\d.]+)")


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_every_difference_in_a_table_is_one_of_the_study(page):
    results = RESULTS.read_text().replace("*", "")

    shown = DIFFERENCE.findall((ROOT / page).read_text())

    assert shown
    assert [cell for cell in shown if "{} -> {}, {}".format(*cell) not in results] == []


def test_a_histogram_counts_the_finished_runs_of_a_class(tmp_path, capsys):
    """Files by any name, in folders at any depth. A run that has not ended is left out."""
    (tmp_path / "anna" / "out").mkdir(parents=True)
    log = (ROOT / "study" / "clip_log.jsonl").read_text()
    (tmp_path / "anna" / "out" / "log.jsonl").write_text(log)
    (tmp_path / "ben.jsonl").write_text(log[: log.rindex("\n", 0, -1)])

    histogram.main([str(tmp_path), "--out", str(tmp_path / "histogram.png")])

    printed = capsys.readouterr().out
    assert re.search(r"CLIP, rate 0.00035, seed 0: 22.0 % .*anna", printed)
    assert re.search("not finished.*ben", printed)
    assert (tmp_path / "histogram.png").stat().st_size > 0
