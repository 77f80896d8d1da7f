"""The model in the repository, assets/tiny.pt, loads and is the one of the README's numbers."""

import random
import re
from pathlib import Path

import pytest
from PIL import Image

import data
import eval as evaluation
import train
from scripts import scenes, words

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
TINY = ROOT / "assets" / "tiny.pt"


@pytest.fixture(scope="module")
def held_out():
    """The pictures of scenes/zeroshot/held_out: pairs of an image and the number of its class."""
    names = [*map(" ".join, scenes.COMBINATIONS)]
    pictures = []
    for look in scenes.HELD_OUT:
        name = " ".join(look)
        for i in range(40):
            scene = scenes.make_scene(random.Random(f"held_out {name} {i}"), [look], count=1)
            image = data.load_image(scenes.jpeg(scene), scenes.SIZE)
            pictures.append((image, names.index(name)))
    return pictures


def test_it_names_what_training_never_showed_as_often_as_the_readme_says(held_out):
    """Within two pictures, because another CPU rounds otherwise."""
    stated = re.search(r"held_out +([\d.]+) % +chance +1.56 % .+ n 320\n", README)
    model, tokenizer, _ = evaluation.load(TINY)
    names = [*map(" ".join, scenes.COMBINATIONS)]

    score = evaluation.zeroshot(model, tokenizer, held_out, names, workers=0)["top1"]

    assert score["n"] == 320
    assert 100 * score["value"] == pytest.approx(float(stated[1]), abs=0.63)


def test_the_readmes_first_command_draws_scenes_and_the_words_that_it_sees(tmp_path, capsys):
    """A line is "caption: word probability, word probability ...", and most words are right."""
    argv = ["--checkpoint", str(TINY), "--device", "cpu", "--out", str(tmp_path / "words.png")]

    words.main(argv)

    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines() if ": " in line]
    right = [word.split()[0] in caption for caption, said in lines for word in said.split(", ")[:4]]
    assert len(right) >= 12
    assert sum(right) / len(right) > 0.8
    assert Image.open(tmp_path / "words.png").width > 500
