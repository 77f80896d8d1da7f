"""Scores on the pages are those of the run whose log the repository keeps, or of the study."""

import json
import re

import pytest
from children import ROOT
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


def plain(text):
    return " ".join(text.replace("_", " ").split())


@pytest.mark.parametrize("page, shown", PRINTED.items(), ids=PRINTED)
def test_every_score_that_is_shown_is_one_of_the_reference_run(page, shown):
    validations = [json.loads(line) for line in LOG.open() if '"validation"' in line]
    lines = [format_score(s["name"], s) for row in validations for s in scores_of(row)]
    printed = plain("\n".join(lines))

    scores = re.findall(shown, (ROOT / page).read_text(), re.M)

    assert scores
    assert [score for score in scores if plain(score) not in printed] == []


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
    sides = {"CLIP": clip, "SuperCLIP": superclip, "head": at_clips_rate}

    texts = found.texts_of(sides, "type")
    of_two = found.texts_of({"CLIP": clip, "SuperCLIP": at_clips_rate}, "type")

    headline, means, rate = texts
    assert headline == found.NO_GAIN
    assert means == "20.0 -> 40.0, +20.0 ± 24.8"
    assert rate.endswith("+10.0 ± 2.5")
    assert of_two == ["+10.0 ± 2.5", "20.0 -> 30.0"]


# ---- the histogram of a class

CLIP_LOG = (ROOT / "study" / "clip_log.jsonl").read_text()


def test_a_log_that_was_handed_in_twice_counts_once(tmp_path):
    """Files have any name, and lie in folders at any depth."""
    (tmp_path / "anna" / "out").mkdir(parents=True)
    for name, text in (("a.jsonl", "a"), ("b.jsonl", "a"), ("anna/out/log.jsonl", "b")):
        (tmp_path / name).write_text(text)

    files = histogram.log_files([tmp_path])

    assert sorted(file.read_text() for file in files) == ["a", "b"]


BAD_LOGS = {
    "empty": b"",
    "without a header": b'{"step": 1}\n',
    "of something else": b'{"header": {"steps": 1}, "step": 0}\n{"step": 1}\n',
    "cut": CLIP_LOG[:-9].encode(),
    "stopped after its first validation": "\n".join(CLIP_LOG.splitlines()[:2]).encode(),
    "of PowerShell's >": CLIP_LOG.encode("utf-16"),
}


def test_a_histogram_leaves_out_what_is_no_log_of_a_finished_run(tmp_path, capsys):
    (tmp_path / "good.jsonl").write_text(CLIP_LOG)
    for name, content in BAD_LOGS.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    score = json.loads(CLIP_LOG.splitlines()[-1])["zeroshot"]["scenes/zeroshot/colour_shape"]

    histogram.main([str(tmp_path), "--out", str(tmp_path / "histogram.png")])

    printed = capsys.readouterr().out
    left_out = re.findall(r"^left out.*/(.+).jsonl$", printed, re.M)
    assert sorted(left_out) == sorted(BAD_LOGS)
    kind = "CLIP, rate 0.000175, 1,500 steps of 32, seed 0"
    good = re.findall(rf"^{kind}: ([\d.]+) % .*good.jsonl", printed, re.M)
    assert good == [f"{100 * score['value']:.1f}"]
    assert (tmp_path / "histogram.png").stat().st_size > 0
