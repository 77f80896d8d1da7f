"""Test docs/demo.py and its page. The page computes in JavaScript what PyTorch computes."""

import random

import torch
from material import run
from oracle import make_random_model

import eval as evaluation
from common import scenes
from common.checkpoint import write_checkpoint
from common.tokenizer import Tokenizer
from docs import demo
from scripts.words import word_maps
from superclip import PRESETS

TOKENIZER = Tokenizer(scenes.vocabulary(), 16)
# The model is narrower than the tiny model, because the browser computes in JavaScript.
NARROW = dict(vision_width=32, vision_heads=2, text_width=32, text_heads=2, embed_dim=32)
NAMES = [" ".join(look) for look in scenes.COMBINATIONS]
SHAPE = PRESETS["tiny"] | NARROW | dict(vision_layers=2, vocab_size=TOKENIZER.vocab_size)


@torch.no_grad()
def write_page(folder):
    """Return the page of two models with random weights, and the second model. The weights are
    rounded, so that the page keeps them exactly."""
    header = {"arguments": dict(seed=3, learning_rate=1e-4, batch_size=8)}
    for name, weight in (("clip.pt", 0), ("superclip.pt", 1)):
        model = make_random_model(**SHAPE, cls_weight=weight)
        for p in model.parameters():
            int8, scale = demo.int8_rows(p)
            p.copy_((int8 * scale[:, None]).view(p.shape))
        write_checkpoint(folder / name, model, TOKENIZER.vocab, header=header, step=100)
    page = folder / "demo.html"
    assert not run(demo.main, folder / "clip.pt", folder / "superclip.pt", "--out", page)
    return page, model


def assert_near(numbers, tensor):
    torch.testing.assert_close(torch.tensor(numbers), tensor, rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_browser_draws_and_answers_as_python_does(browser, tmp_path):
    """A reader can also guess and compose a scene, and the browser logs no error."""
    page, model = write_page(tmp_path)
    scene = scenes.make_scene(random.Random(0), [("red", "star"), ("blue", "ring")])
    browser.get(page.as_uri())

    script = "return [answer(models[1], arguments[0]).best, [...draw(arguments[0]).data]]"
    best, pixels = browser.execute_script(script, scene)
    logits = browser.execute_script("return [...models[1].classLogits(arguments[0])]", pixels)
    script = "wordMaps(models[1], arguments[0], [520], () => false).then(arguments[1])"
    maps = browser.execute_async_script(script, pixels)

    drawn = torch.tensor([*scenes.draw(scene).convert("RGBA").tobytes()])
    assert (torch.tensor(pixels).double() - drawn).abs().mean() <= 2  # out of 255 levels
    image = torch.tensor(pixels, dtype=torch.uint8).view(1, 72, 72, 4)[..., :3].movedim(3, 1)
    texts = evaluation.zeroshot_classifier(model, TOKENIZER, NAMES, ["a photo of a {}"])
    similarity = model.logit_scale.exp() * model.encode_image(image) @ texts.T
    found = {one["text"]: one["p"] for one in best}
    assert_near([found[name] for name in NAMES], similarity.softmax(dim=1)[0])
    assert_near(logits, model.word_logits(image)[0])
    assert_near(maps, word_maps(model, image[0], [520], window=2)[1])

    for button in browser.find_elements("css selector", "#choose button"):
        button.click()
        browser.find_element("css selector", "#guesses button").click()
        browser.find_element("css selector", "#shown button").click()
    browser.find_element("css selector", "#cells button").send_keys("\ue007")  # Enter
    assert browser.find_element("id", "caption").text == "a red circle on dotted brown with mint"
    assert browser.get_log("browser") == []
