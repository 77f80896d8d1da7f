"""Scores against slow and obvious ways to compute them, chance against its formula; commands."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from material import (
    COLOURS,
    TOKENIZER,
    error_of,
    make_model,
    png,
    result_of,
    run,
    write_shard,
)
from PIL import Image

import data
import eval as evaluation
from scripts.convert import open_clip_config, open_clip_state

NAMES = ("red", "green", "blue")


class Colours:
    """A model that knows three colours, and nothing else."""

    logit_scale = torch.tensor(1.0)

    def encode_image(self, images):
        return F.normalize(images.float().mean(dim=(2, 3)), dim=1)

    def encode_text(self, tokens):
        ids = torch.tensor([TOKENIZER.encode(name)[0] for name in NAMES])
        return F.normalize((tokens[:, :, None] == ids).any(dim=1).float(), dim=1)


# ---- checkpoints


def test_a_loop_over_photographs_keeps_no_graph(checkpoint):
    model, tokenizer, preprocess = evaluation.load(checkpoint)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    image, tokens = preprocess(photo)[None], tokenizer(["a red ring"])
    features = model.encode_image(image), model.encode_text(tokens)
    assert not any(feature.requires_grad for feature in features)
    original = make_model()
    expected = original.encode_image(image), original.encode_text(tokens)
    torch.testing.assert_close(features, tuple(feature.detach() for feature in expected))


# ---- scores


@pytest.mark.parametrize(
    "hits, n, low, high", [(8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (300, 1000, 0.2724, 0.3291)]
)
def test_the_wilson_interval_is_that_of_the_tables(hits, n, low, high):
    s = evaluation.score(torch.tensor([1.0] * hits + [0.0] * (n - hits)), 0.5)
    assert s["interval"] == pytest.approx([low, high], abs=1e-4) and s["value"] == hits / n
    assert s["n"] == n and s["chance"] == 0.5


def values(result, way, *ks):
    return [result[way][f"R@{k}"]["value"] for k in ks]


def test_retrieval_by_hand():
    """Three images with two captions each; the rows are the images' scores of the six captions."""
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.5, 0.4, 0.3, 0.2],  # its captions 0 and 1 are 1st and 6th
            [0.8, 0.7, 0.6, 0.1, 0.5, 0.2],  # 2 and 3 are 3rd and 6th
            [0.5, 0.6, 0.4, 0.2, 0.1, 0.3],  # 4 and 5 are 6th and 4th
        ]
    )
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    result = evaluation.retrieval(scores, torch.eye(6), owner, ks=(1, 2, 3, 4))
    assert values(result, "image_to_text", 1, 2, 3, 4) == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1])
    assert result["image_to_text"]["median_rank"] == 3
    # captions 0..5 find their image at rank 1, 3, 1, 3, 3, 1 (by column)
    assert values(result, "text_to_image", 1, 2, 3) == pytest.approx([1 / 2, 1 / 2, 1])
    chance = [result["image_to_text"][f"R@{k}"]["chance"] for k in (1, 2)]
    assert chance == pytest.approx([2 / 6, 1 - 4 * 3 / (6 * 5)])
    assert result["text_to_image"]["R@2"]["chance"] == pytest.approx(2 / 3)
    assert evaluation.mean_r1(result) == pytest.approx((1 / 3 + 1 / 2) / 2)


def first_right(scores, right):
    """Ranks of the best right answer over all orders in which equal scores may come."""
    for order in itertools.permutations(range(len(scores))):
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], order[i]))
        yield next(place for place, i in enumerate(ranked, 1) if right[i])


