"""Scores against slow and obvious ways to compute them, chance against its formula; commands."""

import base64
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_train import COLOURS, TINY, png, write_shard

import data
import eval as evaluation
import train
from superclip import SuperCLIP, SuperCLIPConfig

WORDS = "a photo picture of the close up red green blue grey square ring thing".split()
TOKENIZER = data.Tokenizer(data.vocabulary_from_words(WORDS))


def make_model(**changes):
    torch.manual_seed(0)
    config = {**TINY, "vocab_size": TOKENIZER.vocab_size, **changes}
    return SuperCLIP(SuperCLIPConfig(**config)).eval()


@pytest.fixture
def checkpoint(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.head.linear.bias[TOKENIZER.encode(" ".join(WORDS))] += 9.0  # words, not bytes
    torch.save(train.weights_of(model, TOKENIZER, 0), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture
def folders(tmp_path):
    """A folder per colour, four pictures in each."""
    for c, name in enumerate(("red", "green", "blue")):
        folder = tmp_path / "classes" / name
        folder.mkdir(parents=True)
        for i in range(4):
            (folder / f"{i}.png").write_bytes(png(COLOURS[name], np.random.default_rng([c, i])))
    return tmp_path / "classes"


class Colours:
    """A model that knows the three colours, and nothing else."""

    logit_scale = torch.tensor(1.0)

    def encode_image(self, images):
        return F.normalize(images.float().mean(dim=(2, 3)), dim=1)

    def encode_text(self, tokens):
        ids = torch.tensor([TOKENIZER.encode(name)[0] for name in ("red", "green", "blue")])
        return F.normalize((tokens[:, :, None] == ids).any(dim=1).float(), dim=1)


def command(*argv):
    with pytest.raises(SystemExit) as ended:
        data.cli(evaluation.main, [str(a) for a in argv])
    return ended.value.code


def error_of(capsys, *argv):
    """The sentence with which a command ends that the user got wrong."""
    capsys.readouterr()
    assert command(*argv) == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")


# ---- scores


@pytest.mark.parametrize(
    "hits, n, low, high", [(8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (300, 1000, 0.2724, 0.3291)]
)
def test_wilson_interval_is_that_of_the_tables(hits, n, low, high):
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
        ranks = [np.array([*first_right(*q)]) for q in zip(table.tolist(), right)]  # noqa: B905
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
    assert max(values(result, "image_to_text", 1, 5)) <= 0.25


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


def test_autocast_makes_no_ties():
    """train.py validates under autocast: similarities are in fp32 nevertheless."""
    images = F.normalize(torch.randn(300, 8), dim=1)
    texts = F.normalize(images + 0.3 * torch.randn(300, 8), dim=1)
    plain = evaluation.retrieval(images, texts, torch.arange(300))
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluation.retrieval(images, texts, torch.arange(300)) == plain


def test_autocast_makes_no_ties_in_zeroshot(monkeypatch):
    images = F.normalize(torch.randn(300, 8), dim=1)
    classes = F.normalize(images + 0.3 * torch.randn(300, 8), dim=1)
    monkeypatch.setattr(evaluation, "zeroshot_classifier", lambda *_: classes)
    monkeypatch.setattr(evaluation, "batches", lambda *_: [(images, list(range(300)))])
    model = SimpleNamespace(encode_image=lambda features: features, logit_scale=torch.zeros(()))
    names = [str(i) for i in range(300)]
    plain = evaluation.zeroshot(model, None, None, names)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluation.zeroshot(model, None, None, names) == plain


def test_one_tensor_a_batch_leaves_a_worker():
    """However many images: each holds a file open on its way, and a system has only so many."""
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    images, labels, reasons = evaluation.collate([(image, 4), (None, "a.jpg: bad"), (image, 5)])
    assert images.shape == (2, 3, 8, 8) and labels == [4, 5] and reasons == ["a.jpg: bad"]
    assert evaluation.collate([(None, "a.jpg: bad")]) == (None, [], ["a.jpg: bad"])


def test_encoded_pairs_know_their_owner(tmp_path):
    """All captions of a field count, and one image that cannot be read shifts nothing."""
    samples = []
    for i, n in enumerate((1, 3, 2, 2)):
        texts = {"captions": [f"a {'red green blue'.split()[j]} thing" for j in range(n)]}
        image = png((60 * i,) * 3, np.random.default_rng(i)) if i != 2 else b"no image"
        samples.append({"png": image, "json": json.dumps(texts).encode()})
    write_shard(tmp_path / "x.tar", samples)
    model = make_model()
    pairs = data.Pairs([str(tmp_path / "x.tar")], TOKENIZER, 16, "json.captions")
    images, texts, owner = evaluation.encode_pairs(model, pairs, batch_size=2)
    assert images.shape == (3, 16) and owner.tolist() == [0, 1, 1, 1, 2, 2]
    with torch.no_grad():
        slow = model.encode_text(TOKENIZER(["a red thing", "a green thing"]))
    torch.testing.assert_close(texts[[4, 5]], slow)


# ---- zero-shot


@torch.no_grad()
def test_zeroshot_has_the_logits_of_open_clip(folders):
    model = make_model(context_length=16)
    c = model.open_clip_config()
    other = open_clip.CLIP(c["embed_dim"], c["vision_cfg"], c["text_cfg"]).eval()
    other.load_state_dict(model.state_dict_open_clip())
    names = ["red", "green", "blue", "grey square", "ring", "unheard of"]
    templates = [lambda name, t=t: t.format(name) for t in evaluation.TEMPLATES]
    classifier = open_clip.build_zero_shot_classifier(
        other, lambda texts: TOKENIZER(texts, 16), names, templates, num_classes_per_batch=4
    )  # (E, C)
    tokenizer = data.Tokenizer(TOKENIZER.vocab, context_length=16)
    mine = evaluation.zeroshot_classifier(model, tokenizer, names, evaluation.TEMPLATES)
    dataset, _ = evaluation.class_folders(folders, 16)
    images = torch.stack([image for image, _ in dataset])
    normalised = (images / 255 - model.visual.mean) / model.visual.std
    logits = 100 * other.encode_image(normalised, normalize=True) @ classifier
    torch.testing.assert_close(100 * model.encode_image(images) @ mine.T, logits)
    labels = torch.tensor(dataset.labels)
    result = evaluation.zeroshot(model, tokenizer, dataset, names, batch_size=5)
    for name, k in (("top1", 1), ("top5", 5)):
        hits = (logits.topk(k).indices == labels[:, None]).any(dim=1).double()
        assert result[name]["value"] == pytest.approx(hits.mean().item())
        assert result[name]["chance"] == pytest.approx(k / 6) and result[name]["n"] == 12


def test_zeroshot_by_hand(folders, capsys):
    (folders / "red" / "0.png").rename(folders / "blue" / "9.png")  # a red one among the blue
    (folders / "green" / "0.png").write_bytes(b"no image")
    dataset, names = evaluation.class_folders(folders, 16)
    result = evaluation.zeroshot(Colours(), TOKENIZER, dataset, names, batch_size=4)
    assert result["top1"]["value"] == pytest.approx(10 / 11) and result["top1"]["n"] == 11
    per_class = {name: (s["value"], s["n"]) for name, s in result["per_class"].items()}
    assert per_class == {"blue": (pytest.approx(0.8), 5), "green": (1, 3), "red": (1, 3)}
    output = capsys.readouterr()
    assert str(folders / "green" / "0.png") in output.out + output.err  # named, not counted


def test_class_names_of_wnid_folders_are_imagenets(tmp_path):
    """The list of torchvision follows the sorted wnids: tench is n01440764, the first."""
    for i in range(1000):
        (tmp_path / f"n{i:08d}").mkdir()
        (tmp_path / f"n{i:08d}" / "x.jpg").touch()
    dataset, names = evaluation.class_folders(tmp_path, 16)
    assert names[0] == "tench" and names[207] == "golden retriever" and len(dataset) == 1000


def test_classes_of_the_same_name_stay_apart(folders):
    """ImageNet has two cranes, the bird and the machine."""
    dataset, _ = evaluation.class_folders(folders, 16)
    result = evaluation.zeroshot(Colours(), TOKENIZER, dataset, ["red", "blue", "red"])
    assert sum(s["n"] for s in result["per_class"].values()) == 12


def test_zeroshot_mistakes_are_one_sentence(folders, checkpoint, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "templates.txt").write_text("a photo of a {}.\na photo\n")
    (tmp_path / "flat").mkdir()
    (tmp_path / "hollow" / "empty").mkdir(parents=True)
    base = ["zeroshot", "--workers", 0, "--checkpoint", checkpoint, "--images"]
    for argv, words in (
        ([*base, tmp_path / "nowhere"], "nowhere"),
        ([*base, tmp_path / "flat"], "one folder of images per class"),
        ([*base, tmp_path / "hollow"], "empty holds no images"),
        ([*base, folders, "--classes", tmp_path / "two.txt"], "names 2 classes"),
        ([*base, folders, "--classes", tmp_path / "none.txt"], "none.txt"),
        ([*base, folders, "--templates", tmp_path / "templates.txt"], "{}"),
        ([*base, folders, "--device", "toaster"], "toaster"),
        (base[:-1], "--images"),
        ([*base[:-1], "--dataset", "no_such"], "no_such"),
        ([*base[:-1], "--dataset", "cifar10", "--root", tmp_path], "CIFAR10"),
        ([*base[:3], "--checkpoint", tmp_path / "two.txt", "--images", folders], "two.txt"),
    ):
        assert words in error_of(capsys, *argv), argv


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
    dataset, _ = evaluation.class_folders(folders, 16)
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
    model.head.linear.bias[[TOKENIZER.encode(word)[0] for word in WORDS[7:11]]] += 9.0  # colours
    model.head.linear.bias[[0, TOKENIZER.start, TOKENIZER.end]] += 9.0  # no words, never shown
    probabilities = model.class_logits(images).softmax(dim=1)
    for row, words in zip(probabilities, evaluation.top_words(model, TOKENIZER, images, k=4)):  # noqa: B905
        assert {word for word, _, _ in words} == set(WORDS[7:11])
        assert [p for _, p, _ in words] == sorted((p for _, p, _ in words), reverse=True)
        for word, p, ids in words:
            assert ids == TOKENIZER.encode(word) and p == pytest.approx(row[ids[0]].item())


def test_subwords_are_joined_to_words():
    tokens = [bytes([b]) for b in data.BYTES] + [bytes([b]) + b" " for b in data.BYTES]
    tokens += [b"sk", b"ska", b"skat", b"skate", b"bo", b"boa", b"boar", b"board ", b"ca", b"cat "]
    lines = [f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)]
    tokenizer = data.Tokenizer("".join(lines))
    skate, board = tokenizer.encode("skateboard")
    (cat,) = tokenizer.encode("cat")
    joined = evaluation.words_of(tokenizer, [skate, board, cat], [0.5, 0.45, 0.02])
    assert joined == [("skateboard", 0.45, [skate, board]), ("cat", 0.02, [cat])]
    # parts of a word come together, and so do their probabilities: these two do not belong together
    apart = evaluation.words_of(tokenizer, [skate, cat], [0.5, 0.02])
    assert apart == [("skate-", 0.5, [skate]), ("cat", 0.02, [cat])]


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 3])
def test_word_maps_are_those_of_the_slow_loop(window):
    model = make_model()
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)  # a grid of 4 x 4 patches
    words = [TOKENIZER.encode("red"), TOKENIZER.encode("ring") + TOKENIZER.encode("a")]
    falls, maps = evaluation.word_maps(model, image, words, window, batch_size=3)
    whole = model.class_logits(image[None]).log_softmax(dim=1)[0]
    total, times, slow = torch.zeros(2, 4, 4), torch.zeros(4, 4), []
    for y, x in itertools.product(range(5 - window), repeat=2):
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[y : y + window, x : x + window] = True
        keep = torch.tensor([[p for p in range(16) if not inside.flatten()[p]]])
        without = model.class_logits(image[None], keep).log_softmax(dim=1)[0]
        fall = torch.stack([(whole - without)[ids].sum() for ids in words])
        slow.append(fall)
        total += fall[:, None, None] * inside
        times += inside
    torch.testing.assert_close(falls, torch.stack(slow, dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps, total / times, atol=1e-5, rtol=1e-4)


class Seer:
    """A head that says red or square for each red patch that it is shown, blue or ring for each
    blue one."""

    logit_scale, visual = torch.tensor(1.0), SimpleNamespace(grid=6)

    def __init__(self, sign=1):
        self.sign = sign

    def class_logits(self, images, keep=None):
        patches = F.avg_pool2d(images.float(), 4).flatten(2) / 255  # (B, 3, 36)
        if keep is not None:
            patches = patches.gather(2, keep[:, None].expand(-1, 3, -1))
        logits = torch.zeros(len(images), TOKENIZER.vocab_size)
        for word, channel in (("red", 0), ("square", 0), ("blue", 2), ("ring", 2)):
            logits[:, TOKENIZER.encode(word)[0]] = self.sign * patches[:, channel].sum(dim=1)
        return logits


def test_localisation_is_right_for_a_model_that_looks_at_the_object(tmp_path):
    samples = []
    for i in range(3):
        pixels, objects = np.zeros((24, 24, 3), np.uint8), []
        for name, shape, channel, (x, y) in (
            ("red", "square", 0, (i, 0)),
            ("blue", "ring", 2, (1, 4 - i)),
        ):
            pixels[4 * y : 4 * y + 8, 4 * x : 4 * x + 8, channel] = 255  # two patches a side
            box = [(x + 0.1) / 6, (y + 0.1) / 6, (x + 1.9) / 6, (y + 1.9) / 6]
            objects.append({"colour": name, "shape": shape, "box": box})
        Image.fromarray(pixels).save(tmp_path / "x.png")
        scene = json.dumps({"scene": {"objects": objects}}).encode()
        samples.append({"png": (tmp_path / "x.png").read_bytes(), "json": scene, "txt": b"red"})
    write_shard(tmp_path / "scenes.tar", samples)
    pairs = data.Pairs([str(tmp_path / "scenes.tar")], TOKENIZER, 24)
    s = evaluation.localisation(Seer(), pairs, window=2)
    assert s["value"] == 1 and s["n"] == 12  # four words of each of three scenes
    assert s["chance"] == pytest.approx(1 / 25)  # one of 5 x 5 windows has its centre there
    assert evaluation.localisation(Seer(-1), pairs, window=2)["value"] == 0


def test_the_picture_is_red_where_a_word_loses_and_blue_where_it_gains(tmp_path):
    image = torch.full((3, 16, 16), 128, dtype=torch.uint8)
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3], maps[1, 0, 3] = 1.0, -1.0, 0.5
    words = [("red", 0.5, [1]), ("ring", 0.1, [2])]
    rows = [("one.png", image, words, maps), ("two.png", image, words[:1], maps[:1])]
    evaluation.draw_words(rows, 2, tmp_path / "words.png")
    sheet = Image.open(tmp_path / "words.png")
    cell, gap, head = evaluation.CELL, evaluation.GAP, evaluation.HEAD
    assert sheet.format == "PNG" and sheet.width == gap + 3 * (cell + gap)  # photo and two words
    assert sheet.height > head + 2 * cell

    def middle(column, x, y):  # of a patch in the first row of pictures
        corner = gap + column * (cell + gap), head
        return sheet.getpixel(tuple(int(c + (p + 0.5) * cell / 4) for c, p in zip(corner, (x, y))))  # noqa: B905

    red, blue, none, weak = middle(1, 0, 0), middle(1, 3, 3), middle(1, 1, 1), middle(2, 3, 0)
    assert red[0] > 150 > red[2] and blue[2] > 150 > blue[0] and len(set(none)) == 1
    assert red[1] < weak[1] < none[1] and weak[0] > weak[2]  # half the fall, half the colour
    assert middle(0, 0, 0) == (128, 128, 128)


