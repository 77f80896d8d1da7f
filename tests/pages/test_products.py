"""Scores in docs/products.md are those that eval.py has written with --json, kept in
docs/products/scores.json and fine_tuning.json."""

import json
import math
import re
import statistics

import pytest
from children import ROOT
from score_lines import SCORE_LINE, numbers_in, printed

PAGE = (ROOT / "docs" / "products.md").read_text()
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "study" / "results.md").read_text()
SCORES = json.loads((ROOT / "docs" / "products" / "scores.json").read_text())
FINE_TUNING = json.loads((ROOT / "docs" / "products" / "fine_tuning.json").read_text())
RUNS = [json.loads(line) for line in (ROOT / "docs" / "products" / "runs.jsonl").open()]
SHOWN = "SuperCLIP, 32 epochs"  # whose lines the page prints


def cells_of(line):
    return [cell.strip() for cell in line.strip("| \n").split("|")]


def rows_below(heading):
    """The cells of a table's rows, by the heading of its first column."""
    table = PAGE.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return [cells_of(line) for line in table.splitlines()[2:]]


# ---- lines as eval.py prints them


def scores_in(content, name=""):
    """Every score in what --json holds, with the name of its line."""
    if isinstance(content, list):
        for item in content:
            yield from scores_in(item, item["name"] if isinstance(item, dict) else "")
    elif isinstance(content, dict) and "interval" in content:
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from scores_in(value, f"{name} {key}".strip().replace("_", " "))


def test_every_line_of_scores_is_one_that_was_measured():
    measured = {
        printed(*score) for content in SCORES[SHOWN].values() for score in scores_in(content)
    }

    lines = SCORE_LINE.findall(PAGE)

    assert len(lines) > 10
    assert [line for line in lines if line not in measured] == []


# ---- the table of lengths and methods


def mean_of_ways(retrieval, k):
    return statistics.mean(retrieval[way][k]["value"] for way in ("image_to_text", "text_to_image"))


def summary(scores):
    """What a row of the table shows, in percent."""
    shares = [
        mean_of_ways(scores["retrieval"], "R@1"),
        mean_of_ways(scores["retrieval"], "R@10"),
        scores["types"]["top1"]["value"],
        scores["colours"]["top1"]["value"],
        scores["probe"]["class token"]["value"],
        scores["probe"]["patch mean"]["value"],
    ]
    return [f"{100 * share:.1f}" for share in shares]


@pytest.mark.parametrize("name", SCORES)
def test_a_row_of_the_table_is_what_was_measured(name):
    found = {model: numbers for model, *numbers in rows_below("model")}

    assert found[name] == summary(SCORES[name])


# ---- the table of fine-tuning

T = {2: 4.303}  # Student's t for 95 %, by degrees of freedom


def difference(values, before):
    """Mean difference with its 95 % interval, as the page writes it."""
    differences = [100 * (value - before) for value in values]
    half = T[len(values) - 1] * statistics.stdev(differences) / math.sqrt(len(values))
    return f"{statistics.mean(differences):+.1f} ± {half:.1f}"


VARIANTS = [name for name in FINE_TUNING if name != "before"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_of_fine_tuning_is_what_was_measured(name):
    [before] = FINE_TUNING["before"]
    expected = []
    for kind, start in before.items():
        values = [run[kind] for run in FINE_TUNING[name]]
        expected.append(f"{100 * statistics.mean(values):.1f}, {difference(values, start)}")

    [cells] = [cells for row, *cells in rows_below("fine-tuning") if row == name]

    assert cells == expected


def test_the_row_before_fine_tuning_is_what_was_measured():
    [before] = FINE_TUNING["before"]

    [cells] = [cells for row, *cells in rows_below("fine-tuning") if row == "before"]

    assert cells == [f"{100 * value:.1f}" for value in before.values()]


# ---- sentences


def losses(name):
    """The contrastive loss of a model at the end, in training and in its last validation."""
    rows = [row for row in RUNS if row["model"] == name]
    [training] = [row["training"]["contrastive_loss"] for row in rows if "training" in row]
    validations = [row["val_contrastive_loss"] for row in rows if "validation" in row]
    return training, validations[-1]


def r1(name):
    return 100 * mean_of_ways(SCORES[name]["retrieval"], "R@1")


LONGEST = r1("CLIP, 32 epochs"), r1("SuperCLIP, 32 epochs")

SENTENCES = {  # each # stands for one of the numbers, in this order
    "contrastive loss is # on them and # on the validation": losses("SuperCLIP, 32 epochs"),
    "where it was # and # after 8 epochs": losses("SuperCLIP, 8 epochs"),
    "an R@1 of # against # %": LONGEST[::-1],
    "R@1 is # % for CLIP and # % for SuperCLIP (chance 0.04": LONGEST,
    "named right in # %": [100 * SCORES[SHOWN]["colours"]["top1"]["value"]],
}


@pytest.mark.parametrize("sentence, numbers", SENTENCES.items(), ids=SENTENCES)
def test_a_sentence_has_the_numbers_that_were_measured(sentence, numbers):
    found = numbers_in(sentence, PAGE + README)

    for text, number in zip(found, numbers, strict=True):
        digits = len(text.partition(".")[2])
        assert text == f"{number:.{digits}f}"


@pytest.mark.parametrize("numbers", ["5.4 ± 2.8", "14.9 -> 13.8, -1.2 ± 3.1"])
def test_what_the_page_says_of_the_study_is_in_its_results(numbers):
    assert numbers in RESULTS
    assert all(number in PAGE for number in re.findall(r"[\d.]+", numbers))
