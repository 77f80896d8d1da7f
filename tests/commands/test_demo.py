"""scripts/demo.py: two models that answer in a browser, as they do in PyTorch."""

import base64
import random
from functools import partial

import pytest
import torch
from material import numbers_of, requests_of, run, same, small

import data
import eval as evaluation
from scripts import demo, scenes
from superclip import PRESETS

TOKENIZER = data.Tokenizer(scenes.vocabulary(), 16)
TEXTS = ["a photo of a red star", "A zebra-crossing, striped NAVY!", "purple " * 30, ""]
OPTIONS = dict(seed=3, learning_rate=1e-4, batch_size=8, samples=800)
SHAPE = PRESETS["tiny"] | {"vision_layers": 2, "vocab_size": TOKENIZER.vocab_size}
LOOKS = [*zip(scenes.COLOURS, scenes.SHAPES)]
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two models with random weights, whose checkpoints 0.pt and 1.pt lie beside it."""
    torch.manual_seed(0)
    page = tmp_path_factory.mktemp("demo") / "demo.html"
    paths = [page.with_name(name) for name in ("0.pt", "1.pt")]
    for cls_weight, path in enumerate(paths):
        model = small(**SHAPE, cls_weight=cls_weight)
        evaluation.write_checkpoint(path, model, TOKENIZER.vocab, arguments=OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SCENES", 20)  # to be scored on
        assert run(demo.main, *paths[::-1], "--out", page) == 2  # CLIP comes first
        assert not run(demo.main, *paths, "--out", page)
    return page


def models_of(page):
    """The models in PyTorch, with the weights that the page carries."""
    for m, content in enumerate(numbers_of(page)["models"]):
        model, _, _ = evaluation.load(page.with_name(f"{m}.pt"))
        for name, packed in content["weights"].items():
            int8, scale = (bytearray(base64.b64decode(packed[key])) for key in ("int8", "scale"))
            scale = torch.frombuffer(scale, dtype=torch.float32)[:, None]
            rows = torch.frombuffer(int8, dtype=torch.int8).view(len(scale), -1) * scale
            old = model.get_parameter(name)
            # A number loses half a step at most, and one of a vector nothing.
            assert ((rows - old.view(rows.shape)).abs() <= scale / 2 * (old.ndim > 1) + 1e-6).all()
            old.copy_(rows.view(old.shape))
        yield model


def test_the_browser_computes_what_python_does(browser, page):
    browser.get(page.as_uri())
    ask, picture = browser.execute_script, scenes.draw(scenes.make_scene(random.Random(0), LOOKS))
    pixels, image = [*picture.convert("RGBA").tobytes()], data.load_image(picture, 72)[None]
    for m, model in enumerate(models_of(page)):
        feature = ask("return [...models[arguments[0]].encodeImage(arguments[1])]", m, pixels)
        assert same(feature, model.encode_image(image)[0])
        for text in TEXTS:
            tokens = ask("return tokenizer.encode(arguments[0], 16)", text)
            assert tokens == TOKENIZER([text])[0, : len(tokens)].tolist()
            feature = ask("return [...models[arguments[0]].encodeText(arguments[1])]", m, tokens)
            assert same(feature, model.encode_text(torch.tensor([tokens]))[0])
    logits = ask("return [...models[1].classLogits(arguments[0])]", pixels)
    assert same(logits, model.class_logits(image)[0])
    script = "wordMaps(models[1], arguments[0], arguments[1], () => false).then(arguments[2])"
    _, maps = evaluation.word_maps(model, image[0], [520, 530], window=2)
    assert same(browser.execute_async_script(script, pixels, [520, 530]), maps)
    for i, look in enumerate(LOOKS):
        scene = scenes.make_scene(random.Random(i), [look], 1)
        scene |= {"pattern": scenes.PATTERNS[i % 4], "cloth": [*scenes.CLOTHS][i]}
        canvas = torch.tensor(ask("return [...draw(arguments[0]).data]", scene)).double()
        python = torch.tensor([*scenes.draw(scene).convert("RGBA").tobytes()])
        assert (canvas - python).abs().mean() <= 2  # of 255


def test_a_reader_composes_a_scene_and_guesses(browser, page):
    browser.implicitly_wait(60)  # for an element that is not there yet
    browser.get(page.as_uri())
    find, ask = partial(browser.find_element, "css selector"), browser.execute_script
    for chip in ("blue", "ring"):
        find(f"input[value={chip}]").click()
    find("#cells button").send_keys("\ue007")  # Enter
    assert find("#caption").text == "a blue ring and a red star on striped navy with gold"
    pixels = torch.tensor(ask("return [...draw(state.scene).data]"), dtype=torch.uint8)
    texts = [demo.PROMPT.replace("{}", " ".join(look)) for look in scenes.COMBINATIONS]
    for m, model in enumerate(models_of(page)):
        image = model.encode_image(pixels.view(1, 72, 72, 4)[..., :3].movedim(3, 1))
        logits = model.logit_scale.exp() * image @ model.encode_text(TOKENIZER(texts)).T
        best = logits.softmax(dim=1).topk(5).values[0]
        bars = find(f"#columns > :nth-child({m + 1}) ol").find_elements("css selector", "b")
        assert same([float(bar.text.split()[0]) for bar in bars], 100 * best, 0.06)
    find("#captions input").send_keys(" zebra")
    browser.find_element("xpath", "//p[contains(text(), ': zebra')]")  # the vocabulary lacks it
    ask("document.querySelector('#columns .words button').focus()")
    find("#map:not([hidden])")
    for question in browser.find_elements("css selector", "#choose button"):
        question.click()
        assert not find("#columns").is_displayed() and find("#outcome").text == ""
        find("#guesses button").click()
        assert find("#columns").is_displayed() and "chance" in find("#outcome").text
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    assert ask("return document.documentElement.scrollWidth") <= PHONE["width"]
    assert requests_of(browser) == {page.as_uri()} and browser.get_log("browser") == []
