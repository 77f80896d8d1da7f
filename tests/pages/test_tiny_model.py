"""Test that assets/tiny.pt, the model in the repository, sees in new scenes what the pages say."""

import random
from pathlib import Path

from children import ROOT
from PIL import Image

import data
import eval as evaluation
from common import scenes
from scripts import words

TINY = ROOT / "assets" / "tiny.pt"
KINDS = ("colour", "shape")


def test_it_says_the_right_words_of_new_scenes(tmp_path, capsys):
    """The command prints lines such as "FILE: word probability, word probability ...". The name of
    a file is its caption. Over all lines, more than 80 % of the first four words are right."""
    for _, scene, _, caption in scenes.make_samples("val", range(4)):
        scenes.draw(scene).save(tmp_path / f"{caption}.png")
    argv = f"--checkpoint {TINY} --out {tmp_path}/words.png --device cpu --images {tmp_path}"

    words.main(argv.split())

    *lines, _, _ = capsys.readouterr().out.splitlines()  # the last two name the picture
    right = 0
    for line in lines:
        file, said = line.split(": ")
        true = Path(file).stem.strip(".").split()
        right += sum(word.split()[0] in true for word in said.split(", ")[:4])
    assert len(lines) == 4
    assert right > 0.8 * 16
    assert Image.open(tmp_path / "words.png").width > 500


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
