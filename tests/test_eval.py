"""Scores against slow and obvious ways to compute them, chance against its formula; checkpoints."""

import json
import math
import os
import pickle
from dataclasses import asdict

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from material import COLOURS, TOKENIZER, coloured, make_model, png, result_of, write_shard
from PIL import Image

import data
import eval as evaluation
from cli import InputError
from data import words_to_tiktoken

NAMES = ("red", "green", "blue")


class Colours:
    """A model that knows three colours, and nothing else."""

    logit_scale = torch.tensor(1.0)

    def encode_image(self, images):
        return F.normalize(images.float().mean(dim=(2, 3)), dim=1)

    def encode_text(self, tokens):
        ids = torch.tensor([TOKENIZER.encode(name)[0] for name in NAMES])
        return F.normalize((tokens[:, :, None] == ids).any(dim=1).float(), dim=1)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_whose_parts_do_not_fit_each_other_is_refused(tmp_path):
    path, model, mark = tmp_path / "model.pt", make_model(), tmp_path / "mark"
    weights, config = model.state_dict(), asdict(model.config)
    proj, counts = weights["visual.proj"], weights["token_counts"]
    # What the message names, and what is wrong
    wrong = [("visual.proj", x) for x in (proj.char(), proj.cfloat(), proj[1:], proj * math.nan, 1)]
    wrong += [("token_counts", counts.float()), ("extra", proj)]
    cases = [(name, {"model": weights | {name: tensor}}) for name, tensor in wrong]
    for name in ("visual.proj", "num_captions", "head.linear.bias"):
        cases.append((name, {"model": {k: v for k, v in weights.items() if k != name}}))
    cases.append(("token_counts", {"config": config | {"cls_weight": 0.0}}))  # without a head
    for changes in ({"patch_size": 0}, {"colour": 3}, {"vision_width": "64"}, {"text_heads": 7}):
        cases.append(("version", {"config": config | changes}))
    cases += [("version", x) for x in ({"vocab": 3}, {"model": [1]}, {"config": None})]
    rank_twice = TOKENIZER.vocab.replace(" 300\n", " 301\n")
    vocabs = words_to_tiktoken(["red"]), rank_twice, "no vocabulary"
    cases += [("tokens", {"vocab": vocab}) for vocab in vocabs]
    cases += [("refused", {"optimizer": Evil(mark)})]
    for named, changes in cases:
        torch.save({"model": weights, "config": config, "vocab": TOKENIZER.vocab, **changes}, path)
        with pytest.raises(InputError) as error:
            evaluation.read_checkpoint(path)
        message = str(error.value)
        assert str(path) in message and named in message and "\n" not in message, message
    path.write_bytes(pickle.dumps(Evil(mark), protocol=2))  # and not by torch
    with pytest.raises(InputError, match="refused"):
        evaluation.read_checkpoint(path)
    assert not mark.exists()


def test_the_wilson_interval_is_that_of_the_tables():
    for hits, n, interval in ((8, 10, [0.4902, 0.9433]), (0, 10, [0, 0.2775])):
        s = evaluation.score(torch.tensor([1.0] * hits + [0.0] * (n - hits)), 0.5)
        assert s["interval"] == pytest.approx(interval, abs=1e-4)
        assert (s["value"], s["n"], s["chance"]) == (hits / n, n, 0.5)


def values(result, way, *ks):
    return [result[way][f"R@{k}"]["value"] for k in ks]


def test_retrieval_by_hand():
    """Three images with two captions each. Of the first, captions 0 and 1 are 1st and 6th; of the
    second, 2 and 3 are 3rd and 6th; of the third, 4 is 6th, and 5 ties with a wrong one, so that it
    is 3rd or 4th."""
    scores = [[9, 1, 5, 4, 3, 2], [8, 7, 6, 1, 5, 2], [5, 6, 4, 2, 1, 4]]
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    result = evaluation.retrieval(torch.tensor(scores).float(), torch.eye(6), owner, (1, 2, 3, 4))
    assert values(result, "image_to_text", 1, 2, 3, 4) == pytest.approx([1 / 3, 1 / 3, 5 / 6, 1])
    # Captions 0..5 find their image at rank 1, 3, 1, 3, 3, 1 (by column).
    assert values(result, "text_to_image", 1, 2, 3) == pytest.approx([1 / 2, 1 / 2, 1])
    # The captions of an image stand or fall together, so that an interval counts images.
    assert {part["R@1"]["n"] for part in result.values()} == {3}
    # Wilson's for 1.5 hits of 3. Six captions would give 0.19 to 0.81.
    assert result["text_to_image"]["R@1"]["interval"] == pytest.approx([0.125, 0.875], abs=1e-3)
    mean_r1 = (1 / 3 + 1 / 2) / 2, (0.792 + 0.875) / 2  # and the upper end of its interval
    assert evaluation.mean_r1(result) == pytest.approx(mean_r1, abs=1e-3)