@pytest.mark.parametrize("seed", range(4))
def test_ties_count_as_all_their_orders_would_on_average(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (3, 5), generator=generator).float()
    owner = torch.cat([torch.arange(3), torch.randint(0, 3, (2,), generator=generator)])
    result = evaluation.retrieval(scores, torch.eye(5), owner, ks=(1, 2, 3))
    for way, table, right in (
        ("image_to_text", scores, torch.arange(3)[:, None] == owner),
        ("text_to_image", scores.T, owner[:, None] == torch.arange(3)),
    ):
        ranks = [np.array([*first_right(*q)]) for q in zip(table.tolist(), right)]
        slow = [np.mean([(r <= k).mean() for r in ranks]) for k in (1, 2, 3)]
        assert values(result, way, 1, 2, 3) == pytest.approx(slow)
        assert result[way]["median_rank"] == pytest.approx(np.median([r.mean() for r in ranks]))


def test_a_constant_model_scores_chance_and_chance_is_its_formula():
    owner = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 3])  # 11 captions of 4 images
    constant = F.normalize(torch.ones(1, 7), dim=1)
    result = evaluation.retrieval(constant.expand(4, 7), constant.expand(11, 7), owner, range(1, 6))
    for k in range(1, 6):
        s = result["image_to_text"][f"R@{k}"]
        formula = np.mean([1 - math.comb(11 - n, k) / math.comb(11, k) for n in (3, 1, 2, 5)])
        assert s["value"] == pytest.approx(formula) and s["chance"] == pytest.approx(formula)
        s = result["text_to_image"][f"R@{k}"]
        assert s["value"] == s["chance"] == pytest.approx(min(1, k / 4))


def test_perfect_features_score_one_hundred_percent():
    features = F.normalize(torch.randn(12, 16), dim=1)
    owner = torch.arange(12).repeat_interleave(2)
    result = evaluation.retrieval(features, features[owner], owner)
    assert values(result, "image_to_text", 1) == values(result, "text_to_image", 1) == [1]
    assert result["image_to_text"]["median_rank"] == result["text_to_image"]["median_rank"] == 1


def test_a_model_of_nan_scores_nothing():
    nan = torch.full((20, 4), math.nan)
    result = evaluation.retrieval(nan, nan, torch.arange(20))
    assert values(result, "image_to_text", 1, 5) == values(result, "text_to_image", 1, 5) == [0, 0]


def test_chunks_change_nothing():
    """More scores than fit in one chunk, and no chunk divides them, against one sort of all."""
    N, M = 2100, 8400
    images, owner = torch.randn(N, 8), torch.arange(N).repeat(4)
    texts = images[owner] + torch.randn(M, 8)
    result = evaluation.retrieval(images, texts, owner, ks=(1, 10))
    scores = images @ texts.T
    found = owner[scores.topk(10).indices] == torch.arange(N)[:, None]
    slow = [found[:, :k].any(dim=1).double().mean().item() for k in (1, 10)]
    assert values(result, "image_to_text", 1, 10) == pytest.approx(slow)
    found = scores.T.topk(10).indices == owner[:, None]
    slow = [found[:, :k].any(dim=1).double().mean().item() for k in (1, 10)]
    assert values(result, "text_to_image", 1, 10) == pytest.approx(slow)


# ---- reading what is evaluated


def test_one_tensor_a_batch_leaves_a_worker():
    """However many images: each holds a file open on its way, and a system has only so many."""
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    images, labels, reasons = evaluation.collate([(image, 4), ("a.jpg: bad", None), (image, 5)])
    assert images.shape == (2, 3, 8, 8) and labels == [4, 5] and reasons == ["a.jpg: bad"]
    assert evaluation.collate([("a.jpg: bad", None)]) == (None, [], ["a.jpg: bad"])


