"""The study: what it asks, which runs it plans, its intervals, and a tiny run of each method."""

import json
import math
import os
import shutil
from collections import Counter

import numpy as np
import torch
from material import COLOURS, png

import data
from eval import read_checkpoint
from scripts import scenes
from study import compare, run


def finish(plan, parts, value_of):
    """Pretend to have made the runs that are planned. value_of: spec -> what they score."""
    metrics = {metric for part in compare.PARTS.values() for metric in part.metrics}
    for part in parts:
        while todo := plan.todo(part):
            for spec in todo:
                score = {"value": value_of(spec), "chance": 0.1, "n": 100}
                result = {"spec": spec, "scores": dict.fromkeys(metrics, score), "seconds": 1.0}
                plan.add({**result, "dtype": "float32", "device": "x", "torch": "y"})


def test_both_methods_get_the_same_searches_and_the_rest_differs_in_one_thing(tmp_path):
    plan, searches = compare.Study(tmp_path / "runs.jsonl"), {0.0: set(), 1.0: set()}
    finish(plan, compare.PARTS, lambda spec: -abs(math.log(spec["learning_rate"] / 3e-4 or 1)))
    for spec in (result["spec"] for result in plan.results.values()):
        if spec["search"]:
            searches[spec["cls_weight"]].add(compare.key({**spec, "cls_weight": None}))
    assert searches[0.0] == searches[1.0] and len(searches[0.0]) > 40
    for name, part in compare.PARTS.items():
        for label, *kinds in part.rows:
            a, b = (plan.specs(name, changes) for changes in kinds)
            assert [x["seed"] for x in a] == [x["seed"] for x in b] == [*range(part.seeds)]
            differs = {k for k in a[0] if a[0][k] != b[0][k]}
            if len(differs) > 1:  # a row of another kind has a rate of its own
                differs.remove("learning_rate")
            if "untrained" in label:
                differs -= {"cls_weight", "batch_size", "group"}  # which change no random weights
            assert len(differs) == 1, label


def test_a_search_goes_on_at_its_edge_and_a_study_where_it_was(tmp_path):
    """Close rates of objects have three seeds. Here, seed 100 prefers one that is not the best."""
    for part, scores, rate in (
        ("visual", {1.75e-4: 0.5, 3.5e-4: 0.6, 7e-4: 0.7, 1.4e-3: 0.8, 2.8e-3: 0.7}, 1.4e-3),
        ("visual", {8.75e-5: 0.9, 1.75e-4: 0.965, 3.5e-4: 0.97, 7e-4: 0.3}, 1.75e-4),  # lower
        ("objects", {6.19e-5: 0.2, 1.24e-4: 0.333, 2.47e-4: 0.34, 4.95e-4: 0.2}, 2.47e-4),
    ):

        def value_of(spec, scores=scores):
            lucky = spec["learning_rate"] == 1.24e-4 and spec["seed"] == 100
            return scores.get(spec["learning_rate"], 0.0) + 0.01 * lucky

        finish(plan := compare.Study(tmp_path / f"{rate}.jsonl"), [part], value_of)
        changes = compare.OBJECTS if part == "objects" else {"captions": "short"}
        specs, found = plan.search({**run.RUN, **changes})
        assert [*dict.fromkeys(spec["learning_rate"] for spec in specs)] == [*scores]
        assert found == rate and len(specs) == len(scores) + 4 * (part == "objects")
    finish(plan := compare.Study(tmp_path / "runs.jsonl"), ["length"], lambda _: 0.5)
    again = compare.Study(tmp_path / "runs.jsonl")
    assert again.todo("length") == [] and again.results == plan.results
    # Its runs of three seeds are the first ones of batch 32, which is to have five.
    missing = {(spec["cls_weight"], spec["seed"]) for spec in again.todo("visual")}
    assert missing == {(weight, seed) for weight in (0.0, 1.0) for seed in (3, 4)}


def test_intervals_are_students():  # 1, 2, 3 have mean 2 and standard error 1 / sqrt(3)
    mean, half = compare.interval([1, 2, 3])
    assert mean == 2 and math.isclose(half, 4.303 / math.sqrt(3), rel_tol=1e-4)
    text = compare.cell({0: 0.1, 1: 0.2, 2: 0.3}, {0: 0.11, 1: 0.22, 2: 0.33, 3: 0.9})
    assert text.startswith("20.0 -> 22.0, +2.0 ± 2.5 (")  # no reliable difference


