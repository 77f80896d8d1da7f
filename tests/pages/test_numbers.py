"""Scores on the pages are those of the run whose log the repository keeps, or of the study."""

import json
import re

import pytest
from children import ROOT
from material import cases
from PIL import Image

from docs import found, histogram
from eval import format_score
from scripts.report import scores_of
from study import compare

RESULTS = ROOT / "study" / "results.md"
LOG = ROOT / "study" / "reference_log.jsonl"


# whole lines of scores, or the beginning of one
PRINTED = {
    "README.md": r"`(zero-shot \S+ +[\d.]+ %)`",
    "docs/tutorial.md": r"^(\S.* % +chance .* n [\d,]+)$",
}


@cases("page, shown", {page: (page, shown) for page, shown in PRINTED.items()})
def test_every_score_that_is_shown_is_one_of_the_reference_run(page, shown):
    validations = [json.loads(line) for line in LOG.open() if '"validation"' in line]
    lines = [format_score(s["name"], s) for row in validations for s in scores_of(row)]
    printed = "\n".join(" ".join(line.split()) for line in lines)

    scores = re.findall(shown, (ROOT / page).read_text(), re.M)

    assert scores
    assert [x for x in scores if " ".join(x.replace("_", " ").split()) not in printed] == []


# "93.6 -> 87.8, -5.8 ± 5.3", or the same in three columns of a table
DIFFERENCE = re.compile(r"([\d.]+)(?: ->| % \|) ([\d.]+)(?:,| % \|) ([+-][\d.]+ ± [\d.]+)")


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_every_difference_in_a_table_is_one_of_the_study(page):
    results = RESULTS.read_text().replace("*", "")

    shown = DIFFERENCE.findall((ROOT / page).read_text())

    assert shown
    assert [cell for cell in shown if "{} -> {}, {}".format(*cell) not in results] == []


def test_every_number_beside_a_row_of_the_picture_is_one_of_the_study():
    """The picture keeps its texts in the file."""
    results = RESULTS.read_text().replace("*", "")
    texts = Image.open(ROOT / "assets" / "found.png").text["Description"]

    shown = re.findall(r"[\d.]+ -> [\d.]+|[+-][\d.]+ ± [\d.]+", texts)

    assert shown
    assert [number for number in shown if number not in results] == []


def side(values):
    """A side of a row of the study, with a run for each value of a score."""
    return compare.Side(None, {}, [{"scores": {"type": {"value": value}}} for value in values])


def test_a_gain_whose_interval_includes_0_is_no_gain_in_the_picture():
    """The mean of n = 3 differences has the interval ± 4.3027 sd / sqrt(n)."""
    clip = side([0.10, 0.20, 0.30])
    at_clips_rate = side([0.19, 0.30, 0.41])  # 9, 10 and 11 points more: 10.0 ± 2.5
    superclip = side([0.20, 0.40, 0.60])  # 10, 20 and 30 points more: 20.0 ± 24.8

    texts = found.texts_of((clip, superclip, at_clips_rate), "type")

    headline, means, rate = texts
    assert headline == found.NO_GAIN
    assert means == "20.0 -> 40.0, +20.0 ± 24.8"
    assert rate.endswith("+10.0 ± 2.5")
    assert found.texts_of((clip, at_clips_rate), "type") == ["+10.0 ± 2.5", "20.0 -> 30.0"]


# ---- the histogram of a class

CLIP_LOG = (ROOT / "study" / "clip_log.jsonl").read_text()


def changed_log(**changes):
    """The log of plain CLIP, with changes in its header or in the arguments there."""
    first, rest = CLIP_LOG.split("\n", 1)
    row = json.loads(first)
    for part in (row["header"], row["header"]["arguments"]):
        part.update({name: value for name, value in changes.items() if name in part})
    return json.dumps(row) + "\n" + rest


def draw_histogram(folder, capsys):
    """Returns the runs that it counts, and the files that it leaves out, as it prints them."""
    histogram.main([str(folder), "--out", str(folder / "histogram.png")])

    assert (folder / "histogram.png").stat().st_size > 0
    lines = capsys.readouterr().out.splitlines()[:-1]
    out = [line for line in lines if line.startswith("left out")]
    return [line for line in lines if line not in out], out


def test_a_histogram_counts_a_finished_run_once(tmp_path, capsys):
    """Files have any name, and lie in folders at any depth."""
    (tmp_path / "anna" / "out").mkdir(parents=True)
    (tmp_path / "anna" / "out" / "log.jsonl").write_text(CLIP_LOG)
    (tmp_path / "anna.jsonl").write_text(CLIP_LOG)
    (tmp_path / "ben.jsonl").write_text(CLIP_LOG[: CLIP_LOG.rindex("\n", 0, -1)])
    rows = [json.loads(line) for line in CLIP_LOG.splitlines()]
    score = rows[-1]["zeroshot"]["scenes/zeroshot/colour_shape"]["value"]

    counted, left_out = draw_histogram(tmp_path, capsys)

    assert [f"{100 * score:.1f} %" in line and "anna" in line for line in counted] == [True]
    assert ["ben.jsonl" in line for line in left_out] == [True]


def test_a_histogram_leaves_out_what_is_no_log(tmp_path, capsys):
    """PowerShell's > writes UTF-16."""
    (tmp_path / "log.jsonl").write_text(CLIP_LOG)
    (tmp_path / "0.jsonl").write_text("")
    (tmp_path / "1.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "2.jsonl").write_text('{"header": {"steps": 1}, "step": 0}\n{"step": 1}\n')
    (tmp_path / "3.jsonl").write_text(CLIP_LOG[:-9])
    (tmp_path / "4.jsonl").write_text(CLIP_LOG, "utf-16")

    counted, left_out = draw_histogram(tmp_path, capsys)

    assert len(counted) == 1
    for i, line in enumerate(left_out):
        assert f"{i}.jsonl" in line
        assert len(line) < 300
    assert len(left_out) == 5


def test_a_histogram_keeps_rates_lengths_and_methods_apart(tmp_path, capsys):
    logs = [
        changed_log(learning_rate=1.75e-4),
        changed_log(learning_rate=1.75e-4, seed=1),
        changed_log(learning_rate=3.5e-4),
        changed_log(learning_rate=1.75e-4, steps=20),
        changed_log(learning_rate=1.75e-4, cls_weight=1.0),
    ]
    for i, log in enumerate(logs):
        (tmp_path / f"{i}.jsonl").write_text(log)

    counted, _ = draw_histogram(tmp_path, capsys)

    kinds = [line.partition(", seed")[0] for line in counted]
    assert kinds[0] == kinds[1]
    assert len({*kinds}) == 4
