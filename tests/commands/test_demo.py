"""docs/demo.py: two models that answer in a browser, as they do in PyTorch."""

import base64
import random

import pytest
import torch
from material import run
from oracle import make_random_model
from webpage import are_near, numbers_of, requests_of

import data
import eval as evaluation
from docs import demo
from scripts import scenes
from scripts.words import word_maps
from superclip import PRESETS

TOKENIZER = data.Tokenizer(scenes.vocabulary(), 16)
TEXTS = ["a photo of a red star", "A zebra-crossing, striped NAVY!", "purple " * 30, ""]
OPTIONS = dict(seed=3, learning_rate=1e-4, batch_size=8)
# The tiny model, but narrow, because the browser computes in JavaScript
NARROW = dict(vision_width=32, vision_heads=2, text_width=32, text_heads=2, embed_dim=32)
SHAPE = PRESETS["tiny"] | NARROW | dict(vision_layers=2, vocab_size=TOKENIZER.vocab_size)
LOOKS = [*zip(scenes.COLOURS, scenes.SHAPES)]
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
MODELS = {"CLIP": 0, "SuperCLIP": 1}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Those of two models with random weights, CLIP and SuperCLIP."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("demo")
    paths = [folder / "clip.pt", folder / "superclip.pt"]
    for cls_weight, path in enumerate(paths):
        model = make_random_model(**SHAPE, cls_weight=cls_weight)
        evaluation.write_checkpoint(
            path, model, TOKENIZER.vocab, header={"arguments": OPTIONS}, step=100
        )
    return paths


