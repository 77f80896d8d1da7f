"""The study: its steps are train.py's, its searches are fair, its intervals are right, and its page
says what the runs say. Tiny runs of each kind of data."""

import json
import math
import multiprocessing
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from material import COLOURS, TOKENIZER, Seer, error_of, png

import data
import train
from eval import read_checkpoint
from scripts import pack
from study import compare, run

TINY_RUN = {**run.RUN, "captions": "long", "samples": 64, "learning_rate": 1e-3}
METRICS = {metric for part in compare.PARTS.values() for metric in part.metrics}
EVERY_ROW = [(name, row) for name, part in compare.PARTS.items() for row in part.rows]
EARLIER_PARTS = [name for name, p in compare.PARTS.items() if p.rule == compare.EARLIER]


# ---- a run


def test_the_studys_steps_are_train_pys(shallow, few_looks, tmp_path):
    """20 steps on the same scenes, with one thread and without crops: weights and losses are equal
    to the bit."""
    run.prepare_scenes(tmp_path, 256, train=100, val=10)
    table = run.Table(tmp_path / "scenes-256-train.pt")
    tokenizer = data.Tokenizer(table.vocab)
    spec = {**run.RUN, "batch_size": 4, "samples": 80, "learning_rate": 3.5e-4, "seed": 5}
    command = (
        f"--train_data {tmp_path}/world-256/train-*.tar --val_data none --out_dir {tmp_path}/out "
        "--captions json.short json.long --model tiny --batch_size 4 --learning_rate 3.5e-4 "
        "--weight_decay 0.1 --crop_area 1 --seed 5 --steps 20 --workers 0 --log_every 1"
    )

    model = run.make_model(spec, tokenizer.vocab_size)
    losses, dtype = run.optimise(model, tokenizer, table, spec)
    train.main([*command.split(), "--dtype", dtype])

    weights = read_checkpoint(tmp_path / "out" / "last.pt")["model"]
    rows = [json.loads(line) for line in open(tmp_path / "out" / "log.jsonl")]
    last = [row for row in rows if row.get("step") == 20 and "loss" in row][-1]
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert losses == {name: last[name] for name in losses}


def test_groups_are_compared_within_themselves():
    whole = run.make_model({**run.RUN, "group": None}, 50)
    parted = run.make_model({**run.RUN, "group": 4}, 50)
    images, texts = torch.randn(2, 8, 128) / 12

    loss = parted.compare(images, texts)["contrastive_loss"]

    first = whole.compare(images[:4], texts[:4])["contrastive_loss"]
    second = whole.compare(images[4:], texts[4:])["contrastive_loss"]
    assert torch.allclose(loss, (first + second) / 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            dict(search="mean", cls_weight=0.0), {"R@1", "R@5", "R@10", "colour_shape"}, id="search"
        ),
        pytest.param(
            dict(group=8, captions="short", label_captions="long"),
            {"R@1", "colour_shape", "held_out", "probe shape", "choose swap"},
            id="groups with dual captions",
        ),
    ],
)
def test_a_run_on_scenes_is_scored_and_kept(
    shallow, few_looks, tmp_path, monkeypatch, changes, expected
):
    monkeypatch.setattr(run, "RANKED", 50)
    run.prepare_scenes(tmp_path, 16, train=100, val=50)
    spec = {**TINY_RUN, "settings": 16, **changes}

    result = run.run((spec, tmp_path, tmp_path / "model.pt"))

    assert expected <= result["scores"].keys()
    assert read_checkpoint(tmp_path / "model.pt")["arguments"] == spec
    assert json.loads(json.dumps(result)) == result


@pytest.fixture
def objects(folders, tmp_path):
    """A folder of train/CLASS/ and test/CLASS/, as --objects takes it."""
    for split in ("train", "test"):
        shutil.copytree(folders, tmp_path / "objects" / split)
    return tmp_path / "objects"


def test_an_object_lies_in_a_corner_and_its_captions_name_it(objects, tmp_path):
    run.prepare_objects(tmp_path, 4, objects)

    table = run.Table(tmp_path / "objects-4-val.pt")
    tokenizer = data.Tokenizer(table.vocab)
    for image, tokens, fact in zip(table.images, table.tokens, table.facts):
        colour = torch.tensor(COLOURS[fact["object"].split()[1]])  # of the photograph
        corners = {(x, y): image[:, y:, x:][:, :32, :32] for x in (3, 37) for y in (3, 37)}
        shown = [
            [x / 72, y / 72, (x + 32) / 72, (y + 32) / 72]
            for (x, y), part in corners.items()
            if abs(part.double().mean(dim=(1, 2)) - colour).max() < 20
        ]
        setting, *texts = [tokenizer.decode(ids) for ids in tokens]
        assert shown == [fact["box"]]
        assert setting == fact["setting"]
        assert all(setting in text and fact["object"] in text for text in texts)


