"""The plan and the page of the study: searches are fair, intervals are right, and the page says
what the runs say."""

import math
import re

import numpy as np
import pytest
from material import error_of

from study import compare, run

METRICS = {metric for part in compare.PARTS.values() for metric in part.metrics}
EVERY_ROW = [(name, row) for name, part in compare.PARTS.items() for row in part.rows]
EARLIER_PARTS = [name for name, p in compare.PARTS.items() if p.rule == compare.EARLIER]


# ---- the search for a learning rate


def result_of(spec, value, second=None):
    """A finished run in which R@1 is `value`, and all other scores are `second`."""
    scores = {m: {"value": value, "chance": 0.1, "n": 100} for m in ("R@1", *METRICS)}
    if second is not None:
        scores |= {m: {**s, "value": second} for m, s in scores.items() if m != "R@1"}
    made = {"seconds": 1.0, "dtype": "float32", "device": "x"}
    return {"spec": spec, "scores": scores, **made}


def finish(study, part, value_of):
    """Pretend to have made the runs that a part needs. value_of: spec -> what its run scores."""
    part = part._replace(rule=compare.BEST_MEAN)
    while todo := study.todo(part):
        for spec in todo:
            study.add(result_of(spec, value_of(spec)))


def test_a_search_has_four_rates_with_three_seeds_each(tmp_path):
    study = compare.Study(tmp_path / "runs.jsonl")

    specs = study.search({**run.RUN, "cls_weight": 0.3, "captions": "short"}).missing

    assert [spec["learning_rate"] for spec in specs[::3]] == [8.75e-5, 1.75e-4, 3.5e-4, 7e-4]
    assert [spec["seed"] for spec in specs] == 4 * [100, 101, 102]
    alike = {**run.RUN, "search": "mean"}  # the word loss has its usual weight, captions are mixed
    assert {compare.key({**s, "learning_rate": None, "seed": 0}) for s in specs} == {
        compare.key(alike)
    }


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        pytest.param({8.75e-5: 1, 1.75e-4: 3, 3.5e-4: 2, 7e-4: 0}, 1.75e-4, id="inside"),
        pytest.param(
            {2.19e-5: 3, 4.37e-5: 5, 8.75e-5: 4, 1.75e-4: 3, 3.5e-4: 2, 7e-4: 0},
            4.37e-5,
            id="goes on below the lower end",
        ),
        pytest.param(
            {8.75e-5: 1, 1.75e-4: 2, 3.5e-4: 3, 7e-4: 4, 1.4e-3: 4.5, 2.8e-3: 0},
            1.4e-3,
            id="goes on above the upper end",
        ),
    ],
)
def test_a_search_goes_on_while_its_best_rate_is_at_an_end(tmp_path, scores, best):
    study = compare.Study(tmp_path / "runs.jsonl")

    while missing := study.search(run.RUN).missing:
        for spec in missing:
            study.add(result_of(spec, scores[spec["learning_rate"]]))

    search = study.search(run.RUN)
    assert list(search.tried) == list(scores)
    assert search.best == best


def test_the_mean_of_both_scores_and_of_three_seeds_decides(tmp_path):
    """1.75e-4 has the best R@1, and 3.5e-4 the best single seed. 7e-4 has the best mean."""
    study = compare.Study(tmp_path / "runs.jsonl")
    values = {8.75e-5: (0.1, 0.1), 1.75e-4: (0.9, 0.1), 3.5e-4: (0.4, 0.4), 7e-4: (0.7, 0.7)}
    values[1.4e-3] = (0.1, 0.1)

    while missing := study.search(run.RUN).missing:
        for spec in missing:
            lucky = spec["learning_rate"] == 3.5e-4 and spec["seed"] == 100
            first, second = (0.95, 0.95) if lucky else values[spec["learning_rate"]]
            study.add(result_of(spec, first, second))

    assert study.search(run.RUN).best == 7e-4


def test_both_methods_get_the_same_searches(tmp_path):
    study = compare.Study(tmp_path / "runs.jsonl")
    searches = {0.0: set(), 1.0: set()}

    for part in compare.PARTS.values():
        finish(study, part, lambda spec: -abs(math.log(spec["learning_rate"] / 3e-4 or 1)))

    for spec in (result["spec"] for result in study.results.values()):
        if spec["search"]:
            searches[spec["cls_weight"]].add(compare.key({**spec, "cls_weight": None}))
    assert searches[0.0] == searches[1.0]
    assert len(searches[0.0]) > 100