def test_equal_features_score_exactly_chance_and_features_of_nan_nothing():
    """Also with five captions an image, or unequal numbers of them."""
    for numbers in ([5, 5, 5, 5], [3, 1, 2, 5]):
        N, M = len(numbers), sum(numbers)
        owner = torch.arange(N).repeat_interleave(torch.tensor(numbers))
        equal = torch.full((M, 7), 0.3) + 1e-8 * torch.randn(M, 7)  # up to the last bits
        result = evaluation.retrieval(equal[:N], equal, owner, range(1, 6))
        for k in range(1, 6):
            formula = np.mean([1 - math.comb(M - n, k) / math.comb(M, k) for n in numbers])
            for way, chance in (("image_to_text", formula), ("text_to_image", min(1, k / N))):
                s = result[way][f"R@{k}"]
                assert s["value"] == s["chance"] == pytest.approx(chance)
    nan = torch.full((20, 4), math.nan)
    assert evaluation.mean_r1(evaluation.retrieval(nan, nan, torch.arange(20)))[0] == 0


def test_chunks_change_nothing():
    """More scores than fit in one chunk, and no chunk divides them, against the best of all."""
    label, owner = torch.arange(1500), torch.arange(1500).repeat(8)
    images = torch.randn(1500, 4)
    texts = images[owner] + torch.randn(12_000, 4)
    counts = evaluation.search_counts(images, label, texts, owner)
    found = owner[(images @ texts.T).argmax(dim=1)] == label
    assert torch.equal(evaluation.recall(counts, 1), found.double())


def test_shards_become_features_and_equal_captions_tie(tmp_path, capsys):
    """All captions of all sources count, and an image that cannot be read shifts nothing. Colours
    are perfect features, but each caption is that of two images: half of the answers are right."""
    samples = []
    for i, name in enumerate([*NAMES, "grey", *NAMES]):
        image = png(COLOURS[name], np.random.default_rng(i)) if name != "grey" else b"no image"
        texts = json.dumps({"captions": [name, f"a {name} thing"]}).encode()
        samples.append({"png": image, "txt": name.encode(), "json": texts})
    shard = write_shard(tmp_path / "x.tar", samples)
    model = make_model().requires_grad_(False)
    pairs = data.Pairs([shard], TOKENIZER, 16, ["json.captions", "txt", "json.captions"])
    images, texts, owner = evaluation.encode_shards(model, pairs, batch_size=2)
    assert images.shape == (6, 16) and owner.tolist() == [i for i in range(6) for _ in range(3)]
    slow = model.encode_text(TOKENIZER(["blue", "a blue thing", "blue"]))
    torch.testing.assert_close(texts[-3:], slow)
    assert f"skipped {shard}: 0003: " in capsys.readouterr().out
    pairs = data.Pairs([shard], TOKENIZER, 16)
    result = evaluation.retrieval(*evaluation.encode_shards(Colours(), pairs, batch_size=4))
    for way in ("image_to_text", "text_to_image"):
        assert values(result, way, 1, 5) == [0.5, 1]
    assert "3 of 6 captions" in capsys.readouterr().out


@torch.no_grad()
def test_zeroshot_with_published_prompts_is_that_of_open_clip(folders):
    """And what a probe learns from: class token and mean of the patch tokens."""
    model, names = make_model(), ["red", "green", "blue", "grey square", "ring", "unheard of"]
    prompts, dataset = open_clip.OPENAI_IMAGENET_TEMPLATES, evaluation.ClassFolders(folders, 16)
    classifier = open_clip.build_zero_shot_classifier(model, TOKENIZER, names, prompts)  # (E, C)
    images, labels = torch.stack([image for image, _ in dataset]), [c for _, c in dataset]
    labels = torch.tensor(labels)
    right = (model.encode_image(images) @ classifier).topk(5).indices == labels[:, None]
    prompts = evaluation.read_list("openai")
    result = evaluation.zeroshot(model, TOKENIZER, dataset, names, prompts, batch_size=5)
    for k in (1, 5):
        slow = right[:, :k].any(dim=1).double().mean().item()
        assert result[f"top{k}"]["value"] == pytest.approx(slow)
        assert result[f"top{k}"]["chance"] == pytest.approx(k / 6)
    features, y = evaluation.frozen_features(model, dataset, batch_size=5)
    tokens = model.visual(images)
    torch.testing.assert_close(features[:, :64], tokens[:, 0])
    torch.testing.assert_close(features[:, 64:], tokens[:, 1:].mean(dim=1))
    assert torch.equal(y, labels)