# ---- commands


def assert_printed(printed, scores):
    """Every score of the JSON stands in a line of the output."""
    for s in scores:
        assert evaluation.line("", s).strip() in printed
        assert s["n"] and 0 <= s["interval"][0] <= s["value"] <= s["interval"][1] <= 1


def result_of(capsys, tmp_path, *argv):
    capsys.readouterr()
    assert not command(*argv, "--json", tmp_path / "result.json")
    return json.loads((tmp_path / "result.json").read_text()), capsys.readouterr().out


def test_zeroshot_command(folders, checkpoint, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("blue thing\ngreen thing\nred thing\n")
    argv = ["zeroshot", "--checkpoint", checkpoint, "--images", folders, "--workers", 0]
    result, printed = result_of(capsys, tmp_path, *argv, "--classes", tmp_path / "names.txt")
    assert_printed(printed, [result["top1"], *result["per_class"].values()])
    assert list(result["per_class"]) == ["blue thing", "green thing", "red thing"]
    assert all(template in printed for template in evaluation.TEMPLATES)
    (tmp_path / "braces.txt").write_text("a {} with {braces}\n")
    assert not command(*argv, "--templates", tmp_path / "braces.txt")  # no other {} is meant
    result, printed = result_of(capsys, tmp_path, *argv, "--templates", "none")
    assert result["templates"] == ["{}"] and result["top1"]["n"] == 12


def test_retrieval_command(checkpoint, tmp_path, capsys):
    samples = []
    for i in range(12):
        name = list(COLOURS)[i % 4]
        texts = json.dumps({"captions": [f"a {name} thing", name]}).encode()
        image = png(COLOURS[name], np.random.default_rng(i))
        samples.append({"png": image, "txt": name.encode(), "json": texts})
    shard = write_shard(tmp_path / "pairs.tar", samples)
    argv = ["retrieval", "--checkpoint", checkpoint, "--data", shard, "--workers", 2]
    result, printed = result_of(capsys, tmp_path, *argv, "--captions", "json.captions")
    assert (result["images"], result["captions"]) == (12, 24)
    for way in ("image_to_text", "text_to_image"):
        assert_printed(printed, [result[way][f"R@{k}"] for k in (1, 5, 10)])
        assert f"median rank {result[way]['median_rank']:.0f}" in printed
    assert "no shards match" in error_of(capsys, *argv[:3], "--data", "nowhere.tar")


def test_probe_command(folders, checkpoint, tmp_path, capsys):
    argv = ["probe", "--checkpoint", checkpoint, "--train", folders, "--test", folders]
    argv += ["--workers", 0]
    result, printed = result_of(capsys, tmp_path, *argv)
    assert set(result) == {"class token", "patch mean", "both"}
    assert_printed(printed, [{**s} for s in result.values()])
    assert result["both"]["value"] == 1  # colours are easy, and these are its training images
    (folders.parent / "other" / "red").mkdir(parents=True)
    (folders.parent / "other" / "red" / "x.png").write_bytes(
        png((0, 0, 0), np.random.default_rng())
    )
    assert "class folders" in error_of(capsys, *argv, "--test", folders.parent / "other")


def test_cached_features_are_only_those_of_the_same_question(
    folders, checkpoint, tmp_path, monkeypatch
):
    asked = []
    frozen = evaluation.frozen_features
    monkeypatch.setattr(
        evaluation, "frozen_features", lambda *a, **k: asked.append(1) or frozen(*a, **k)
    )
    argv = ["probe", "--checkpoint", checkpoint, "--train", folders, "--test", folders]
    argv += ["--workers", 0, "--cache", tmp_path / "features"]
    assert not command(*argv) and len(asked) == 2
    assert not command(*argv) and len(asked) == 2  # both parts are read again
    assert not command(*argv, "--untrained") and len(asked) == 4


def test_words_command(folders, checkpoint, tmp_path, capsys):
    argv = ["words", "--checkpoint", checkpoint, "--k", 3]
    more = ["--image", folders / "red", folders / "blue" / "0.png", "--out", tmp_path / "words.png"]
    result, printed = result_of(capsys, tmp_path, *argv, *more)
    sheet = Image.open(tmp_path / "words.png")
    assert sheet.width == evaluation.GAP + 4 * (evaluation.CELL + evaluation.GAP)
    assert sheet.height > 5 * evaluation.CELL  # a row for each picture
    assert len(result) == 5
    for file, words in result.items():
        assert f"{file}: " in printed and len(words) == 3
        assert all(f"{p:.3f}" in printed and 0 < p < 1 for p in words.values())


def test_words_mistakes_are_one_sentence(folders, checkpoint, tmp_path, capsys):
    torch.save(train.weights_of(make_model(cls_weight=0), TOKENIZER, 0), tmp_path / "clip.pt")
    (tmp_path / "broken.png").write_bytes(b"no image")
    image = ["--image", folders / "red" / "0.png"]
    base = ["words", "--checkpoint", checkpoint]
    assert "plain CLIP" in error_of(capsys, *base[:2], tmp_path / "clip.pt", *image)
    assert "broken.png" in error_of(capsys, *base, "--image", tmp_path / "broken.png")
    assert "nowhere.png" in error_of(capsys, *base, "--image", tmp_path / "nowhere.png")
    assert "--image" in error_of(capsys, *base)
    assert "--window" in error_of(capsys, *base, *image, "--window", 4)
    shard = write_shard(
        tmp_path / "x.tar", [{"png": (folders / "red" / "0.png").read_bytes(), "txt": b"red"}]
    )
    assert "built-in shapes" in error_of(capsys, *base, "--data", shard)


@torch.no_grad()
def test_export_loads_with_the_printed_lines(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not command("export", "--checkpoint", checkpoint, "--out", "exported.pt")
    printed = capsys.readouterr().out
    scope = {}
    exec("\n".join(line.strip() for line in printed.splitlines() if line.startswith("  ")), scope)
    images, tokens = torch.randn(2, 3, 16, 16), TOKENIZER(["a red ring", "blue"])
    other, model = scope["model"].eval(), make_model()
    torch.testing.assert_close(other.encode_image(images, True), model.encode_image(images))
    torch.testing.assert_close(other.encode_text(tokens, True), model.encode_text(tokens))