def test_a_run_on_objects_is_scored(shallow, objects, tmp_path):
    run.prepare_objects(tmp_path, 4, objects)
    spec = {**TINY_RUN, "data": "objects", "settings": 4, "batch_size": 4}

    scores = run.run((spec, tmp_path))["scores"]

    facts = run.Table(tmp_path / "objects-4-val.pt").facts
    sharing = Counter(fact["setting"] for fact in facts)
    blind = sum(1 / sharing[fact["setting"]] for fact in facts) / len(facts)
    assert math.isclose(scores["R@1"]["floor"], blind, rel_tol=1e-4)
    assert scores["zero-shot object"]["n"] == 12
    assert scores["probe object"]["n"] == 6
    assert scores["place, window 3 x 3"]["n"] == 12


@pytest.mark.parametrize(
    ("loudness", "value"), [(1, 1.0), (-1, 0.0)], ids=["looks at it", "looks away"]
)
def test_the_place_of_an_object_is_where_its_photograph_lies(loudness, value):
    """Four of 5 x 5 windows, or of 4 x 4, have their centre on a red photograph in a corner."""
    images = torch.zeros(4, 3, 72, 72, dtype=torch.uint8)
    facts = []
    for image, (x, y) in zip(images, ((3, 3), (37, 3), (3, 37), (37, 37))):
        image[0, y : y + 32, x : x + 32] = 255
        box = [x / 72, y / 72, (x + 32) / 72, (y + 32) / 72]
        facts.append({"object": "a red", "box": box})
    table = SimpleNamespace(images=images, facts=facts)

    scores = run.place_scores(Seer(loudness), TOKENIZER, table)

    small, large = scores["place, window 2 x 2"], scores["place, window 3 x 3"]
    assert (small["value"], small["chance"], small["n"]) == (value, 4 / 25, 4)
    assert (large["value"], large["chance"], large["n"]) == (value, 4 / 16, 4)


def test_a_new_product_shares_neither_file_nor_title_with_one_before_it():
    products = ("a Shoe", "b shoe", "a Hat", "c Belt", "d Bag", "e Cap")  # file and title
    facts = [{"sha256": product[0], "captions": [product[2:]]} for product in products]

    assert run.new_products(facts, range(6), {"belt", "e"}) == [0, 4]


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        pytest.param(False, {"zero-shot colour", "patch probe type", "words of type"}, id="run"),
        pytest.param("mean", {"R@1", "zero-shot type"}, id="search"),
    ],
)
def test_a_run_on_products_is_scored(shallow, tmp_path, monkeypatch, search, expected):
    monkeypatch.setattr(pack, "measure_speed", lambda device, dtype: 1e11)  # takes seconds
    monkeypatch.setattr(run, "VAL", 0.5)
    monkeypatch.setattr(run, "RANKED", 10)
    (tmp_path / "images").mkdir()
    rows = ["image,caption,type,colour,group"]
    for i, colour in enumerate(20 * [*COLOURS]):
        kind = f"{'ab'[i // 40]}-ring"
        picture = png(COLOURS[colour], np.random.default_rng(i))
        (tmp_path / "images" / f"{i}.png").write_bytes(picture)
        rows.append(f"{i}.png,{colour} {kind} {i},{kind}s,{colour},things")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    run.prepare_products(tmp_path, 256, tmp_path)
    spec = {**TINY_RUN, "data": "products", "batch_size": 8, **compare.DUAL, "search": search}

    scores = run.run((spec, tmp_path))["scores"]

    assert expected <= scores.keys()


def test_average_precision_by_hand():
    scores = torch.tensor([1, 4, 2, 3])
    right = torch.tensor([False, True, True, False])  # at ranks 1 and 3

    assert run.average_precision(scores, right) == (1 / 1 + 2 / 3) / 2


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


def test_work_makes_two_runs_of_64_samples(server, objects, tmp_path, monkeypatch):
    """In processes of its own, from data that it prepares."""
    context = multiprocessing.get_context("forkserver")  # a spawned one would have to import torch
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda _: context)
    study = compare.Study(tmp_path / "runs.jsonl")
    tiny = dict(data="objects", settings=4, batch_size=4, samples=64, learning_rate=1e-3)
    part = compare.Part("", compare.BEST_MEAN, 1, ("R@1",), [compare.both("tiny", **tiny)])

    compare.work(study, {"tiny": part}, {"objects": {"source": objects}}, jobs=1)

    results = [json.loads(line) for line in open(tmp_path / "runs.jsonl")]
    assert sorted(result["spec"]["cls_weight"] for result in results) == [0.0, 1.0]
    assert all("R@1" in r["scores"] and r["commit"] and r["date"] for r in results)
    assert study.todo(part) == []


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