@pytest.mark.parametrize(
    ("name", "row"), EVERY_ROW, ids=[f"{name}: {row.label}" for name, row in EVERY_ROW]
)
def test_the_kinds_of_a_row_differ_in_one_thing(name, row):
    a = {**run.RUN, **row.a}
    b = {**run.RUN, **row.b}

    differs = {k for k in a if a[k] != b[k]}

    if "untrained" in row.label:
        differs -= {"cls_weight"}  # which changes no random weights of the towers
    assert len(differs) == 1


# ---- what is finished, and what is not


def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path):
    """Runs of three seeds are the first ones of five."""
    path = tmp_path / "runs.jsonl"
    part = compare.Part("", compare.BEST_MEAN, 3, ("R@1",), [compare.both("batch 32")])
    study = compare.Study(path)
    finish(study, part, lambda _: 0.5)

    again = compare.Study(path)

    assert again.results == study.results
    assert again.todo(part) == []
    todo = again.todo(part._replace(seeds=5))
    assert {(spec["cls_weight"], spec["seed"]) for spec in todo} == {
        (0.0, 3), (0.0, 4), (1.0, 3), (1.0, 4),
    }  # fmt: skip


def test_earlier_runs_are_neither_searched_nor_taken_for_todays(tmp_path):
    study = compare.Study(tmp_path / "runs.jsonl")
    row = compare.both("batch 32")
    earlier = compare.Part("", compare.EARLIER, 3, ("R@1",), [row])
    for weight in (0.0, 1.0):
        for seed in range(3):
            spec = {**run.RUN, "cls_weight": weight, "learning_rate": 1e-4, "seed": seed}
            study.add({**result_of(spec, 0.5), "earlier": True})

    today = earlier._replace(rule=compare.BEST_MEAN)

    assert list(study.rows(earlier)) == ["batch 32"]
    assert study.specs(earlier, row.a)[0]["learning_rate"] == 1e-4  # read off the runs
    assert study.rows(today) == {}
    assert all(spec["search"] for spec in study.todo(today))


@pytest.mark.parametrize(("seeds", "shown"), [(2, False), (3, True), (5, True)])
def test_a_row_appears_when_its_seeds_are_there(tmp_path, seeds, shown):
    study = compare.Study(tmp_path / "runs.jsonl")
    row = compare.both("fixed rate", learning_rate=1e-3)
    part = compare.Part("", compare.BEST_MEAN, 5, ("R@1",), [row])

    finish(study, part._replace(seeds=seeds), lambda _: 0.5)

    assert ("fixed rate" in "\n".join(compare.table_of(study, "name", part))) == shown


# ---- the report


def test_an_interval_is_students():
    """1, 2, 3 have mean 2 and standard error 1 / sqrt(3)."""
    mean, half = compare.interval([1, 2, 3])

    assert mean == 2
    assert math.isclose(half, 4.303 / math.sqrt(3), rel_tol=1e-4)


@pytest.mark.parametrize("n", compare.QUANTILE)
def test_intervals_cover_in_95_of_100_cases(n):
    rng = np.random.default_rng(n)
    covered = 0

    for values in rng.normal(7, 2, (4000, n)):
        mean, half = compare.interval(values.tolist())
        covered += abs(mean - 7) <= half

    assert abs(covered / 4000 - 0.95) < 0.015


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param([0.1, 0.2, 0.3], [0.3, 0.4, 0.5], "**20.0 -> 40.0, +20.0 ± 0.0**", id="sure"),
        pytest.param([0.1, 0.2, 0.3], [0.11, 0.22, 0.33], "20.0 -> 22.0, +2.0 ± 2.5", id="unsure"),
        pytest.param([0.1, 0.2, 0.3], [0.3, 0.4, 0.5, 1.0], "**20.0 -> 40.0, +20.0 ± 0.0**",
                     id="seeds of both only"),
        pytest.param([0.1], [0.2], "10.0 -> 20.0, +10.0", id="one seed"),
        pytest.param([], [0.1, 0.3], "20.0", id="CLIP has no such score"),
    ],
)  # fmt: skip
def test_a_cell(before, after, expected):
    one, other = (
        [result_of({"seed": seed}, value) for seed, value in enumerate(values)]
        for values in (before, after)
    )

    assert compare.cell(one, other, "R@1") == expected


