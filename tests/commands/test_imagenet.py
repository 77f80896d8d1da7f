"""eval.py zeroshot on ImageNet: the names of its classes and CLIP's prompts come from open_clip."""

import json

import numpy as np
import open_clip
import pytest
from material import COLOURS, make_model, png, write_checkpoint

import data
import eval as evaluation


@pytest.fixture
def imagenet(tmp_path):
    """A folder for each of the 1,000 classes, in the order of their WordNet numbers. The first, a
    tench, and the last, toilet paper, have a picture."""
    for number in range(1000):
        (tmp_path / "images" / f"n{number:08d}").mkdir(parents=True)
    for number in (0, 999):
        picture = png(COLOURS["red"], np.random.default_rng(number))
        (tmp_path / "images" / f"n{number:08d}" / "0.png").write_bytes(picture)
    return tmp_path / "images"


def test_the_classes_of_imagenet_have_open_clips_names(imagenet, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model.pt", make_model())
    options = f"--checkpoint {checkpoint} --images {imagenet} --classes imagenet"
    options += f" --workers 0 --device cpu --json {tmp_path}/scores.json"

    evaluation.main(["zeroshot", *options.split()])

    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [part["name"] for part in scores["per_class"]] == ["tench", "toilet paper"]
    assert scores["top1"]["chance"] == pytest.approx(1 / 1000)


def test_the_prompts_openai_are_open_clips_80(folders, tmp_path):
    """Of a model whose vocabulary has their words. Prompts with other words would be left out."""
    expected = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    words = data.WORD.findall(data.clean(" ".join(expected)))
    tokenizer = data.Tokenizer(data.words_to_tiktoken(words))
    model = make_model(vocab_size=tokenizer.vocab_size)
    checkpoint = write_checkpoint(tmp_path / "model.pt", model, tokenizer.vocab)
    options = f"--checkpoint {checkpoint} --images {folders} --templates openai"
    options += f" --workers 0 --device cpu --json {tmp_path}/scores.json"

    evaluation.main(["zeroshot", *options.split()])

    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["templates"] == expected