@pytest.fixture(scope="module", autouse=True)
def few_scenes():
    """Scores are of 20 scenes each, because 500 take long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SCENES", 20)
        yield


@pytest.fixture(scope="module")
def page(checkpoints):
    path = checkpoints[0].with_name("demo.html")
    assert not run(demo.main, *checkpoints, "--out", path)
    return path


@pytest.fixture(scope="module")
def models(page, checkpoints):
    """The models in PyTorch, with the weights that the page carries."""
    models = []
    for path, content in zip(checkpoints, numbers_of(page)["models"]):
        model, _, _ = evaluation.load(path)
        for name, packed in content["weights"].items():
            parameter = model.get_parameter(name)
            parameter.copy_(unpacked(packed)[0].view(parameter.shape))
        models.append(model)
    return models


def unpacked(packed):
    """What demo.quantise makes -> the rows of numbers, and the scale of each row."""
    int8, scale = (bytearray(base64.b64decode(packed[key])) for key in ("int8", "scale"))
    scale = torch.frombuffer(scale, dtype=torch.float32)[:, None]
    rows = torch.frombuffer(int8, dtype=torch.int8).view(len(scale), -1)
    return rows * scale, scale


@pytest.fixture(scope="module")
def opened(browser, page):
    """A browser that shows the page."""
    browser.implicitly_wait(60)  # for an element that is not there yet
    browser.get(page.as_uri())
    return browser


@pytest.fixture
def reloaded(opened, page):
    """The same at its beginning, whatever other tests have clicked at."""
    opened.get(page.as_uri())
    return opened


def find(browser, selector):
    return browser.find_element("css selector", selector)


# ---- What the page carries


@pytest.mark.parametrize("shape", [(), (5,), (7, 3), (4, 3, 2, 2)], ids=str)
def test_a_weight_loses_half_a_step_at_most_and_a_vector_nothing(shape):
    tensor = torch.randn(shape)

    rows, scale = unpacked(demo.quantise(tensor))

    error = (rows - tensor.reshape(rows.shape)).abs()
    if tensor.ndim > 1:
        assert (error <= scale / 2 + 1e-6).all()
    else:
        assert error.max() <= 1e-6


def test_plain_clip_comes_first(checkpoints, tmp_path):
    clip, superclip = checkpoints

    assert run(demo.main, superclip, clip, "--out", tmp_path / "demo.html") == 2


@pytest.mark.parametrize("k", [1, 2, 3])
def test_objects_of_a_scene_differ_in_colour_and_shape(k):
    scene = demo.draw_objects(random.Random(0), scenes.COMBINATIONS, k)

    for kind in ("colour", "shape", "box"):
        assert len({str(thing[kind]) for thing in scene["objects"]}) == k


# ---- The browser computes what Python does


@pytest.mark.parametrize("m", MODELS.values(), ids=MODELS)
def test_the_browser_encodes_a_picture(opened, models, m):
    picture = scenes.draw(scenes.make_scene(random.Random(0), LOOKS))
    pixels = [*picture.convert("RGBA").tobytes()]

    script = "return [...models[arguments[0]].encodeImage(arguments[1])]"
    feature = opened.execute_script(script, m, pixels)

    assert are_near(feature, models[m].encode_image(data.load_image(picture, 72)[None])[0])


@pytest.mark.parametrize("text", TEXTS)
def test_the_browser_reads_a_text(opened, models, text):
    tokens = opened.execute_script("return tokenizer.encode(arguments[0], 16)", text)

    assert tokens == TOKENIZER([text])[0, : len(tokens)].tolist()
    for m, model in enumerate(models):
        script = "return [...models[arguments[0]].encodeText(arguments[1])]"
        feature = opened.execute_script(script, m, tokens)
        assert are_near(feature, model.encode_text(torch.tensor([tokens]))[0])


def test_the_browser_computes_words_and_their_maps(opened, models):
    picture = scenes.draw(scenes.make_scene(random.Random(0), LOOKS))
    pixels = [*picture.convert("RGBA").tobytes()]
    image = data.load_image(picture, 72)
    ids = [520, 530]

    logits = opened.execute_script("return [...models[1].classLogits(arguments[0])]", pixels)
    script = "wordMaps(models[1], arguments[0], arguments[1], () => false).then(arguments[2])"
    maps = opened.execute_async_script(script, pixels, ids)

    assert are_near(logits, models[1].class_logits(image[None])[0])
    assert are_near(maps, word_maps(models[1], image, ids, window=2)[1])


@pytest.mark.parametrize("i", range(len(LOOKS)), ids=[" ".join(look) for look in LOOKS])
def test_the_browser_draws_a_scene(opened, i):
    scene = scenes.make_scene(random.Random(i), [LOOKS[i]], 1)
    scene["pattern"] = scenes.PATTERNS[i % 4]
    scene["cloth"] = [*scenes.CLOTHS][i]

    canvas = opened.execute_script("return [...draw(arguments[0]).data]", scene)

    python = torch.tensor([*scenes.draw(scene).convert("RGBA").tobytes()])
    assert (torch.tensor(canvas).double() - python).abs().mean() <= 2  # of 255


# ---- A reader


def test_the_page_asks_for_nothing_and_has_no_error(reloaded, page):
    assert requests_of(reloaded) == {page.as_uri()}
    assert reloaded.get_log("browser") == []


def test_a_reader_composes_a_scene_and_both_models_answer(reloaded, models):
    for chip in ("blue", "ring"):
        find(reloaded, f"input[value={chip}]").click()

    find(reloaded, "#cells button").send_keys("\ue007")  # Enter

    caption = find(reloaded, "#caption").text
    assert caption == "a blue ring and a purple heart on dotted maroon with sky"
    pixels = reloaded.execute_script("return [...draw(state.scene).data]")
    image = torch.tensor(pixels, dtype=torch.uint8).view(1, 72, 72, 4)[..., :3].movedim(3, 1)
    texts = [demo.PROMPT.replace("{}", " ".join(look)) for look in scenes.COMBINATIONS]
    for m, model in enumerate(models):
        similarity = model.encode_image(image) @ model.encode_text(TOKENIZER(texts)).T
        best = (model.logit_scale.exp() * similarity).softmax(dim=1).topk(5).values[0]
        bars = find(reloaded, f"#columns > :nth-child({m + 1}) ol").find_elements(
            "css selector", "b"
        )
        assert are_near([float(bar.text.split()[0]) for bar in bars], 100 * best, 0.06)


def test_a_word_that_the_vocabulary_lacks_is_named(reloaded):
    find(reloaded, "#captions input").send_keys(" zebra")

    assert reloaded.find_element("xpath", "//p[contains(text(), ': zebra')]")


def test_a_word_of_the_head_shows_its_map(reloaded):
    find(reloaded, "#columns .words button")  # wait for it

    reloaded.execute_script("document.querySelector('#columns .words button').focus()")

    assert find(reloaded, "#map:not([hidden])")


@pytest.mark.parametrize("number", range(6))
def test_the_answers_to_a_question_wait_for_a_guess(opened, number):
    opened.find_elements("css selector", "#choose button")[number].click()
    assert not find(opened, "#columns").is_displayed()
    assert find(opened, "#outcome").text == ""

    find(opened, "#guesses button").click()

    assert find(opened, "#columns").is_displayed()
    assert "chance" in find(opened, "#outcome").text


def test_no_question_is_answered_before_it_is_asked(reloaded):
    """The scene with which the page begins is in no question."""
    script = "return QUESTIONS.flatMap((question) => question.scenes.map(describe))"

    assert find(reloaded, "#caption").text not in reloaded.execute_script(script)


def test_the_page_fits_a_phone(opened):
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)

    width = opened.execute_script("return document.documentElement.scrollWidth")
    assert width <= PHONE["width"]