def test_a_report_has_tables_and_figures(tmp_path):
    study = compare.Study(tmp_path / "runs.jsonl")
    for name in ("batch", "groups"):
        finish(study, compare.PARTS[name], lambda s: 0.3 + 0.4 * s["cls_weight"] + 0.01 * s["seed"])

    compare.report(study, tmp_path)

    page = (tmp_path / "results.md").read_text()
    assert "| **32.0 -> 72.0, +40.0 ± 0.0** |" in page
    assert "| CLIP, batch 256 |" in page  # a search
    assert "## groups" not in page  # whose runs of an earlier rule are not there
    assert (tmp_path / "study.png").exists()
    assert (tmp_path / "rates.png").exists()


def test_products_need_a_folder(capsys):
    assert "--products" in error_of(capsys, compare.main, "--only", "products")


# ---- the runs that are in the repository


@pytest.fixture(scope="module")
def study():
    return compare.Study(compare.RUNS)


def test_the_page_is_what_the_runs_say(study):
    assert (compare.FOLDER / "results.md").read_text() == compare.page(study)


def test_quick_takes_the_rates_that_the_study_found(study):
    part = compare.PARTS["groups"]
    found = [study.specs(part, changes)[0] for changes in part.rows[0][1:]]

    assert [spec["learning_rate"] for spec in found] == [1.24e-4, 4.95e-4]
    assert compare.QUICK.rows[0][1:] == tuple(
        {k: spec[k] for k in ("cls_weight", "batch_size", "group", "learning_rate")}
        for spec in found
    )


@pytest.mark.parametrize("name", EARLIER_PARTS)
def test_every_row_of_an_earlier_part_was_run(study, name):
    part = compare.PARTS[name]

    assert list(study.rows(part)) == [row.label for row in part.rows]


@pytest.mark.parametrize("name", compare.PARTS)
def test_one_table_says_which_rule_chose_the_rates(name):
    findings = (compare.FOLDER / "findings.md").read_text()
    parts = re.findall(r"^\| [^|]+ \| ([^|]+) \|", findings, re.MULTILINE)[1:]

    assert [name in re.split("; ", rows) for rows in parts].count(True) == 1


def numbers(text):
    return set(re.findall(r"\d+(?:[.,]\d+)*", text))


def read_tables(page):
    """The page -> {(table, row, column): all that a sentence about the cell may quote}."""
    cells = {}
    for section in re.split("^## ", page, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        lines = [line[2:-2].split(" | ") for line in body.splitlines() if line.startswith("| ")]
        if lines:
            heads, _, *rows = lines
            text = body.partition("|")[0]
            for row in rows:
                for head, content in zip(heads, row):
                    column = head.partition(" (")[0]
                    cells[title, row[0], column] = f"{title} {text} {row[0]} {head} {content}"
    return cells


FINDINGS = re.findall(r"^\d+\. (.+)", (compare.FOLDER / "findings.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("finding", FINDINGS, ids=[finding[:40] for finding in FINDINGS])
def test_every_number_of_a_finding_is_in_the_runs(study, finding):
    """A finding ends with a comment of the cells that it quotes: [table | row | column]. A
    difference is bold in the finding if it is in the cell, which means that it is reliable."""
    page = compare.page(study)
    cells = read_tables(page)
    compared = re.findall(r"\| (\**)\d+\.\d -> [^|]+ ± ", page)
    cells["all tables",] = f"{len(compared)} {compared.count('**')} {0.05 * len(compared):.0f} 5"
    sentence = re.sub(r" ?\[[^]]+\]", "", finding)

    quoted = [cells[tuple(place.split(" | "))] for place in re.findall(r"\[([^]]+)\]", finding)]

    assert numbers(sentence) <= numbers(" ".join(quoted))
    for stars, difference in re.findall(r"(\**)([+-]?\d+\.\d ± \d+\.\d)", sentence):
        source = [cell for cell in quoted if difference in cell]
        assert [f"{difference}**" in cell for cell in source] == [stars == "**"]