def test_encoded_shards_know_their_owner(tmp_path, capsys):
    """All captions of all sources count, and an image that cannot be read shifts nothing."""
    samples = []
    for i, n in enumerate((0, 2, 1, 1)):
        texts = {"captions": [f"a {name} thing" for name in NAMES[: n + 1]]}
        image = png((60 * i,) * 3, np.random.default_rng(i)) if i != 2 else b"no image"
        samples.append({"png": image, "txt": b"ring", "json": json.dumps(texts).encode()})
    shard = write_shard(tmp_path / "x.tar", samples)
    model, sources = make_model().requires_grad_(False), ["json.captions", "txt", "json.captions"]
    pairs = data.Pairs([str(shard)], TOKENIZER, 16, sources)
    images, texts, owner = evaluation.encode_shards(model, pairs, batch_size=2)
    assert images.shape == (3, 16) and owner.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    slow = model.encode_text(TOKENIZER(["a red thing", "a green thing", "ring"]))
    torch.testing.assert_close(texts[-3:], slow)
    printed = capsys.readouterr().out
    assert f"skipped {shard}: 0002: " in printed
    assert "5 of 9 captions" in printed  # a red thing 3 times, ring 3 times, a green thing twice


def test_identical_captions_tie_and_their_number_is_printed(tmp_path, capsys):
    """Perfect features, but each caption is that of two images: half of the answers are right."""
    samples = []
    for i, name in enumerate(NAMES * 2):
        image = png(COLOURS[name], np.random.default_rng(i))
        samples.append({"png": image, "txt": name.encode()})
    pairs = data.Pairs([str(write_shard(tmp_path / "x.tar", samples))], TOKENIZER, 16)
    result = evaluation.retrieval(*evaluation.encode_shards(Colours(), pairs, batch_size=4))
    assert values(result, "image_to_text", 1, 5) == [0.5, 1]
    assert values(result, "text_to_image", 1, 5) == [0.5, 1]
    assert "3 of 6 captions repeat another one" in capsys.readouterr().out


# ---- zero-shot


@torch.no_grad()
def test_zeroshot_has_the_logits_of_open_clip(folders):
    model = make_model(context_length=16)
    c = open_clip_config(model.config)
    other = open_clip.CLIP(c["embed_dim"], c["vision_cfg"], c["text_cfg"]).eval()
    other.load_state_dict(open_clip_state(model))
    names = ["red", "green", "blue", "grey square", "ring", "unheard of"]
    templates = [lambda name, t=t: t.format(name) for t in evaluation.TEMPLATES]
    classifier = open_clip.build_zero_shot_classifier(
        other, lambda texts: TOKENIZER(texts, 16), names, templates, num_classes_per_batch=4
    )  # (E, C)
    tokenizer = data.Tokenizer(TOKENIZER.vocab, context_length=16)
    ours = evaluation.zeroshot_classifier(model, tokenizer, names, evaluation.TEMPLATES)
    dataset = evaluation.ClassFolders(folders, 16)
    images = torch.stack([image for image, _ in dataset])
    normalised = (images / 255 - model.visual.mean) / model.visual.std
    logits = 100 * other.encode_image(normalised, normalize=True) @ classifier
    torch.testing.assert_close(100 * model.encode_image(images) @ ours.T, logits)
    result = evaluation.zeroshot(model, tokenizer, dataset, names, batch_size=5)
    for name, k in (("top1", 1), ("top5", 5)):
        right = logits.topk(k).indices == torch.tensor(dataset.targets)[:, None]
        assert result[name]["value"] == pytest.approx(right.any(dim=1).double().mean().item())
        assert result[name]["chance"] == pytest.approx(k / 6) and result[name]["n"] == 12


def test_zeroshot_by_hand(folders, capsys):
    (folders / "red" / "0.png").rename(folders / "blue" / "9.png")  # a red one among the blue
    (folders / "green" / "0.png").write_bytes(b"no image")
    dataset = evaluation.ClassFolders(folders, 16)
    result = evaluation.zeroshot(Colours(), TOKENIZER, dataset, dataset.classes, batch_size=4)
    assert result["top1"]["value"] == pytest.approx(10 / 11) and result["top1"]["n"] == 11
    per_class = [(part["name"], part["value"], part["n"]) for part in result["per_class"]]
    assert per_class == [("blue", pytest.approx(0.8), 5), ("green", 1, 3), ("red", 1, 3)]
    assert f"skipped {folders / 'green' / '0.png'}" in capsys.readouterr().out


