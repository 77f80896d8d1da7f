"""The study: what it asks, which runs it plans, its intervals, and a tiny run of each method."""

import json
import math
import os
import random
import re
from types import SimpleNamespace

import torch
from material import TOKENIZER

from eval import read_checkpoint
from scripts import scenes
from study import compare, run

METRICS = {metric for part in compare.PARTS.values() for metric in part.metrics}
METRICS |= {f"head {kind}" for kind in (*run.ATTRIBUTES, "swap")} | {"R@10", "words, AP"}


def test_a_question_changes_one_thing():
    for seed in range(60):
        scene = scenes.make_scene(random.Random(seed), scenes.COMBINATIONS)
        asked = run.questions(scene, seed)
        assert ("swap" in asked) == (len(scene["objects"]) == 2)
        for kind, captions in asked.items():
            true, *others = [sorted({*re.findall(r"\w+", c)} - {"a", "an"}) for c in captions]
            assert len({*captions}) == len(captions) == len(run.ATTRIBUTES.get(kind, (1, 2)))
            if kind == "swap":
                assert others == [true]  # the same bag of words
            for changed in ({*true} ^ {*other} for other in others if kind != "swap"):
                assert 1 <= len(changed) <= 2 and changed <= {*run.ATTRIBUTES[kind]}


def finish(plan, parts, value_of):
    """Pretend to have made the runs that are planned. value_of: spec -> what they score."""
    for part in parts:
        while todo := plan.todo(part):
            for spec in todo:
                score = {"value": value_of(spec), "chance": 0.1, "n": 100}
                result = {"spec": spec, "scores": dict.fromkeys(METRICS, score), "seconds": 1.0}
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
    for scores, rate in (
        ({1.75e-4: 0.5, 3.5e-4: 0.6, 7e-4: 0.7, 1.4e-3: 0.8, 2.8e-3: 0.7}, 1.4e-3),
        ({8.75e-5: 0.9, 1.75e-4: 0.965, 3.5e-4: 0.97, 7e-4: 0.3}, 1.75e-4),  # as good, and lower
    ):
        plan = compare.Study(tmp_path / f"{rate}.jsonl")
        finish(plan, ["visual"], lambda spec, scores=scores: scores.get(spec["learning_rate"], 0.0))
        specs, found = plan.search({**run.RUN, "loss": "sigmoid"})
        assert [spec["learning_rate"] for spec in specs] == [*scores] and found == rate
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
    halves = whole.compare(*pairs[:, :4]) + whole.compare(*pairs[:, 4:])
    assert torch.allclose(parted.compare(*pairs), halves / 2)


def test_photographs_are_scored(folders):
    precision = run.average_precision(torch.tensor([1, 4, 2, 3]), torch.tensor([0, 1, 1, 0]) == 1)
    assert math.isclose(precision, (1 / 1 + 2 / 3) / 2)  # the right ones are at ranks 1 and 3
    model = run.make_model(run.RUN, TOKENIZER.vocab_size).eval().requires_grad_(False)
    table = SimpleNamespace(images=torch.randint(256, (24, 3, 72, 72), dtype=torch.uint8))
    table.tokens = TOKENIZER(["a red thing", "red"], 8)[None].expand(24, -1, -1)
    scores = run.photograph_scores(model, TOKENIZER, table, folders)
    assert [scores[k]["n"] for k in ("zero-shot", "probe", "words, AP")] == [12, 6, 3]
    assert scores["words, AP"]["value"] == 1  # because all images have the words


def test_runs_and_report(shallow, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "COMBINATIONS", scenes.HELD_OUT)  # fewer to draw and to probe
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # a process that draws has to import torch
    monkeypatch.setattr(run, "HELD_OUT", 50)
    run.prepare_scenes(tmp_path, 4, train=150, val=50)
    world = {path.name for path in (tmp_path / "world-4").iterdir()}
    assert world == {"train-00000.tar", "val-00000.tar", "vocab.tiktoken", "zeroshot"}
    spec = {**run.RUN, "settings": 4, "samples": 64, "learning_rate": 1e-3}
    others = dict(patch_dropout=0.5, idf=False, captions="short", label_captions="long", group=8)
    for changes in ({**compare.CLIP, "search": True}, others):
        task = {**spec, **changes}, tmp_path, tmp_path / "model.pt"
        result = json.loads(json.dumps(run.run(task)))
        assert read_checkpoint(task[-1])["arguments"] == result["spec"]
        assert result["spec"] == {**spec, **changes} and result["losses"]["contrastive_loss"] > 0
    assert {"R@1", "held_out", "probe shape", "choose swap"} <= result["scores"].keys()
    assert result["scores"]["head swap"]["value"] == 0.5  # a bag of words cannot tell
    # A rate of 0 keeps what was learnt of the first half, which has nothing of the second.
    gently = {**spec, "batch_size": 4, "start": 16, "learning_rate": 0.0}
    kept, before = (run.run(({**gently, "samples": n}, tmp_path))["scores"] for n in (16, 0))
    assert kept == before and kept.keys() == {"R@1 old", "R@1 new"}
    halves = map(run.Table(tmp_path / "scenes-4-train.pt").half, (0, 1))
    old, new = ({o["shape"] for s in half.scenes for o in s["objects"]} for half in halves)
    assert old and new and not old & new
    plan = compare.Study(tmp_path / "runs.jsonl")
    finish(plan, compare.PARTS, lambda spec: 0.3 + 0.4 * spec["cls_weight"] + 0.1 * spec["seed"])
    compare.report(plan, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()
    assert "| 50.0 -> 90.0, +40.0 ± 0.0 |" in (tmp_path / "results.md").read_text()
