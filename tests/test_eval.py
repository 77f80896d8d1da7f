"""Test scores against slow and obvious ways to compute them, chance against its formula, and what
the commands of eval.py print."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision
from material import TOKENIZER, png, result_of, small_model, write_captions, write_shard
from PIL import Image

import data
import eval as evaluation
from common.cli import InputError
from common.images import STANDARD_SETS, class_pictures, standard_set
from common.tokenizer import Tokenizer
from superclip import contrastive_loss, sigmoid_loss

NAMES = ("red", "green", "blue")


class Colours:
    """Act as a model that knows three colours, and nothing else."""

    logit_scale = torch.tensor(1.0)
    config = SimpleNamespace(image_size=16)

    def encode_image(self, images):
        return F.normalize(images.float().mean(dim=(2, 3)), dim=1)

    def encode_text(self, tokens):
        ids = torch.tensor([TOKENIZER.encode(name)[0] for name in NAMES])
        return F.normalize((tokens[:, :, None] == ids).any(dim=1).float(), dim=1)


# ---- intervals


@pytest.mark.parametrize("hits, low, high", [(0, 0, 0.161), (10, 0.299, 0.701), (20, 0.839, 1)])
def test_an_interval_is_wilsons(hits, low, high):
    """The score is a mean over 20 images. The usual interval, p ± 1.96 standard errors, would have
    no width at 0 and at 1."""
    scored = evaluation.make_score(torch.arange(20) < hits, chance=0.1)

    assert scored["interval"] == pytest.approx([low, high], abs=5e-4)


# ---- retrieval


def values(result, way, *ks):
    return [result[way][f"R@{k}"]["value"] for k in ks]


def test_retrieval_by_hand():
    """Three images have two captions each. A row of `scores` holds the similarities of an image to
    the six captions. The first image finds its captions at ranks 1 and 6, the second at ranks 3 and
    6, and the third at ranks 6 and 3."""
    scores = [[9, 1, 5, 4, 3, 2], [8, 7, 6, 1, 5, 2], [5, 6, 3, 2, 1, 4]]
    image_of_text = torch.tensor([0, 0, 1, 1, 2, 2])

    result = evaluation.retrieval(
        torch.tensor(scores).float(), torch.eye(6), image_of_text, (1, 2, 3, 4)
    )

    assert values(result, "image_to_text", 1, 2, 3, 4) == pytest.approx([1 / 3, 1 / 3, 1, 1])
    # By column, the captions find their images at ranks 1, 3, 1, 3, 3 and 1.
    assert values(result, "text_to_image", 1, 2, 3) == pytest.approx([1 / 2, 1 / 2, 1])
    # The captions of an image are not independent, so the interval counts images. It is Wilson's
    # for 1.5 hits of 3. With 3 hits of 6 captions it would be narrower, 0.19 to 0.81.
    assert result["text_to_image"]["R@1"]["n"] == 3
    assert result["text_to_image"]["R@1"]["interval"] == pytest.approx([0.125, 0.875], abs=1e-3)


IMAGE_OF_TEXT = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 3])  # the images of 11 captions


def test_chance_is_k_times_the_share_of_right_answers():
    """Two of the images have so many captions that it reaches 1."""
    texts = F.normalize(torch.randn(11, 7), dim=1)

    result = evaluation.retrieval(texts[:4], texts, IMAGE_OF_TEXT, range(1, 6))

    for k in range(1, 6):
        formula = np.mean([min(1, k * n / 11) for n in (3, 1, 2, 5)])
        assert result["image_to_text"][f"R@{k}"]["chance"] == pytest.approx(formula)
        assert result["text_to_image"][f"R@{k}"]["chance"] == pytest.approx(min(1, k / 4))


def test_a_model_that_has_collapsed_scores_chance():
    """If ties counted as hits, the model would score 100 %, and if as misses, 0 %."""
    equal = torch.full((11, 7), 0.3)

    result = evaluation.retrieval(equal[:4], equal, IMAGE_OF_TEXT, (1,))

    for way in ("image_to_text", "text_to_image"):
        assert result[way]["R@1"]["value"] == pytest.approx(result[way]["R@1"]["chance"])


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_of_a_validation_is_that_of_the_model_in_groups(loss):
    """Each image has two captions, and the first one counts. The seventh image fills no group."""
    model = small_model(loss=loss)
    images, captions = F.normalize(torch.randn(21, 8), dim=1).split([7, 14])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))

    found = evaluation.loss_in_groups(model, images, captions, torch.arange(14) // 2, 3)

    images, first = images[order], captions[::2][order]
    loss_of, scale_and_bias = contrastive_loss, [model.logit_scale.exp()]
    if loss == "sigmoid":
        loss_of, scale_and_bias = sigmoid_loss, [*scale_and_bias, model.logit_bias]
    groups = []
    for i in (0, 3):
        groups.append(loss_of(images[i : i + 3], first[i : i + 3], *scale_and_bias))
    assert found == pytest.approx(sum(groups).item() / 2)


def test_a_search_goes_through_the_scores_in_chunks():
    """With 2**14 answers, 1,024 questions make a chunk, and here there is one more."""
    answers = torch.arange(2.0**14)[:, None]
    questions = torch.ones(1025, 1)
    questions[[0, -1]] = -1.0

    found = evaluation.nearest(questions, answers, 1)

    assert found.flatten().tolist() == [0, *1023 * [2**14 - 1], 0]


def test_shards_become_features_of_images_and_of_all_their_captions(tmp_path, capsys):
    """All captions of all sources count, and an image that cannot be read does not shift the
    others. The features are perfect, because the model knows the colours."""
    samples = [{"png": b"no image", "txt": b"red", "json": b'{"c": "red"}'}]
    for name in NAMES:
        fields = json.dumps({"c": [name, f"a {name} thing"]}).encode()
        samples.append({"png": png(name), "txt": name.encode(), "json": fields})
    shard = write_shard(tmp_path / "x.tar", samples)
    pairs = data.Samples([shard], ["json.c", "txt", "json.c"])

    images, texts, image_of_text = evaluation.encode_samples(Colours(), TOKENIZER, pairs)

    result = evaluation.retrieval(images, texts, image_of_text)
    assert image_of_text.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert values(result, "text_to_image", 1) == [1]
    assert f"skipped {shard}:0000: " in capsys.readouterr().out


# ---- zero-shot classification


def test_the_classifier_of_published_prompts_is_that_of_open_clip():
    model = small_model().requires_grad_(False)
    names = ["red", "grey square", "unheard of"]
    # open_clip asks for features of length 1. Ours always have it.
    other = SimpleNamespace(encode_text=lambda tokens, normalize: model.encode_text(tokens))

    templates = evaluation.read_templates("openai")
    ours = evaluation.zeroshot_classifier(model, TOKENIZER, names, templates)

    prompts = open_clip.OPENAI_IMAGENET_TEMPLATES
    theirs = open_clip.build_zero_shot_classifier(other, TOKENIZER, names, prompts)  # (E, C)
    torch.testing.assert_close(ours, theirs.T)


def test_zeroshot_by_hand(folders, capsys):
    """A red picture lies among the blue ones, as a .jfif, and a green picture cannot be read. A
    folder without images is a class, too: images can be mistaken for it. What programs hide is no
    class and no picture: Jupyter's folders, and what macOS adds beside a picture and in a zip. Nor
    is a file among the folders."""
    (folders / "README.txt").touch()
    for name in (".ipynb_checkpoints", "red/.ipynb_checkpoints", "__MACOSX"):
        (folders / name).mkdir()
    for name in ("red/._0.png", "red/.ipynb_checkpoints/0-checkpoint.png"):
        shutil.copy(folders / "red" / "0.png", folders / name)
    (folders / "red" / "0.png").rename(folders / "blue" / "9.jfif")
    (folders / "green" / "0.png").write_bytes(b"no image")
    for name in ("grey", "ring", "thing"):
        (folders / name).mkdir()

    images = class_pictures(folders, 20)
    result = evaluation.zeroshot(Colours(), TOKENIZER, images)

    assert result["value"] == pytest.approx((4 + 3 + 3) / 11)
    assert result["n"] == 11
    assert result["chance"] == pytest.approx(1 / 6)
    assert f"skipped {folders / 'green' / '0.png'}" in capsys.readouterr().out


def test_words_of_prompts_that_the_vocabulary_lacks_are_named(folders, capsys):
    """They are spelled in bytes, so classes with such names are hardly ever found."""
    names = ["red", "a green zebra", "blue's"]

    evaluation.zeroshot_pictures(folders, 20, TOKENIZER, names, ["a {}", "a drawing of a {}"])

    printed = capsys.readouterr().out
    assert "blue's, drawing, zebra" in printed and "green" not in printed


def test_numbers_of_wordnet_are_the_classes_of_imagenet_or_refused(tmp_path):
    """CLIP's vocabulary has no unknown words, so the numbers would be scored as if they were
    names."""
    numbers = ["n01440764", *(f"n{i:08d}" for i in range(2_000_000, 2_000_998)), "n15075141"]

    names = evaluation.names_of_classes(numbers)

    assert names == open_clip.IMAGENET_CLASSNAMES
    assert evaluation.names_of_classes(["n1", "owl"]) == ["n1", "owl"]
    for folders in (numbers[:10], [*numbers[:999], "owl"], [*numbers[:999], "n16000000"]):
        with pytest.raises(InputError, match="n01440764"):
            evaluation.names_of_classes(folders)


def test_without_a_template_that_the_vocabulary_knows_the_name_alone_is_left():
    templates = ["a drawing of a {}."]  # TOKENIZER lacks "drawing"

    assert evaluation.known_templates(TOKENIZER, templates) == ["{}"]
    assert evaluation.known_templates(Tokenizer.from_file("clip"), templates) == templates


# ---- commands


def scores_of(capsys, checkpoint, command, *argv):
    """Run a command of eval.py. Return what it writes to the file of --json, and what it prints.
    Assert that it prints each score once."""
    path = checkpoint.with_name("scores.json")
    argv = [command, "--checkpoint", checkpoint, "--workers", 0, *argv]
    result, printed = result_of(capsys, evaluation.main, path, *argv)
    assert printed.count("interval") == path.read_text().count('"interval"') > 0
    return result, printed


def test_zeroshot_takes_the_names_of_classes_and_templates_from_files(folders, checkpoint, capsys):
    """The file names the folders in their sorted order. The right names score as the folders do.
    The vocabulary lacks "drawing", so one template is left out, and the numbers tell which ones
    were used."""
    names = checkpoint.with_name("names.txt")
    templates = checkpoint.with_name("templates.txt")
    templates.write_text("a drawing of a {}\na picture of the {}\n")
    options = "--images", folders, "--templates", templates

    scores = []
    for text in ("blue\ngreen\nred\n", "red\nblue\ngreen\n"):
        names.write_text(text)
        result, _ = scores_of(capsys, checkpoint, "zeroshot", *options, "--classes", names)
        scores.append(result["value"])

    result, _ = scores_of(capsys, checkpoint, "zeroshot", *options)
    assert scores[0] == result["value"] != scores[1]
    assert result["templates"] == ["a picture of the {}"]


def test_of_two_splits_those_for_validation_are_scored_and_named(checkpoint, tmp_path, capsys):
    train = write_captions(tmp_path / "train-0.tar", "red", "green", "blue")
    val = write_captions(tmp_path / "val-0.tar", "red", "green")

    result, printed = scores_of(capsys, checkpoint, "retrieval", "--data", tmp_path)
    other, printed_of_train = scores_of(capsys, checkpoint, "retrieval", "--data", train)

    assert result["validation"]["image_to_text"]["R@1"]["n"] == 2
    assert "1 of 2 shards" in printed and val in printed
    assert other["validation"]["image_to_text"]["R@1"]["n"] == 3
    assert "1 of 1 shards" in printed_of_train and train in printed_of_train


# ---- the data sets of torchvision


class Cifar10(list):
    """Act as torchvision's CIFAR10, with ten pictures to train on and four for tests."""

    classes = [*NAMES, *"grey square ring_thing thing the a of".split()]

    def __init__(self, folder, download, train=True):
        labels = range(10) if train else (0, 0, 1, 2)
        colours = ("red", "lime", "blue")
        super().__init__((Image.new("RGB", (32, 32), colours[i % 3]), i) for i in labels)


def test_a_set_of_torchvision_has_the_names_of_its_classes(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar10)
    pictures = class_pictures("cifar10", 8)

    result = evaluation.zeroshot(Colours(), TOKENIZER, pictures)

    assert pictures.classes[5] == "ring thing"
    assert pictures[3][0][:, 4, 4].tolist() == [0, 0, 255]
    assert result == evaluation.make_score(torch.ones(4), 0.1)
    assert len(class_pictures("cifar10", 8, training=True)) == 10


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", STANDARD_SETS)
def test_torchvision_has_each_set_and_both_of_its_splits(name, training, monkeypatch, tmp_path):
    """torchvision first says that the files are not there. A split that it lacks would be another
    error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    [kind] = [kind for kind in torchvision.datasets.__all__ if kind.lower() == name]
    only_look = partial(getattr(torchvision.datasets, kind), download=False)
    monkeypatch.setattr(
        torchvision.datasets, kind, lambda *args, download, **split: only_look(*args, **split)
    )

    with pytest.raises(InputError, match=f"{name} .*[Dd]ataset not found"):
        standard_set(name, training)
