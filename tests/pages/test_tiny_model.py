"""Test where assets/tiny.pt, the model in the repository, sees the words of new scenes."""

import random

from children import ROOT

import data
import eval as evaluation
from common import scenes
from scripts import words

TINY = ROOT / "assets" / "tiny.pt"
KINDS = ("colour", "shape")


def test_the_map_of_a_word_is_reddest_on_its_object():
    """The map is highest inside the box of the object for at least nine in ten words. The words are
    the colours and shapes in a hundred scenes. The tutorial gives the number that this test
    prints."""
    model, tokenizer, _ = evaluation.load(TINY)
    grid = model.visual.grid
    right = []
    for i in range(100):
        scene = scenes.make_scene(random.Random(f"place {i}"), scenes.COMBINATIONS)
        image = data.load_image(scenes.draw(scene), model.config.image_size)
        names = [(thing[kind], thing["box"]) for thing in scene["objects"] for kind in KINDS]
        ids = [tokenizer.encode(name)[0] for name, _ in names]
        maps = words.word_maps(model, image, ids, words.default_window(model))
        for patch, (_, box) in zip(maps.flatten(1).argmax(dim=1).tolist(), names):
            y, x = ((place + 0.5) / grid for place in divmod(patch, grid))
            right.append(box[0] < x < box[2] and box[1] < y < box[3])

    print(f"{sum(right)} of {len(right)} words")
    assert sum(right) >= 0.9 * len(right)
