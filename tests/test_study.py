"""The study of scripts/small_batch.py: what it asks, which runs it plans, one tiny run a method."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import torch

import data
from scripts import shapes, small_batch


def study_args(folder, **changes):
    args = dict(out_dir=folder, samples=32, seeds=2, batch_sizes=[16, 32], flickr_samples=64)
    return SimpleNamespace(**{**args, **changes})


def test_a_question_changes_one_thing():
    for seed in range(30):
        scene = shapes.make_scene(random.Random(seed))
        asked = small_batch.questions(scene, seed)
        assert ("relation" in asked) == ("swap" in asked) == (len(scene["objects"]) > 1)
        for kind, (true, *others) in asked.items():
            assert len({true, *others}) == 1 + len(others)
            if kind == "swap":  # the same bag of words
                words = [sorted(t.replace("an ", "a ").split()) for t in (true, *others)]
                assert words[0] == words[1]
                continue
            assert len(others) + 1 == (2 if kind == "relation" else len(small_batch.KINDS[kind]))
            if kind not in ("position", "relation"):  # their values are phrases of several words
                for other in others:
                    changed = set(true.split()) ^ set(other.split())
                    values = set(" ".join(small_batch.KINDS[kind]).split())
                    assert {word.strip(":,.") for word in changed} <= values | {"a", "an"}


def test_the_plan_compares_like_with_like(tmp_path):
    args = study_args(tmp_path)
    paths = {}
    for part in small_batch.PARTS:
        for _, specs in small_batch.plan(args, part):
            for spec in specs:
                assert paths.setdefault(small_batch.path_of(spec, args), spec) == spec
    for part in ("main", "captions", "flickr"):
        seen = {s["samples"] for _, specs in small_batch.plan(args, part) for s in specs}
        assert len(seen) == 1, part
    rates = {
        method: [s["learning_rate"] for s in small_batch.search_specs(args, 32, weight)]
        for method, weight in small_batch.METHODS.items()
    }
    assert rates["CLIP"] == rates["SuperCLIP"]


def test_runs_and_report(tmp_path, monkeypatch):
    monkeypatch.setattr(small_batch, "PER_CLASS", 2)
    rng = random.Random(0)
    scenes = [shapes.make_scene(rng) for _ in range(16)]
    texts = [shapes.describe(scene, rng) for scene in scenes]
    words = sorted({w for pair in texts for text in pair for w in data.WORD.findall(text)})
    tokenizer = data.Tokenizer(data.vocabulary_from_words(words))
    images = torch.stack([data.Preprocess(72)(shapes.draw(scene, 72)) for scene in scenes])
    tokens = torch.stack([tokenizer([*pair]) for pair in texts]).int()
    table = {"images": images, "tokens": tokens, "scenes": json.dumps(scenes)}
    for name in ("train", "val"):
        torch.save({**table, "vocab": tokenizer.vocab}, tmp_path / f"shapes-{name}.pt")
    singles = images[:1].expand(64 * small_batch.PER_CLASS, -1, -1, -1)
    torch.save(singles.contiguous(), tmp_path / "singles.pt")

    args = study_args(tmp_path, seeds=1, batch_sizes=[16], figure=tmp_path / "figure.png")
    (tmp_path / "runs").mkdir()
    for _, (spec,) in small_batch.plan(args, "main"):
        path = small_batch.path_of(spec, args)
        small_batch.run((spec, tmp_path, path))
        result = json.loads(path.read_text())
        assert result["samples_seen"] == spec["samples"] and result["commit"]
        # one picture for all 64 classes: exactly chance
        assert abs(result["scores"]["both"]["value"] - 1 / 64) < 1e-6
        if spec["cls_weight"]:  # a bag of words cannot tell
            assert result["scores"]["head swap"]["value"] == 0.5
    small_batch.report(args)
    text = Path(tmp_path / "small_batch.md").read_text()
    assert "*gain*" in text and "swap" in text and args.figure.stat().st_size > 10_000
    assert not small_batch.missing(args, ["main"])
