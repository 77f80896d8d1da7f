"""The study: what it asks, which runs it plans, its intervals, and one tiny run a method."""

import json
import math
import random
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from material import TOKENIZER

from scripts import scenes
from study import compare, run

ATTRIBUTES = (*run.ATTRIBUTES, "swap")


def test_a_question_changes_one_thing():
    for seed in range(60):
        scene = scenes.make_scene(random.Random(seed), scenes.COMBINATIONS)
        asked = run.questions(scene, seed)
        assert ("swap" in asked) == (len(scene["objects"]) == 2)
        for kind, (true, *others) in asked.items():
            assert len({true, *others}) == 1 + len(others)
            words = [sorted(set(re.findall(r"\w+", t)) - {"a", "an"}) for t in (true, *others)]
            if kind == "swap":  # the same bag of words
                assert words[0] == words[1]
                continue
            assert len(others) == len(run.ATTRIBUTES[kind]) - 1
            for other in words[1:]:
                changed = set(words[0]) ^ set(other)
                assert 1 <= len(changed) <= 2 and changed <= set(run.ATTRIBUTES[kind])


def fake(spec, value):
    scores = {name: {"value": value, "chance": 0.1, "n": 100} for name in METRICS}
    return {"spec": spec, "scores": scores, "seconds": 1.0, "dtype": "float32"}


METRICS = {m for part in compare.PARTS.values() for m in part.metrics} | {"R@10"}
METRICS |= {f"head {kind}" for kind in ATTRIBUTES} | {"words, AP"}


def finish(plan, parts, value_of):
    """Pretend to run what is planned."""
    for part in parts:
        while todo := plan.todo(part):
            for spec in todo:
                plan.add({**fake(spec, value_of(spec)), "device": "x", "torch": "y"})


def test_both_methods_get_the_same_searches_and_the_rest_differs_in_one_thing(tmp_path):
    plan = compare.Study(tmp_path / "runs.jsonl")
    finish(plan, compare.PARTS, lambda spec: -abs(math.log(spec["learning_rate"] / 3e-4 or 1)))
    searches = {}
    for result in plan.results.values():
        spec = result["spec"]
        if spec["search"]:
            assert spec["seed"] == 100 and spec["loss"] == "softmax"
            kind = tuple(spec[k] for k in ("data", "settings", "batch_size", "group", "samples"))
            searches.setdefault(kind, {0.0: [], 1.0: []})[spec["cls_weight"]].append(
                spec["learning_rate"]
            )
    groups = len(compare.GROUPS) - 1  # that of 64 is the whole batch
    settings = len(compare.SETTING_COUNTS) - 1  # that of 256 is the usual one
    photographs = 2
    assert len(searches) == len(compare.BATCH_SIZES) + groups + settings + photographs
    assert all(rates[0.0] == rates[1.0] for rates in searches.values())
    for name, part in compare.PARTS.items():
        for label, *pair in part.rows:
            a, b = (plan.specs(name, changes) for changes in pair)
            assert len(a) == len(b) == part.seeds
            for x, y in zip(a, b):
                differs = {k for k in x if x[k] != y[k]}
                if len(differs) > 1:  # a row of another kind has a rate of its own
                    differs.remove("learning_rate")
                assert x["seed"] == y["seed"]
                free = {"samples", "cls_weight", "batch_size", "group"}
                assert len(differs) == 1 or ("untrained" in label and differs <= free), label


def test_a_search_goes_on_at_its_edge(tmp_path):
    for best, tried in (
        (1e-4, [4.37e-05, 8.75e-05, 0.000175, 0.00035, 0.0007]),
        (3.5e-4, [0.000175, 0.00035, 0.0007]),
        (1.4e-3, [0.000175, 0.00035, 0.0007, 0.0014, 0.0028]),
    ):
        plan = compare.Study(tmp_path / f"{best}.jsonl")
        finish(
            plan, ["length"], lambda spec, best=best: -abs(math.log(spec["learning_rate"] / best))
        )
        specs, found = plan.search({**run.RUN, "loss": "sigmoid"})
        assert [spec["learning_rate"] for spec in specs] == tried
        assert found == min(tried, key=lambda rate: abs(math.log(rate / best)))


def test_of_rates_that_are_as_good_the_lowest_is_taken(tmp_path):
    plan = compare.Study(tmp_path / "runs.jsonl")
    score = {8.75e-05: 0.9, 0.000175: 0.965, 0.00035: 0.97, 0.0007: 0.3}
    finish(plan, ["visual"], lambda spec: score.get(spec["learning_rate"], 0.0))
    specs, found = plan.search({**run.RUN})
    assert found == 0.000175 and [spec["learning_rate"] for spec in specs] == [*score]


def test_a_study_goes_on_where_it_was(tmp_path):
    plan = compare.Study(tmp_path / "runs.jsonl")
    finish(plan, ["length"], lambda _: 0.5)
    again = compare.Study(tmp_path / "runs.jsonl")
    assert again.todo("length") == [] and again.results == plan.results
    # Its runs of three seeds are the first ones of batch 32, which is to have five.
    assert {(s["cls_weight"], s["seed"]) for s in again.todo("visual")} == {
        (0.0, 3), (0.0, 4), (1.0, 3), (1.0, 4)
    }  # fmt: skip