def test_zeroshot_by_hand(folders, capsys):
    """Classes of the same name stay apart: ImageNet has two cranes. Hidden folders are no classes,
    and what is no image is named."""
    (folders / "red" / "0.png").rename(folders / "blue" / "9.PNG")  # a red one among the blue
    (folders / "green" / "0.png").write_bytes(b"no image")
    for name in (".ipynb_checkpoints", "dark_red"):
        (folders / name).mkdir()
    os.mkfifo(folders / "red" / "pipe.png")
    for name in ("a", "b"):  # links that run in circles
        (folders / "red" / name).symlink_to("..")
    Image.open(folders / "red" / "1.png").save(folders / "dark_red" / "0.gif")
    dataset = evaluation.ClassFolders(folders, 16)
    assert evaluation.class_names(dataset) == ["blue", "dark red", "green", "red"]
    result = evaluation.zeroshot(Colours(), TOKENIZER, dataset, ["blue", "red", "green", "red"])
    per_class = [(part["name"], round(part["value"], 6), part["n"]) for part in result["per_class"]]
    assert per_class == [("blue", 0.8, 5), ("red", 0.5, 1), ("green", 1, 3), ("red", 0.5, 3)]
    assert [part["mistaken_for"] for part in result["per_class"]][::2] == ["red", None]
    assert result["top1"]["value"] == pytest.approx((4 + 0.5 + 3 + 1.5) / 12)
    assert f"skipped {folders / 'green' / '0.png'}" in capsys.readouterr().out


def test_probe_finds_what_is_there_and_nothing_else():
    """A fit is a minimum, where the gradient of its loss is 0: (p - y) x / N + 2 penalty W."""
    y, x = torch.randint(0, 3, (900,)), torch.randn(900, 10)
    layer = evaluation.fit_linear(x, y, 3, penalty=0.01)
    error = layer(x).softmax(dim=1) - F.one_hot(y, 3)
    gradient = error.T @ x / 900 + 2 * 0.01 * layer.weight
    assert gradient.abs().max() < 1e-4 and error.mean(dim=0).abs().max() < 1e-4
    for features, found in ((x + 8 * F.one_hot(y, 10), True), (x, False)):
        s, _ = evaluation.probe((features[:600], y[:600]), (features[600:], y[600:]), 3)
        assert s["n"] == 300 and s["chance"] == pytest.approx(1 / 3)
        assert s["value"] > 0.99 if found else s["interval"][0] < 1 / 3 < s["interval"][1]
    # An image of each class: the last fit has seen the one that chose the penalty.
    alone = torch.eye(5), torch.arange(5)
    assert evaluation.probe(alone, alone, 5)[0]["value"] == 1
    # Scales do not matter, but the penalty does: with 1, all are of the class that most are of.
    y = (torch.arange(400) % 5 == 0).long()
    x = torch.randn(400, 20) + 8 * y[:, None] * (torch.arange(20) == 0)
    for z in (x, x * 10 ** torch.linspace(-3, 3, 20) + 5):
        assert evaluation.probe((z[:200], y[:200]), (z[200:], y[200:]), 2)[0]["value"] == 1


@torch.no_grad()
def test_commands_print_every_score_that_they_write(folders, tmp_path, capsys):
    """Of a model whose class token sees no patch, so that a probe of it can only guess."""
    model = make_model()
    model.visual.transformer.resblocks[0].attn.out_proj.weight.zero_()
    checkpoint = tmp_path / "blind.pt"
    evaluation.write_checkpoint(checkpoint, model, TOKENIZER.vocab)
    shard, names = tmp_path / "pairs.tar", tmp_path / "names.txt"
    names.write_text("blue thing\ngreen thing\nred thing\n")
    (tmp_path / "prompts.txt").write_text("{}\na {} with {braces}\nein Bild für {}\n", "latin-1")
    coloured(shard, *12 * ["a thing"])
    argv, path = ["--checkpoint", checkpoint, "--workers", 0], tmp_path / "result.json"
    for command, more, n_scores in (
        ("zeroshot", ["--images", folders, "--classes", names], 4),
        ("zeroshot", ["--images", folders, "--templates", tmp_path / "prompts.txt"], 4),
        ("retrieval", ["--data", shard, "--batch_size", 5], 6),
        ("probe", ["--train", folders, "--test", folders], 4),
    ):
        result, printed = result_of(capsys, evaluation.main, path, command, *argv, *more)
        assert path.read_text().count('"interval"') == printed.count("interval") == n_scores
    # Colours are easy, and these are the images of its training.
    assert evaluation.line("patch mean", result["patch mean"]) in printed
    assert result["patch mean"]["value"] == 1 and result["patch mean"]["n"] == 12
    assert result["class token"]["value"] == 1 / 3 < result["untrained class token"]["value"]
