"""docs/demo.html: what the page computes in JavaScript is what PyTorch computes."""

import base64
import json
import random
import re

import torch
from children import ROOT

import eval as evaluation
import scenes
from superclip import SuperCLIP, SuperCLIPConfig
from tokenizer import Tokenizer

PAGE = ROOT / "docs" / "demo.html"
NAMES = [" ".join(look) for look in scenes.COMBINATIONS]


def model_in(page):
    """The SuperCLIP that a page carries. Weights are int8 * scale, with a scale for each row."""
    [text] = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page)
    content = json.loads(text)["models"][1]
    model = SuperCLIP(SuperCLIPConfig(**content["config"])).eval()
    for name, packed in content["weights"].items():
        int8, scale = (bytearray(base64.b64decode(packed[key])) for key in ("int8", "scale"))
        scale = torch.frombuffer(scale, dtype=torch.float32)[:, None]
        rows = torch.frombuffer(int8, dtype=torch.int8).view(len(scale), -1) * scale
        parameter = model.get_parameter(name)
        parameter.data = rows.view(parameter.shape)
    return model


def assert_near(numbers, tensor):
    torch.testing.assert_close(torch.tensor(numbers), tensor, rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_browser_draws_and_answers_as_python_does(browser):
    """And a reader can guess and compose a scene, without an error of JavaScript."""
    model = model_in(PAGE.read_text())
    scene = scenes.make_scene(random.Random(0), [("red", "star"), ("blue", "ring")])
    browser.get(PAGE.as_uri())

    script = "return [answer(models[1], arguments[0]).best, [...draw(arguments[0]).data]]"
    best, pixels = browser.execute_script(script, scene)
    script = "return [...models[1].classLogits(models[1].visualTokens(arguments[0]))]"
    logits = browser.execute_script(script, pixels)

    drawn = torch.tensor([*scenes.draw(scene).convert("RGBA").tobytes()])
    assert (torch.tensor(pixels).double() - drawn).abs().mean() <= 2  # of 255
    image = torch.tensor(pixels, dtype=torch.uint8).view(1, 72, 72, 4)[..., :3].movedim(3, 1)
    tokenizer = Tokenizer(scenes.vocabulary())
    texts = evaluation.zeroshot_classifier(model, tokenizer, NAMES, ["a photo of a {}"])
    similarity = model.logit_scale.exp() * model.encode_image(image) @ texts.T
    found = {one["text"]: one["p"] for one in best}
    assert_near([found[name] for name in NAMES], similarity.softmax(dim=1)[0])
    assert_near(logits, model.class_logits(image)[0])

    for button in browser.find_elements("css selector", "#choose button"):
        button.click()
        browser.find_element("css selector", "#guesses button").click()
        browser.find_element("css selector", "#shown button").click()
    browser.find_element("css selector", "#cells button").send_keys("\ue007")  # Enter
    assert browser.find_element("id", "caption").text == "a red circle on dotted brown with mint"
    assert browser.get_log("browser") == []