def test_classes_of_the_same_name_stay_apart(folders):
    """ImageNet has two cranes, the bird and the machine."""
    dataset = evaluation.ClassFolders(folders, 16)
    result = evaluation.zeroshot(Colours(), TOKENIZER, dataset, ["red", "blue", "red"])
    assert [part["n"] for part in result["per_class"]] == [4, 4, 4]


def test_hidden_folders_are_no_classes(folders):
    (folders / ".ipynb_checkpoints").mkdir()
    (folders / "dark_red").mkdir()
    (folders / "dark_red" / "0.PNG").write_bytes((folders / "red" / "0.png").read_bytes())
    dataset = evaluation.ClassFolders(folders, 16)
    assert evaluation.class_names(dataset, None) == ["blue", "dark red", "green", "red"]
    assert dataset.targets == [0] * 4 + [1] + [2] * 4 + [3] * 4


# ---- linear probe


def test_probe_finds_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (900,), generator=generator)
    x = torch.randn(900, 10, generator=generator)
    separable = x + 8 * F.one_hot(y, 10)
    split = lambda x: ((x[:600], y[:600]), (x[600:], y[600:]))  # noqa: E731
    s, _ = evaluation.probe(*split(separable), 3)
    assert s["value"] > 0.99 and s["n"] == 300 and s["chance"] == pytest.approx(1 / 3)
    s, _ = evaluation.probe(*split(x), 3)
    assert s["interval"][0] < 1 / 3 < s["interval"][1]


@torch.no_grad()
def test_frozen_features_are_class_token_and_patch_mean(folders):
    model = make_model()
    dataset = evaluation.ClassFolders(folders, 16)
    x, y = evaluation.frozen_features(model, dataset, batch_size=5)
    tokens = model.visual(torch.stack([image for image, _ in dataset]))
    torch.testing.assert_close(x[:, :64], tokens[:, 0])
    torch.testing.assert_close(x[:, 64:], tokens[:, 1:].mean(dim=1))
    assert y.tolist() == [0] * 4 + [1] * 4 + [2] * 4


# ---- words


