"""The study, study/small_batch.py: what it asks, which runs it plans, one tiny run a method."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import torch

import data
from scripts import shapes
from scripts.vocab import vocabulary_from_words
from study import small_batch, small_batch_run


def study_args(folder, **changes):
    args = dict(out_dir=folder, samples=128, seeds=2, batch_sizes=[16, 32], groups=[2, 4],
                flickr_samples=128, only=small_batch.PARTS, quick=False)  # fmt: skip
    return SimpleNamespace(**{**args, **changes})


def test_a_question_changes_one_thing():
    for seed in range(30):
        scene = shapes.make_scene(random.Random(seed))
        asked = small_batch_run.questions(scene, seed)
        assert ("relation" in asked) == ("swap" in asked) == (len(scene["objects"]) > 1)
        for kind, (true, *others) in asked.items():
            assert len({true, *others}) == 1 + len(others)
            if kind == "swap":  # the same bag of words
                words = [sorted(t.replace("an ", "a ").split()) for t in (true, *others)]
                assert words[0] == words[1]
                continue
            values = small_batch_run.KINDS[kind]
            assert len(others) + 1 == (2 if kind == "relation" else len(values))
            if kind not in ("position", "relation"):  # their values are phrases of several words
                for other in others:
                    changed = set(true.split()) ^ set(other.split())
                    words = {"a", "an", *" ".join(values).split()}
                    assert {word.strip(":,.") for word in changed} <= words


def test_the_plan_compares_like_with_like(tmp_path):
    args = study_args(tmp_path)
    paths = {}
    for part in small_batch.PARTS:
        for _, specs in small_batch.plan(args, part):
            for spec in specs:
                assert paths.setdefault(small_batch.path_of(spec, args), spec) == spec
    for part in small_batch.PARTS:
        rows = dict(small_batch.plan(args, part))
        for name, specs in rows.items():
            assert len({s["samples"] for s in specs}) == 1
            if other := rows.get("Super" + name):  # the other method: nothing but the head differs
                for a, b in zip(specs, other, strict=True):
                    assert {k for k in a if a[k] != b[k]} == {"cls_weight"}
    rates = {}  # batch size -> the ranges of its searches
    for _, specs in small_batch.searches(args, small_batch.PARTS):
        assert all(s["split"] == "search" and s["seed"] == 100 for s in specs)
        rates.setdefault(specs[0]["batch_size"], set()).add(
            tuple(s["learning_rate"] for s in specs)
        )
    assert all(len(ranges) == 1 for ranges in rates.values()), rates


def test_a_search_goes_on_at_its_edge(tmp_path):
    args = study_args(tmp_path)
    (tmp_path / "runs").mkdir()
    spec = small_batch.variants(args, "main")["SuperCLIP, batch 32"]

    def answer(best):  # R@1 falls with the distance from the best rate
        while todo := small_batch.missing(args, [("", small_batch.search_specs(args, spec))]):
            for path, own in todo.items():
                value = -abs(math.log(own["learning_rate"] / best))
                path.write_text(json.dumps({"scores": {"R@1": {"value": value}}}))
        return [s["learning_rate"] for s in small_batch.search_specs(args, spec)]

    assert answer(1.25e-4) == [6.3e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3]
    assert small_batch.rate(args, spec) == 1.25e-4
    for path in (tmp_path / "runs").iterdir():
        path.unlink()
    assert answer(2e-3) == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    # a rate found for one batch size is not taken for another
    assert small_batch.rate(args, {**spec, "loss": "sigmoid", "cls_weight": 0.5}) == 2e-3
    assert small_batch.rate(args, {**spec, "batch_size": 8}) == 1.5e-4


def test_groups_contrast_within_themselves():
    spec = {**small_batch_run.RUN, "seed": 0}
    whole = small_batch_run.make_model(spec, 50)
    parted = small_batch_run.make_model({**spec, "group": 4}, 50)
    images, texts = torch.randn(2, 8, 128).div(12)
    rest = whole.logit_scale, None
    halves = [whole.pair_loss(images[half], texts[half], *rest) for half in (slice(4), slice(4, 8))]
    by_hand = sum(halves) / 2
    everything = slice(None)
    assert torch.allclose(parted.pair_loss(images, texts, *rest, everything), by_hand)
    assert not torch.allclose(whole.pair_loss(images, texts, *rest, everything), by_hand)


def test_runs_and_report(tmp_path, monkeypatch):
    monkeypatch.setattr(small_batch_run, "PER_CLASS", 2)
    rng = random.Random(0)
    scenes = [shapes.make_scene(rng) for _ in range(64)]
    texts = [shapes.describe(scene, rng) for scene in scenes]
    words = sorted({w for pair in texts for text in pair for w in data.WORD.findall(text)})
    tokenizer = data.Tokenizer(vocabulary_from_words(words))
    images = torch.stack([data.load_image(shapes.draw(scene, 72), 72) for scene in scenes])
    tokens = torch.stack([tokenizer([*pair]) for pair in texts]).int()
    table = {"images": images, "tokens": tokens, "scenes": json.dumps(scenes)}
    for name in ("train", "val"):
        torch.save({**table, "vocab": tokenizer.vocab}, tmp_path / f"shapes-{name}.pt")
    singles = images[:1].expand(64 * small_batch_run.PER_CLASS, -1, -1, -1)
    torch.save(singles.contiguous(), tmp_path / "singles.pt")

    args = study_args(tmp_path, seeds=1, batch_sizes=[16], figure=tmp_path / "figure.png")
    (tmp_path / "runs").mkdir()
    rows = small_batch.plan(args, "main") + small_batch.plan(args, "negatives")[:2]
    for _, (spec,) in rows:
        path = small_batch.path_of(spec, args)
        small_batch_run.run((spec, tmp_path, path))
        result = json.loads(path.read_text())
        assert result["samples_seen"] == spec["samples"] and result["commit"]
        # one picture for all 64 classes: exactly chance
        assert abs(result["scores"]["both"]["value"] - 1 / 64) < 1e-6
        if spec["cls_weight"]:  # a bag of words cannot tell
            assert result["scores"]["head swap"]["value"] == 0.5
    small_batch.report(args)
    text = Path(tmp_path / "results.md").read_text()
    assert "*gain*" in text and "swap" in text and args.figure.stat().st_size > 10_000
    assert not small_batch.missing(args, rows)