def test_intervals_are_students():
    """By hand: 1, 2, 3 have mean 2 and standard error 1 / sqrt(3)."""
    mean, half = compare.interval([1, 2, 3])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)
    assert compare.interval([7]) == (7, None)
    text = compare.cell({0: 0.1, 1: 0.2, 2: 0.3}, {0: 0.11, 1: 0.22, 2: 0.33, 3: 0.9})
    assert text == "20.0 -> 22.0, +2.0 ± 2.5 (no reliable difference)"
    assert compare.cell({0: 0.1}, {0: 0.2}) == "10.0 -> 20.0, +10.0"
    assert compare.cell({}, {0: 1}) == ""


def test_average_precision_by_hand():
    """Right ones at places 1 and 3 of 4: the mean of 1/1 and 2/3."""
    scores, right = torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([False, True, True, False])
    assert run.average_precision(scores, right).item() == pytest.approx((1 + 2 / 3) / 2)


def test_photographs_are_scored(folders):
    model = run.make_model({**run.RUN, "search": True}, TOKENIZER.vocab_size).eval()
    model.requires_grad_(False)
    red = TOKENIZER(["a red thing", "red"], 8)
    images = torch.randint(256, (24, 3, 72, 72), dtype=torch.uint8)
    table = SimpleNamespace(images=images, tokens=red[None].expand(24, -1, -1))
    scores = run.photograph_scores(model, TOKENIZER, table, folders)
    assert scores["words, AP"]["n"] == 3 and scores["words, AP"]["value"] == 1  # all have them
    assert scores["zero-shot"]["n"] == 12 and scores["probe"]["n"] == 6
    assert scores["probe"]["chance"] == pytest.approx(1 / 3)


def test_groups_contrast_within_themselves():
    whole = run.make_model(run.RUN, 50)
    parted = run.make_model({**run.RUN, "group": 4}, 50)
    images, texts = torch.randn(2, 8, 128).div(12)
    rest = whole.logit_scale, None
    halves = [whole.pair_loss(images[half], texts[half], *rest) for half in (slice(4), slice(4, 8))]
    by_hand = sum(halves) / 2
    everything = slice(None)
    assert torch.allclose(parted.pair_loss(images, texts, *rest, everything), by_hand)
    assert not torch.allclose(whole.pair_loss(images, texts, *rest, everything), by_hand)


def test_halves_share_neither_cloth_nor_shape():
    table = run.Table.__new__(run.Table)
    table.scenes = [scenes.make_scene(random.Random(i), scenes.COMBINATIONS) for i in range(200)]
    table.images = table.tokens = torch.arange(200)
    seen = []
    for second in (0, 1):
        part = [table.scenes[i] for i in table.half(second).images.tolist()]
        assert 30 < len(part) < 70
        seen.append({w for s in part for w in (s["cloth"], *(o["shape"] for o in s["objects"]))})
    assert seen[0].isdisjoint(seen[1]) and seen[0] | seen[1] == {*scenes.CLOTHS, *scenes.SHAPES}


def test_runs_and_report(shallow, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    lbfgs = torch.optim.LBFGS  # two iterations of a probe are enough to see it run
    few = lambda weights, **options: lbfgs(weights, **{**options, "max_iter": 2})  # noqa: E731
    monkeypatch.setattr(torch.optim, "LBFGS", few)
    monkeypatch.setattr(run, "PER_LOOK", 3)
    monkeypatch.setattr(run, "HELD_OUT", 50)
    make_scenes = scenes.make_scenes
    small = lambda out, settings: make_scenes(out, train=200, val=50, settings=settings)  # noqa: E731
    monkeypatch.setattr(scenes, "make_scenes", small)
    run.prepare_scenes(tmp_path, 4)
    plan = compare.Study(tmp_path / "runs.jsonl", seeds=2)
    other = dict(patch_dropout=0.5, idf=False, search=True)
    for changes in (compare.CLIP, compare.SUPERCLIP, other):
        spec = {**run.RUN, **changes, "settings": 4, "samples": 96, "learning_rate": 1e-3}
        result = run.run((spec, tmp_path))
        assert result["spec"] == spec and math.isfinite(result["losses"]["contrastive_loss"])
        assert ("colour_shape" in result["scores"]) == (not spec["search"])
        if spec["cls_weight"] and not spec["search"]:  # a bag of words cannot tell
            assert result["scores"]["head swap"]["value"] == 0.5
        assert ("head swap" in result["scores"]) == (changes == compare.SUPERCLIP)
        json.dumps(result)
    # A rate of 0 keeps what was learnt of the first half, whatever is trained on later.
    spec = {**run.RUN, "settings": 4, "batch_size": 4, "start": 16, "learning_rate": 0.0}
    with mock.patch("study.run.optimise", wraps=run.optimise) as optimise:
        scores = [run.run(({**spec, "samples": n}, tmp_path)) for n in (0, 16)]
    rates = [call.args[2]["learning_rate"] for call in optimise.call_args_list]
    assert rates == [run.START_RATE, 0.0] * 2
    assert scores[0]["scores"] == scores[1]["scores"]
    assert scores[0]["scores"].keys() == {"R@1 old", "R@1 new"}
    finish(plan, compare.PARTS, lambda spec: 0.3 + 0.4 * spec["cls_weight"] + 0.1 * spec["seed"])
    compare.report(plan, tmp_path / "figure.png")
    text = (tmp_path / "results.md").read_text()
    assert "| batch 16 | 2 |" in text
    assert "35.0 -> 75.0, +40.0 ± 0.0" in text and "no reliable difference" in text
    assert (tmp_path / "figure.png").stat().st_size > 10_000