@torch.no_grad()
def test_top_words_are_the_softmax_of_the_head():
    model = make_model()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    shown = [TOKENIZER.encode(name)[0] for name in NAMES] + [data.BYTES.index(ord("q"))]
    model.head.linear.bias[shown] += 9.0
    model.head.linear.bias[[0, TOKENIZER.start, TOKENIZER.end]] += 9.0  # no words, never shown
    probabilities = model.class_logits(images).softmax(dim=1)
    for row, words in zip(probabilities, evaluation.top_words(model, TOKENIZER, images, k=4)):
        assert {(word, i) for word, _, i in words} == set(zip([*NAMES, "q-"], shown))
        assert [p for _, p, _ in words] == sorted((p for _, p, _ in words), reverse=True)
        for _, p, i in words:
            assert p == pytest.approx(row[i].item())


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 3])
def test_word_maps_are_those_of_the_slow_loop(window):
    model = make_model()
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)  # a grid of 4 x 4 patches
    ids = [TOKENIZER.encode(word)[0] for word in ("red", "ring", "a")]
    falls, maps = evaluation.word_maps(model, image, ids, window, batch_size=3)
    whole = model.class_logits(image[None]).log_softmax(dim=1)[0, ids]
    total, times, slow = torch.zeros(3, 4, 4), torch.zeros(4, 4), []
    for y, x in itertools.product(range(5 - window), repeat=2):
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[y : y + window, x : x + window] = True
        keep = torch.tensor([[p for p in range(16) if not inside.flatten()[p]]])
        fall = whole - model.class_logits(image[None], keep).log_softmax(dim=1)[0, ids]
        slow.append(fall)
        total += fall[:, None, None] * inside
        times += inside
    torch.testing.assert_close(falls, torch.stack(slow, dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps, total / times, atol=1e-5, rtol=1e-4)


# ---- commands


def assert_printed(printed, scores):
    """Every score of the JSON stands in a line of the output."""
    for s in scores:
        assert evaluation.line("", s).strip() in printed
        assert s["n"] and 0 <= s["interval"][0] <= s["value"] <= s["interval"][1] <= 1


def test_zeroshot_command(folders, checkpoint, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("blue thing\ngreen thing\nred thing\n")
    argv = ["zeroshot", "--checkpoint", checkpoint, "--images", folders, "--workers", 0]
    command = capsys, evaluation.main, tmp_path / "result.json"
    result, printed = result_of(*command, *argv, "--classes", tmp_path / "names.txt")
    assert_printed(printed, [result["top1"], *result["per_class"]])
    names = [part["name"] for part in result["per_class"]]
    assert names == ["blue thing", "green thing", "red thing"]
    assert all(template in printed for template in evaluation.TEMPLATES)
    (tmp_path / "braces.txt").write_text("a {} with {braces}\n")
    assert not run(evaluation.main, *argv, "--templates", tmp_path / "braces.txt")
    (tmp_path / "bare.txt").write_text("{}\n")
    result, printed = result_of(*command, *argv, "--templates", tmp_path / "bare.txt")
    assert result["templates"] == ["{}"] and result["top1"]["n"] == 12


def test_prompts_and_class_names_of_published_scores(folders, checkpoint, tmp_path, capsys):
    """--templates openai and --classes imagenet give the scores of open_clip's own classifier."""
    for i in range(1000):
        (tmp_path / "imagenet" / f"n{i:08d}").mkdir(parents=True)
    for i, colour in ((3, "red"), (7, "green"), (900, "blue")):
        shutil.copytree(folders / colour, tmp_path / "imagenet" / f"n{i:08d}", dirs_exist_ok=True)
    (tmp_path / "bare.txt").write_text("{}\n")
    model, tokenizer, _ = evaluation.load(checkpoint)
    argv = ["zeroshot", "--checkpoint", checkpoint, "--workers", 0]
    command = capsys, evaluation.main, tmp_path / "result.json", *argv
    imagenet = ["--classes", "imagenet"]
    for folder, names, templates, more in (
        (folders, sorted(NAMES), open_clip.OPENAI_IMAGENET_TEMPLATES, ["--templates", "openai"]),
        (
            tmp_path / "imagenet",
            open_clip.IMAGENET_CLASSNAMES,
            ["{}"],
            [*imagenet, "--templates", tmp_path / "bare.txt"],
        ),
    ):
        result, printed = result_of(*command, "--images", folder, *more)
        assert f"{len(names)} classes, {len(templates)} prompts" in printed
        theirs = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)  # (E, C)
        dataset = evaluation.ClassFolders(folder, model.config.image_size)
        logits = torch.cat([model.encode_image(image[None]) for image, _ in dataset]) @ theirs
        hits = logits.argmax(dim=1) == torch.tensor(dataset.targets)
        assert result["top1"]["value"] == hits.double().mean().item()
        assert {part["name"] for part in result["per_class"]} == {
            names[i] for i in {*dataset.targets}
        }
    few = [*argv, "--images", folders, *imagenet]
    assert "names 1000 classes" in error_of(capsys, evaluation.main, *few)


def test_retrieval_command(checkpoint, tmp_path, capsys):
    samples = []
    for i in range(12):
        name = list(COLOURS)[i % 4]
        texts = json.dumps({"captions": [f"a {name} thing", name]}).encode()
        image = png(COLOURS[name], np.random.default_rng(i))
        samples.append({"png": image, "txt": name.encode(), "json": texts})
    shard = write_shard(tmp_path / "pairs.tar", samples)
    argv = ["retrieval", "--checkpoint", checkpoint, "--data", shard, "--workers", 2]
    argv += ["--captions", "json.captions"]
    result, printed = result_of(capsys, evaluation.main, tmp_path / "result.json", *argv)
    assert (result["images"], result["captions"]) == (12, 24)
    for way in ("image_to_text", "text_to_image"):
        assert_printed(printed, [result[way][f"R@{k}"] for k in (1, 5, 10)])
        assert f"median rank {result[way]['median_rank']:.0f}" in printed


def test_probe_command(folders, checkpoint, tmp_path, capsys):
    argv = ["probe", "--checkpoint", checkpoint, "--train", folders, "--test", folders]
    command = capsys, evaluation.main, tmp_path / "result.json", *argv, "--workers", 0
    result, printed = result_of(*command)
    assert list(result) == ["class token", "patch mean"]
    assert_printed(printed, result.values())
    assert result["patch mean"]["value"] == 1  # colours are easy, and these are its training images


def test_mistakes_are_one_sentence(folders, checkpoint, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "templates.txt").write_text("a photo of a {}.\na photo\n")
    (tmp_path / "flat").mkdir()
    (tmp_path / "hollow" / "empty").mkdir(parents=True)
    (tmp_path / "other" / "red").mkdir(parents=True)
    for folder in (tmp_path / "broken" / "red", tmp_path / "other" / "red"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "x.png").write_bytes(b"no image")
    (tmp_path / "damaged.pt").write_bytes(checkpoint.read_bytes()[:9999])
    torch.save(SimpleNamespace(), tmp_path / "unsafe.pt")
    torch.save({"epoch": 1}, tmp_path / "other.pt")
    old = {"model": {}, "config": {"depth": 1}, "vocab": TOKENIZER.vocab}
    torch.save(old, tmp_path / "old.pt")
    base = ["--workers", 0, "--checkpoint", checkpoint]
    zeroshot, probe = ["zeroshot", *base, "--images"], ["probe", *base, "--train", folders]
    for argv, words in (
        ([*zeroshot, tmp_path / "nowhere"], "nowhere"),
        ([*zeroshot, tmp_path / "flat"], "one folder of images per class"),
        ([*zeroshot, tmp_path / "hollow"], "no images"),
        ([*zeroshot, tmp_path / "broken"], "none of the samples"),
        ([*zeroshot, folders, "--classes", tmp_path / "two.txt"], "names 2 classes"),
        ([*zeroshot, folders, "--classes", tmp_path / "none.txt"], "none.txt"),
        ([*zeroshot, folders, "--templates", tmp_path / "templates.txt"], "{}"),
        ([*zeroshot, folders, "--device", "toaster"], "toaster"),
        ([*zeroshot, folders, "--batch_size", 0], "--batch_size"),
        ([*zeroshot, folders, "--workers", -1], "--workers"),
        ([*zeroshot, folders, "--json", tmp_path / "nowhere" / "x.json"], "folder that exists"),
        ([*zeroshot, folders, "--json", checkpoint], "ends in .json"),
        ([*zeroshot, folders, "--checkpoint", tmp_path / "none.pt"], "no file"),
        ([*zeroshot, folders, "--checkpoint", tmp_path / "two.txt"], "not a checkpoint"),
        ([*zeroshot, folders, "--checkpoint", tmp_path / "damaged.pt"], "damaged"),
        ([*zeroshot, folders, "--checkpoint", tmp_path / "unsafe.pt"], "could run code"),
        ([*zeroshot, folders, "--checkpoint", tmp_path / "other.pt"], "not a checkpoint"),
        ([*zeroshot, folders, "--checkpoint", tmp_path / "old.pt"], "another version"),
        (zeroshot[:-1], "--images"),
        ([*probe, "--test", tmp_path / "other"], "different class folders"),
        (["retrieval", *base, "--data", tmp_path / "nowhere.tar"], "no shards match"),
    ):
        assert words in error_of(capsys, evaluation.main, *argv), argv
    assert not list(tmp_path.glob("**/*.json"))
