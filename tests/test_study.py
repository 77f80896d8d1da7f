"""The study, scripts/small_batch.py: what it asks, which runs it plans, one tiny run a method."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import torch

import data
from scripts import compare_log, shapes, small_batch, small_batch_run


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
    by_hand = (whole.pair_loss(images[:4], texts[:4]) + whole.pair_loss(images[4:], texts[4:])) / 2
    assert torch.allclose(parted.pair_loss(images, texts), by_hand)
    assert not torch.allclose(whole.pair_loss(images, texts), by_hand)


def test_runs_and_report(tmp_path, monkeypatch):
    monkeypatch.setattr(small_batch_run, "PER_CLASS", 2)
    rng = random.Random(0)
    scenes = [shapes.make_scene(rng) for _ in range(64)]
    texts = [shapes.describe(scene, rng) for scene in scenes]
    words = sorted({w for pair in texts for text in pair for w in data.WORD.findall(text)})
    tokenizer = data.Tokenizer(data.vocabulary_from_words(words))
    images = torch.stack([data.Preprocess(72)(shapes.draw(scene, 72)) for scene in scenes])
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
    text = Path(tmp_path / "small_batch.md").read_text()
    assert "*gain*" in text and "swap" in text and args.figure.stat().st_size > 10_000
    assert not small_batch.missing(args, rows)


def test_logs_are_compared_at_equal_samples_seen(tmp_path, capsys):
    """A log goes on with another batch size: a stretch is a stretch of samples, not of steps."""
    for name, batches in (("a", [16] * 10), ("b", [16] * 5 + [80])):
        rows = [{"header": {"batch_size": 16}}]
        seen = 0
        for step, batch_size in enumerate(batches, start=1):
            seen += batch_size
            losses = {"contrastive_loss": seen / 100, "classification_loss": 1.0}
            rows.append({"step": step, "samples": seen, **losses})
        rows.append({"step": step, "samples": seen, "mean_r1": 0.5})
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    compare_log.main([str(tmp_path / "b"), "--reference", str(tmp_path / "a")])
    lines = capsys.readouterr().out.splitlines()
    for i in range(10):
        own = "-" if 5 <= i < 9 else f"{16 * (i + 1) / 100:.3f}"
        expected = [f"{16 * (i + 1)}", own, f"{16 * (i + 1) / 100:.3f}"]
        assert lines[2 + i].split()[:3] == expected
    assert lines[12].endswith("mean R@1 50.0 % after 160 samples")
