"""docs/demo.py: what its page computes in JavaScript is what PyTorch computes."""

import base64
import json
import random
import re

import pytest
import torch
from material import run
from oracle import make_random_model

import data
import eval as evaluation
import scenes
from checkpoint import write_checkpoint
from docs import demo
from scripts.words import word_maps
from superclip import PRESETS
from tokenizer import Tokenizer

TOKENIZER = Tokenizer(scenes.vocabulary(), 16)
# The tiny model, but narrow, because the browser computes in JavaScript
NARROW = dict(vision_width=32, vision_heads=2, text_width=32, text_heads=2, embed_dim=32)
SHAPE = PRESETS["tiny"] | NARROW | dict(vision_layers=2, vocab_size=TOKENIZER.vocab_size)
LOOKS = [*zip(scenes.COLOURS, scenes.SHAPES)]
SCENE = scenes.make_scene(random.Random(0), LOOKS)


def unpacked(packed):
    """What demo.quantise makes -> rows of numbers."""
    int8, scale = (bytearray(base64.b64decode(packed[key])) for key in ("int8", "scale"))
    scale = torch.frombuffer(scale, dtype=torch.float32)[:, None]
    rows = torch.frombuffer(int8, dtype=torch.int8).view(len(scale), -1)
    return rows * scale


def are_near(numbers, tensor):
    """Is each number of a page that of the tensor, up to rounding?"""
    numbers = torch.tensor(numbers, dtype=tensor.dtype)
    return numbers.shape == tensor.shape and (numbers - tensor).abs().max() <= 1e-3


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """Opens the page of two models with random weights. Returns the browser and the model with a
    head, with the rounded weights that the page carries."""
    folder = tmp_path_factory.mktemp("demo")
    header = {"arguments": dict(seed=3, learning_rate=1e-4, batch_size=8)}
    clip, superclip = (make_random_model(**SHAPE, cls_weight=weight) for weight in (0, 1))
    for name, model in (("clip.pt", clip), ("superclip.pt", superclip)):
        facts = {"header": header, "step": 100}
        write_checkpoint(folder / name, model, TOKENIZER.vocab, **facts)
    page = folder / "demo.html"
    run(demo.main, folder / "clip.pt", folder / "superclip.pt", "--out", page)
    content = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text())
    for name, packed in json.loads(content[1])["models"][1]["weights"].items():
        parameter = superclip.get_parameter(name)
        parameter.data = unpacked(packed).view(parameter.shape)
    browser.get(page.as_uri())
    return browser, superclip


def test_a_weight_loses_half_a_step_at_most():
    weights = torch.randn(7, 3)

    rows = unpacked(demo.quantise(weights))

    step = weights.abs().amax(dim=1, keepdim=True) / 127
    assert ((rows - weights).abs() <= step / 2 + 1e-6).all()


@pytest.mark.parametrize("i", range(8))
def test_the_browser_draws_a_scene(opened, i):
    scene = scenes.make_scene(random.Random(i), [LOOKS[i]], 1)
    scene["pattern"] = scenes.PATTERNS[i % 4]

    canvas = opened[0].execute_script("return [...draw(arguments[0]).data]", scene)

    python = torch.tensor([*scenes.draw(scene).convert("RGBA").tobytes()])
    assert (torch.tensor(canvas).double() - python).abs().mean() <= 2  # of 255


def test_the_browser_compares_a_picture_with_the_texts(opened):
    browser, model = opened

    script = "return [answer(models[1], arguments[0]).best, [...draw(arguments[0]).data]]"
    best, pixels = browser.execute_script(script, SCENE)

    image = torch.tensor(pixels, dtype=torch.uint8).view(1, 72, 72, 4)[..., :3].movedim(3, 1)
    texts = evaluation.zeroshot_classifier(model, TOKENIZER, demo.NAMES, [demo.PROMPT])
    logits = model.logit_scale.exp() * model.encode_image(image) @ texts.T
    found = {one["text"]: one["p"] for one in best}
    assert are_near([found[name] for name in demo.NAMES], logits.softmax(dim=1)[0])
    has_head = "return models.map((model) => Boolean(model.head))"
    assert browser.execute_script(has_head) == [False, True]


def test_the_browser_computes_words_and_their_maps(opened):
    browser, model = opened
    picture = scenes.draw(SCENE)
    pixels = [*picture.convert("RGBA").tobytes()]
    image = data.load_image(picture, 72)
    ids = [520, 530]

    logits = browser.execute_script("return [...models[1].classLogits(arguments[0])]", pixels)
    script = "wordMaps(models[1], arguments[0], arguments[1], () => false).then(arguments[2])"
    maps = browser.execute_async_script(script, pixels, ids)

    assert are_near(logits, model.class_logits(image[None])[0])
    assert are_near(maps, word_maps(model, image, ids, window=2)[1])


def test_a_reader_guesses_and_composes_a_scene(opened):
    """Without an error of JavaScript, and without another file. Who presses an object takes it
    away, whatever the next one is."""
    browser, _ = opened

    for button in browser.find_elements("css selector", "#choose button"):
        button.click()
        browser.find_element("css selector", "#guesses button").click()
        browser.find_element("css selector", "#shown button").click()
    cell = browser.find_element("css selector", "#cells button")
    for caption in ("a red circle on dotted brown with mint", "dotted brown with mint"):
        cell.send_keys("\ue007")  # Enter
        assert browser.find_element("id", "caption").text == caption
        browser.find_element("id", "colour").send_keys("blue")

    assert browser.find_elements("css selector", "a:not([href^='#'])") == []
    assert browser.get_log("browser") == []
