"""The model in the repository, assets/tiny.pt, loads and is the one of the README's numbers."""

import re
import tempfile
from pathlib import Path

import pytest
from PIL import Image

import data
import eval as evaluation
import train
from scripts import scenes, words

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
TUTORIAL = " ".join((ROOT / "docs" / "tutorial.md").read_text().split())
TINY = ROOT / "assets" / "tiny.pt"


@pytest.fixture(scope="module")
def world():
    """The built-in scenes of validation: shards of pairs, and folders of single objects. They are
    soon deleted, because 1,600 files cost a disk seconds once they are written to it."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "scenes")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "cores", lambda: 1)  # one process, because each has to import torch
            scenes.make_scenes(folder, train=1)
        yield folder


def stated(name):
    """The score in the README's line of this name, in percent."""
    return float(re.search(rf"^{name} +([\d.]+) %", README, re.M)[1])


def test_it_finds_captions_as_often_as_the_readme_says(world):
    """Within two of 1,000 images, because another CPU rounds otherwise."""
    model, tokenizer, _ = evaluation.load(TINY)
    shards = data.expand([f"{world}/val-*.tar"])
    pairs = data.Pairs(shards, tokenizer, model.config.image_size, ["json.long"])

    scores = evaluation.retrieval(*evaluation.encode_shards(model, pairs))

    found = scores["image_to_text"]["R@1"]
    assert found["n"] == 1000
    assert 100 * found["value"] == pytest.approx(stated("image to text R@1"), abs=0.21)


def test_it_knows_the_colour_of_an_object_better_than_a_text_without_a_shape_does(world):
    """The colour in the best of the 64 texts, as exercise 1 of the tutorial has it."""
    model, tokenizer, _ = evaluation.load(TINY)
    images = evaluation.class_folders(world / "zeroshot" / "colour", model.config.image_size)
    names = [f"{colour} {shape}" for colour in scenes.COLOURS for shape in scenes.SHAPES]
    templates = evaluation.usable_templates(tokenizer)
    classifier = evaluation.zeroshot_classifier(model, tokenizer, names, templates)

    features, labels = evaluation.encode_images(model, model.encode_image, images, 128, 0)

    best = (features @ classifier.T).argmax(dim=1).tolist()
    hits = [names[i].split()[0] == images.classes[label] for i, label in zip(best, labels)]
    stated = float(re.search(r"64 texts of section 9 is right in ([\d.]+) %", TUTORIAL)[1])
    assert 100 * sum(hits) / len(hits) == pytest.approx(stated, abs=201 / 320)


@pytest.mark.parametrize("name, n", [("colour_shape", 640), ("held_out", 320)])
def test_it_names_objects_as_often_as_the_readme_says(world, name, n):
    """Within two images."""
    model, tokenizer, _ = evaluation.load(TINY)

    score = evaluation.score_folder(model, tokenizer, world / "zeroshot" / name)["top1"]

    assert score["n"] == n
    assert 100 * score["value"] == pytest.approx(stated(f"zero-shot {name}"), abs=201 / n)


def test_it_sees_words_in_the_right_place_as_often_as_the_pages_say(world):
    """Within two of 200 scenes."""
    pages = [(ROOT / "docs" / name).read_text() for name in ("tutorial.md", "products.md")]
    text = " ".join(" ".join(pages).split())
    said = re.findall(r"([\d.]+) % (?:are right|of drawn objects)", text)
    model, tokenizer, _ = evaluation.load(TINY)
    shards = data.expand([f"{world}/val-*.tar"])
    pairs = data.Pairs(shards, tokenizer, model.config.image_size)
    pictures = [words.read_scene(pairs, row) for row in pairs.index[:200].tolist()]

    score = words.localisation(model, pictures, words.default_window(model))

    assert len(said) == 2
    assert [*map(float, said)] == pytest.approx(2 * [100 * score["value"]], abs=1.01)


def test_the_readmes_first_command_draws_scenes_and_the_words_that_it_sees(tmp_path, capsys):
    """A line is "caption: word probability, word probability ...", and most words are right."""
    argv = ["--checkpoint", str(TINY), "--device", "cpu", "--out", str(tmp_path / "words.png")]

    words.main(argv)

    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line]
    right = [word.split()[0] in caption for caption, said in lines for word in said.split(", ")[:4]]
    assert len(right) >= 12
    assert sum(right) / len(right) > 0.8
    assert Image.open(tmp_path / "words.png").width > 500
