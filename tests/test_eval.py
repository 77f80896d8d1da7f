"""Scores against slow and obvious ways to compute them, and chance against its formula."""

import json
import math
import os
import re
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from material import COLOURS, TOKENIZER, coloured, make_model, png, result_of, run, write_shard
from PIL import Image
from tqdm import tqdm
from watch import Watch

import data
import eval as evaluation

NAMES = ("red", "green", "blue")


class Colours:
    """A model that knows three colours, and nothing else."""

    logit_scale = torch.tensor(1.0)

    def encode_image(self, images):
        return F.normalize(images.float().mean(dim=(2, 3)), dim=1)

    def encode_text(self, tokens):
        ids = torch.tensor([TOKENIZER.encode(name)[0] for name in NAMES])
        return F.normalize((tokens[:, :, None] == ids).any(dim=1).float(), dim=1)


# ---- features become scores


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
    assert evaluation.mean_r1(result) == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_the_captions_of_an_image_count_as_one():
    """An image without captions does not count."""
    means = evaluation.mean_by_image(torch.tensor([1.0, 0, 1]), torch.tensor([0, 0, 2]))

    assert means.tolist() == [0.5, 1]


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
    assert evaluation.mean_r1(evaluation.retrieval(nan, nan, torch.arange(20))) == 0


def test_chunks_change_nothing():
    """More scores than fit in one chunk, and no chunk divides them, against the best of all."""
    label, owner = torch.arange(1500), torch.arange(1500).repeat(8)
    images = torch.randn(1500, 4)
    texts = images[owner] + torch.randn(12_000, 4)

    counts, best = evaluation.search(images, label, texts, owner)

    slow = (images @ texts.T).argmax(dim=1)
    assert torch.equal(best, slow)
    assert torch.equal(evaluation.recall(counts, 1), (owner[slow] == label).double())


def test_a_search_never_has_the_scores_of_all_questions_at_once():
    label, owner = torch.arange(1500), torch.arange(1500).repeat(8)

    with Watch(1500 * 12_000) as watch:
        evaluation.search(torch.randn(1500, 4), label, torch.randn(12_000, 4), owner)

    assert watch.made == []


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


@torch.no_grad()
def test_the_feature_of_a_class_is_that_of_open_clip():
    """The mean of its prompts' features, of length 1 again."""
    model = make_model()

    classifier = evaluation.zeroshot_classifier(model, TOKENIZER, NAMES, ["{}", "the thing of {}"])

    templates = [lambda name: name, lambda name: f"the thing of {name}"]
    expected = open_clip.build_zero_shot_classifier(model, TOKENIZER, NAMES, templates)
    torch.testing.assert_close(classifier.T, expected)


def test_each_real_image_counts_once(folders):
    (folders / "red" / "again.png").symlink_to("0.png")
    (folders / "red" / "nowhere.png").symlink_to("missing.png")

    images = evaluation.images_in(folders / "red")

    assert [path.name for path in images] == ["0.png", "1.png", "2.png", "3.png"]


def test_a_probe_of_many_weak_features_needs_a_large_penalty():
    """The class shifts each of 200 noisy features a little."""
    y = torch.arange(400) % 2
    x = torch.randn(400, 200) + 0.15 * (2 * y - 1)[:, None]

    _, penalty = evaluation.probe((x[:200], y[:200]), (x[200:], y[200:]), 2)

    assert penalty >= 0.01


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


# ---- commands


def test_templates_cannot_give_orders_to_the_terminal(folders, checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\x1b[2J {}\n\x9b31m {}\n\u202e {}\n")
    argv = ["--checkpoint", checkpoint, "--images", folders, "--workers", 0]
    path = tmp_path / "result.json"

    _, printed = result_of(
        capsys, evaluation.main, path, "zeroshot", *argv, "--templates", tmp_path / "prompts.txt"
    )

    assert not {"\x1b", "\x9b", "\u202e"} & {*printed}


@pytest.mark.parametrize("command", ["zeroshot", "retrieval", "probe"])
def test_help_begins_with_the_usage_of_the_command(capsys, command):
    assert not run(evaluation.main, command, "--help")

    printed = capsys.readouterr().out
    assert f"{command} [-h] --checkpoint" in printed.splitlines()[0]
    assert "A checkpoint carries" not in printed


def test_scores_begin_a_line_of_their_own(capsys, monkeypatch):
    """While a bar is on the terminal, as in a validation."""
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    equal = torch.ones(4, 2)

    with tqdm(total=3, file=sys.stdout) as bar:
        bar.update()
        evaluation.print_retrieval(evaluation.retrieval(equal, equal, torch.arange(4)))

    printed = capsys.readouterr().out
    assert len(re.findall(r"[\r\n]image to text R@1 ", printed)) == 1


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
    assert evaluation.format_score("patch mean", result["patch mean"]) in printed
    assert result["patch mean"]["value"] == 1 and result["patch mean"]["n"] == 12
    assert result["class token"]["value"] == 1 / 3 < result["untrained class token"]["value"]