def test_groups_are_compared_within_themselves():
    whole, parted = (run.make_model({**run.RUN, "group": group}, 50) for group in (None, 4))
    pairs = torch.randn(2, 8, 128) / 12  # image features and text features
    parts = pairs[:, :4], pairs[:, 4:], pairs
    first, second = (whole.compare(*part)["contrastive_loss"] for part in parts[:2])
    assert torch.allclose(parted.compare(*pairs)["contrastive_loss"], (first + second) / 2)


def score(folder, **changes):
    spec = {**run.RUN, "captions": "long", "samples": 64, "learning_rate": 1e-3, **changes}
    scores = run.run((spec, folder, folder / "model.pt"))["scores"]
    assert read_checkpoint(folder / "model.pt")["arguments"] == spec
    return json.loads(json.dumps(scores))


def test_objects(folders, shallow, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(folders, tmp_path / "objects" / split)
    run.prepare_objects(tmp_path, 4, tmp_path / "objects")
    table = run.Table(tmp_path / "objects-4-val.pt")
    for image, tokens, fact in zip(table.images, table.tokens, table.facts):
        colour = torch.tensor(COLOURS[fact["object"].split()[1]])  # of the photograph
        corners = [image[:, y:, x:][:, :32, :32] for x in run.CORNERS for y in run.CORNERS]
        shown = [abs(c.double().mean(dim=(1, 2)) - colour).max() < 20 for c in corners]
        setting, *texts = map(data.Tokenizer(table.vocab).decode, tokens)
        complete = (setting in text and fact["object"] in text for text in texts)
        assert sum(shown) == 1 and setting == fact["setting"] and all(complete)
    scores = score(tmp_path, data="objects", settings=4, batch_size=4)
    assert [scores[f"{kind} object"]["n"] for kind in ("zero-shot", "probe")] == [12, 6]
    sharing = Counter(fact["setting"] for fact in table.facts)
    blind = sum(1 / sharing[fact["setting"]] for fact in table.facts) / len(table.facts)
    assert math.isclose(scores["R@1"]["floor"], blind, rel_tol=1e-4)


def test_products(shallow, tmp_path, monkeypatch):
    twins = "a Shoe", "b shoe", "a Hat", "c Belt", "d Bag", "e Cap"  # file and title
    facts = [{"sha256": twin[0], "captions": [twin[2:]]} for twin in twins]
    assert run.new_products(facts, range(6), {"belt", "e"}) == [0, 4]
    monkeypatch.setattr(run, "VAL", 0.5)
    (tmp_path / "images").mkdir()
    rows = ["image,caption,type,colour,group"]
    for i, colour in enumerate(40 * [*COLOURS]):
        picture, kind = png(COLOURS[colour], np.random.default_rng(i)), f"{'abcd'[i // 40]}-ring"
        (tmp_path / "images" / f"{i}.png").write_bytes(picture)
        rows.append(f"{i}.png,{colour} {kind} {i},{kind}s,{colour},things")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    run.prepare_products(tmp_path, 256, tmp_path)
    scores = score(tmp_path, data="products", **compare.DUAL).keys()
    assert {"zero-shot colour", "patch probe type", "words of type"} <= scores
    right = torch.tensor([0, 1, 1, 0]) == 1  # at ranks 1 and 3
    assert run.average_precision(torch.tensor([1, 4, 2, 3]), right) == (1 / 1 + 2 / 3) / 2


def test_runs_and_report(shallow, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "COMBINATIONS", scenes.HELD_OUT)  # fewer to draw and to probe
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # a process that draws has to import torch
    monkeypatch.setattr(run, "RANKED", 50)
    run.prepare_scenes(tmp_path, 4, train=150, val=50)
    score(tmp_path, settings=4, search=True, **compare.CLIP)
    scores = score(tmp_path, settings=4, group=8, **compare.DUAL)
    assert {"R@1", "held_out", "probe shape", "choose swap"} <= scores.keys()
    plan = compare.Study(tmp_path / "runs.jsonl")
    finish(plan, ["batch"], lambda spec: 0.3 + 0.4 * spec["cls_weight"] + 0.1 * spec["seed"])
    compare.report(plan, tmp_path / "figure.png")
    report = (tmp_path / "results.md").read_text()
    assert (tmp_path / "figure.png").exists()
    assert "| 50.0 -> 90.0, +40.0 ± 0.0 |" in report and "| 0 of 3 | not run |" in report
