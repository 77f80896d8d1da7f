"""scripts/report.py: the numbers of the page, and the page itself in a real browser.

The browser tests need Chromium, its driver and the package selenium, and skip without them.
"""

import io
import json
import math
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from material import (
    COLOURS,
    TOKENIZER,
    error_of,
    make_model,
    png,
    run,
    write_checkpoint,
    write_shard,
)
from PIL import Image

import data
import eval as evaluation
from scripts import report
from superclip import classification_loss, contrastive_loss

HOSTILE = '</script><b id="x">a red</b> square <!-- <script> &lt; "\' \u2028'
CAPTIONS = [HOSTILE, *(f"a {c} {shape}" for c in COLOURS for shape in ("square", "ring", "thing"))]


@pytest.fixture(scope="module")
def model():
    """Random weights, and the token counts of the captions."""
    model = make_model(cls_weight=0.5)
    model.count_tokens(TOKENIZER(CAPTIONS))
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    colours = (COLOURS[re.search("|".join(COLOURS), caption)[0]] for caption in CAPTIONS)
    pictures = (png(colour, np.random.default_rng(i)) for i, colour in enumerate(colours))
    samples = [{"png": p, "txt": c.encode()} for p, c in zip(pictures, CAPTIONS)]
    path = write_shard(tmp_path_factory.mktemp("report") / "val.tar", samples)
    return data.Pairs([str(path)], TOKENIZER, 16)


def score(value):
    return {"value": value, "chance": 0.1, "n": 10, "interval": [value / 2, value]}


def write_log(path, model, rows, **changes):
    header = {"arguments": {"model": "tiny", "batch_size": 4}, "config": asdict(model.config)}
    header |= {"parameters": 1000, "samples": 40, "steps": 30, "device": "a machine", "torch": "2"}
    header |= {"dtype": "float32", "commit": "abc", "date": "2026-01-01 00:00", **changes}
    path.write_text("\n".join([json.dumps({"header": header}), *map(json.dumps, rows)]) + "\n")
    return path


def training_row(step, loss, speed=8.0):
    row = {"step": step, "samples": 4 * step, "images_per_second": speed, "loss": 2 * loss}
    return {**row, "contrastive_loss": loss, "classification_loss": loss + 1}


def validation_row(step, value):
    part = {"R@1": score(value), "median_rank": 2.0}
    return {"step": step, "validation": {"image_to_text": part}, "mean_r1": value}


@pytest.fixture(scope="module")
def log(tmp_path_factory, model):
    """Of a run that was stopped after step 20 and resumed at step 10."""
    rows = [training_row(10, 2.5), training_row(20, 9.0), validation_row(20, 0.9)]
    rows += [training_row(20, 1.5, 4.0), validation_row(20, 0.4), training_row(30, 0.5)]
    final = {"retrieval": validation_row(30, 0.6)["validation"], "x/held_out": score(0.7)}
    rows += [validation_row(30, 0.6), {"step": 30, "final": final}]
    return write_log(tmp_path_factory.mktemp("log") / "log.jsonl", model, rows)


@pytest.fixture(scope="module")
def page(tmp_path_factory, model, pairs, log):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.write_report(model, TOKENIZER, pairs, log, path, reference_path=log)
    return path


@pytest.fixture(scope="module")
def clip_page(tmp_path_factory, pairs):
    """Of a plain CLIP model, without a log."""
    path = tmp_path_factory.mktemp("page") / "clip.html"
    report.write_report(make_model(cls_weight=0), TOKENIZER, pairs, None, path, n=5)
    return path


def numbers_of(page):
    text = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text(), re.S)
    return json.loads(text[1])


def pixels_of(pairs, i):
    return data.load_image(pairs.read(pairs.index[i].tolist(), data.IMAGE), pairs.image_size)


def same(numbers, tensor, tolerance):
    return torch.allclose(torch.tensor(numbers, dtype=tensor.dtype), tensor, atol=tolerance)


# ---- the numbers


def test_similarities_scores_and_searches_are_those_of_eval(page, model, pairs):
    content = numbers_of(page)
    images, texts, owner = evaluation.encode_shards(model, pairs)
    shown = [picture["number"] for picture in content["pictures"]]
    assert len(shown) == 12 and content["pairs"] == 13
    assert [content["images"][str(i)]["caption"] for i in shown] == [CAPTIONS[i] for i in shown]
    assert same(content["similarity"], images[shown] @ texts[shown].T, 1e-6)
    assert content["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
    result = evaluation.retrieval(images, texts, owner)["text_to_image"]
    assert content["recall"] == result["R@1"]
    for search in content["searches"]:
        right, row = search["caption"], texts[search["caption"]] @ images.T
        ids, values = zip(*search["found"])
        assert same(values, row[list(ids)], 1e-4)
        assert same(values[:5], row.sort(descending=True).values[:5], 1e-4)
        assert right in ids and len(ids) == 5 + (right not in ids[:5])
        assert search["place"] == 1 + (row > row[right] + 1e-6).sum()  # less is a tie


def test_searches_show_right_and_wrong_ones_and_skip_ties():
    similarity = torch.eye(9)
    similarity[7, 2], similarity[8] = 2.0, 0.5  # one caption finds another's picture, one ties
    found = report.searches(similarity)
    assert [(s["caption"], s["place"]) for s in found] == [(0, 1), (2, 1), (4, 1), (7, 2)]
    assert found[3]["found"][:2] == [[2, 2.0], [7, 1.0]]
    similarity[7] = torch.arange(9.0, 0, -1)  # the right one is not among the best five
    assert report.searches(similarity)[3]["found"][-2:] == [[4, 5.0], [7, 2.0]]


def test_words_and_maps_are_those_of_eval(page, model, pairs):
    for picture in numbers_of(page)["pictures"]:
        image = pixels_of(pairs, picture["number"])
        top = evaluation.top_words(model, TOKENIZER, image[None], 8)[0]
        maps = evaluation.word_maps(model, image, [i for _, _, i in top], window=1)[1]
        assert [w["word"] for w in picture["words"]] == [word for word, _, _ in top]
        assert [w["probability"] for w in picture["words"]] == [p for _, p, _ in top]
        assert same([w["map"] for w in picture["words"]], maps, 1e-3)
        ids = TOKENIZER.encode(CAPTIONS[picture["number"]])
        assert [w["said"] for w in picture["words"]] == [i in ids for _, _, i in top]


def test_label_adds_up_to_the_word_loss_of_the_pair(page, model, pairs):
    for picture in numbers_of(page)["pictures"]:
        label, tokens = picture["label"], TOKENIZER([CAPTIONS[picture["number"]]])
        logits = model.class_logits(pixels_of(pairs, picture["number"])[None])
        expected = classification_loss(logits, tokens, model.token_weights())
        loss = -sum(part["share"] * part["log_probability"] for part in label)
        assert loss == pytest.approx(expected.item(), abs=1e-4)
        assert sum(part["share"] for part in label) == pytest.approx(1, abs=1e-4)
    first = numbers_of(page)["pictures"][1]["label"]
    assert [part["token"] for part in first] == ["a", "red", "square"]
    # 13 captions; "a" is in all of them, "red" in four
    assert first[0]["idf"] == 0 and first[1]["idf"] == pytest.approx(math.log(14 / 5), abs=1e-6)


def test_a_token_that_is_not_a_whole_word_has_a_hyphen(model):
    label = report.label_of(model, TOKENIZER, torch.zeros(3, 16, 16, dtype=torch.uint8), "red xy")
    assert [part["token"] for part in label] == ["red", "x-", "y"]


def test_a_log_is_read_as_the_resumed_run_left_it(log, model, tmp_path):
    content = report.read_log(log)
    assert content["losses"] == [[10, 2.5, 3.5], [20, 1.5, 2.5], [30, 0.5, 1.5]]
    assert content["validations"] == [(20, 0.4), (30, 0.6)]
    assert content["seconds"] == 40 / 8 + 40 / 4 + 40 / 8
    assert content["step"] == 30
    names = ["image to text R@1", "zero-shot held out"]
    assert content["scores"] == [{"name": n, **score(v)} for n, v in zip(names, (0.6, 0.7))]
    # A run that is not complete has no final scores; a killed one may have half a line.
    rows = [training_row(step, 1.0) for step in range(1, 1001)]
    path = write_log(tmp_path / "log.jsonl", model, [*rows, validation_row(1000, 0.3)])
    path.write_text(path.read_text() + '{"step": 1001, "lo')
    content = report.read_log(path)
    assert content["scores"] == [{"name": "image to text R@1", **score(0.3)}]
    assert len(content["losses"]) == report.POINTS + 1 and content["losses"][-1][0] == 1000


def test_the_reference_must_be_of_an_equal_model_and_as_many_pairs(tmp_path, model, log, page):
    assert numbers_of(page)["reference"]["losses"]
    run = report.read_log(log)
    for name, changes, expected in (
        ("same", {"device": "another"}, True),
        ("other pairs", {"samples": 41}, False),
        ("other model", {"config": {**asdict(model.config), "vocab_size": 7}}, False),
    ):
        other = report.read_log(write_log(tmp_path / name, model, [], **changes))
        assert report.comparable(run, other) == expected, name


def test_a_page_of_large_noisy_pictures_stays_under_three_megabytes(tmp_path):
    samples = []
    for i in range(48):  # twelve, and six searches that show six others each
        pixels, buffer = np.random.default_rng(i).bytes(3 * 224 * 224), io.BytesIO()
        Image.frombytes("RGB", (224, 224), pixels).save(buffer, "JPEG", quality=50)
        samples.append({"jpg": buffer.getvalue(), "txt": b"red %d" % i})
    path = write_shard(tmp_path / "noise.tar", samples)
    model = make_model(image_size=256, patch_size=64, cls_weight=0)
    pairs = data.Pairs([str(path)], TOKENIZER, 256)
    report.write_report(model, TOKENIZER, pairs, None, tmp_path / "big.html")
    size = (tmp_path / "big.html").stat().st_size
    assert 0.5e6 < size < 3e6


def test_text_has_contrast_enough_in_both_schemes():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    blocks = re.findall(r":root \{(.*?)\}", report.TEMPLATE.read_text(), re.S)
    assert len(blocks) == 2  # light and dark
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        pairs = [("ink", b) for b in ("paper", "panel", "hot")]
        pairs += [(text, "paper") for text in ("soft", "accent", "good", "bad")]
        for text, background in pairs:
            light = sorted(luminance(colours[name]) + 0.05 for name in (text, background))
            assert light[1] / light[0] >= 4.5, (text, background, colours)


def test_command_writes_a_page_and_says_so(tmp_path, model, pairs, log, capsys):
    checkpoint = write_checkpoint(tmp_path / "best.pt", model)
    shutil.copy(log, tmp_path / "log.jsonl")  # found by itself, beside the checkpoint
    argv = ["--checkpoint", checkpoint, "--data", pairs.shards[0], "--n", 3]
    assert not run(report.main, *argv, "--out", tmp_path / "page.html")
    assert f"wrote {tmp_path / 'page.html'}: 0.1 MB" in capsys.readouterr().out
    content = numbers_of(tmp_path / "page.html")
    assert len(content["pictures"]) == 3 and content["run"]["step"] == 30


def test_mistakes_are_one_sentence(tmp_path, model, pairs, capsys):
    checkpoint = write_checkpoint(tmp_path / "best.pt", model)
    broken = make_model()
    broken.visual.proj.data.fill_(math.nan)
    nan = write_checkpoint(tmp_path / "nan.pt", broken)
    (tmp_path / "other.jsonl").write_text('[1]\n{"header": {"old": 1}}\n')
    shards, out = ["--data", pairs.shards[0]], ["--out", tmp_path / "page.html"]
    base = ["--checkpoint", checkpoint, *shards]
    for argv, sentence in (
        ([*base, "--out", tmp_path / "page.pt"], "ends in .html"),
        ([*base, "--out", tmp_path / "nowhere" / "page.html"], "folder that exists"),
        ([*base, *out, "--log", tmp_path / "none.jsonl"], "none.jsonl"),
        ([*base, *out, "--log", tmp_path / "other.jsonl"], "not a log of this version"),
        ([*base, *out, "--n", 1], "--n"),
        (["--checkpoint", nan, *shards, *out], "diverged"),
    ):
        assert sentence in error_of(capsys, report.main, *argv), argv
    assert not (tmp_path / "page.html").exists()


# ---- the page in a browser

SWITCHES = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --disable-dev-shm-usage"""


@pytest.fixture(scope="module")
def browser():
    """One headless Chromium for all tests, as a selenium driver."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in SWITCHES.split():
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser, page):
    return open_page(browser, page)


def open_page(browser, page):
    """Load a page, and check that it neither complains nor asks for anything."""
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    return browser


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


def press(browser, *keys):
    """Send keys to whatever has the focus."""
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


TAB, LEFT, RIGHT, DOWN = "\ue004", "\ue012", "\ue014", "\ue015"  # selenium's names of keys


def test_the_page_asks_for_nothing_and_could_not(opened, page):
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if "requestWillBeSent" in m["method"]]
    assert page.as_uri() in sent
    assert [url for url in sent if url != page.as_uri() and not url.startswith("data:")] == []
    violation = """const done = arguments[0];
        document.addEventListener("securitypolicyviolation", (event) => done(event.blockedURI));
        document.body.append(Object.assign(new Image(), {src: "http://127.0.0.1:9/x.png"}));"""
    assert opened.execute_async_script(violation) == "http://127.0.0.1:9/x.png"
    opened.get_log("browser")  # the violation is in it


def test_a_hostile_caption_is_only_text(opened):
    assert all_of(opened, "#x, main b") == []
    assert HOSTILE.split(" \u2028")[0] in all_of(opened, "#captions")[0].text
    assert len(all_of(opened, "script")) == 2


def test_a_word_shows_its_map_while_it_is_pointed_at_or_has_the_focus(opened, page):
    picture = numbers_of(page)["pictures"][0]
    shown = "return [...document.querySelectorAll('.photo')].map(p => !p.children[1].hidden)"
    pixels = """const canvas = document.querySelector("canvas");
        const all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return [...all.data]"""

    def assert_map(word):
        assert opened.execute_script(shown) == [True] + [False] * 11
        colours = torch.tensor(opened.execute_script(pixels)).view(4, 4, 4)  # rows, columns, RGBA
        values = torch.tensor(picture["words"][word]["map"])
        largest = max(torch.tensor(w["map"]).abs().max() for w in picture["words"])
        assert (colours[:, :, 3] - 220 * values.abs() / largest).abs().max() <= 1
        strong = values.abs() > 0.2 * largest  # a canvas loses colour where it is nearly clear
        red = colours[:, :, 0] > colours[:, :, 2]
        assert (red == (values > 0))[strong].all()

    buttons = all_of(opened, "#pictures figure:first-child button")
    assert opened.execute_script(shown) == [False] * 12
    opened.execute_script("arguments[0].focus()", buttons[0])
    assert_map(0)
    press(opened, TAB)
    assert_map(1)
    name = buttons[1].accessible_name
    assert name.startswith(picture["words"][1]["word"] + ",") and "in the caption, seen at" in name
    pointed = "arguments[0].dispatchEvent(new PointerEvent(arguments[1]))"
    opened.execute_script(pointed, buttons[5], "pointerenter")
    assert_map(5)
    opened.execute_script(pointed, buttons[5], "pointerleave")
    assert_map(1)  # which still has the focus
    opened.execute_script("arguments[0].blur()", buttons[1])
    assert opened.execute_script(shown) == [False] * 12


def test_the_slider_recomputes_softmax_and_the_loss(opened, page, model, pairs):
    numbers = [picture["number"] for picture in numbers_of(page)["pictures"]]
    images, texts, _ = evaluation.encode_shards(model, pairs)
    images, texts = images[numbers], texts[numbers]
    slider = all_of(opened, "#temperature")[0]
    cells = "return [...document.querySelectorAll('.matrix tbody td')].map(c => +c.textContent)"

    def assert_matches(position):
        scale = model.logit_scale.exp() / 2 ** (position / 10)
        shown = [float(dd.text) for dd in all_of(opened, "#losses dd")]
        expected = contrastive_loss(images, texts, scale).item()
        assert shown[2] == pytest.approx(expected, abs=1e-3)
        assert shown[2] == pytest.approx((shown[0] + shown[1]) / 2, abs=1e-3)
        assert shown[3] == pytest.approx(math.log(12), abs=1e-3)
        rows = 100 * (scale * images @ texts.T).softmax(dim=1)
        assert same(opened.execute_script(cells), rows.flatten(), 0.51)

    assert_matches(0)
    opened.execute_script("arguments[0].focus()", slider)
    press(opened, RIGHT, RIGHT)
    assert_matches(2)
    assert "as the model learned it" not in slider.get_attribute("aria-valuetext")
    move = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    for position in (-40, 40):
        opened.execute_script(move, slider, position)
        assert_matches(position)
    for view, expected in (
        ("caption", 100 * (model.logit_scale.exp() / 16 * images @ texts.T).softmax(dim=0)),
        ("similarity", 100 * images @ texts.T),
    ):
        all_of(opened, f"input[value={view}]")[0].click()
        assert same(opened.execute_script(cells), expected.flatten(), 0.51), view


def test_the_matrix_is_read_with_the_arrow_keys(opened):
    cells = all_of(opened, ".matrix tbody td")
    framed = all_of(opened, ".matrix td.right")
    assert framed == cells[::13] and len(framed) == 12  # the diagonal
    opened.execute_script("arguments[0].focus()", cells[0])
    assert "Picture 1 and caption 1" in all_of(opened, "#readout")[0].text
    press(opened, LEFT, RIGHT, RIGHT, DOWN)
    assert "Picture 2 and caption 3" in all_of(opened, "#readout")[0].text
    assert len(all_of(opened, ".matrix td[tabindex='0']")) == 1


def test_the_reader_picks_a_caption_to_take_apart(opened, page):
    label = numbers_of(page)["pictures"][1]["label"]
    opened.execute_script("arguments[0].focus()", all_of(opened, "#thumbs input")[0])
    press(opened, RIGHT)
    rows = [row.text.split() for row in all_of(opened, "#label-table tbody tr")]
    assert [(row[0], row[1]) for row in rows] == [(t["token"], f"{t['idf']:.2f}") for t in label]
    loss = -sum(part["share"] * part["log_probability"] for part in label)
    assert f"{loss:.3f}" in all_of(opened, "#label-table tfoot")[0].text


def test_the_run_is_told_and_drawn(opened):
    story = all_of(opened, "#story")[0].text
    for text in (
        "tiny model",
        "40 pairs",
        "took 30 steps of 4 pairs",
        "20 s",
        "a machine",
        "commit abc",
    ):
        assert text in story
    titles = [svg.accessible_name for svg in all_of(opened, "#curves svg")]
    assert len(titles) == 3
    assert titles[0].startswith("Contrastive loss: from 2.50 at step 10 to 0.50 at step 30")
    assert all("reference run ends at" in title for title in titles)
    scores = [row.text for row in all_of(opened, "#scores tbody tr")]
    assert scores[1].split() == "zero-shot held out 70.0 % 10.0 % 35.0 to 70.0 % 10".split()


def test_everything_has_a_name_and_fits_a_phone(opened):
    nameless = """return [...document.querySelectorAll("img, button, svg, input, section")].filter(
        (e) => !(e.alt || e.textContent || e.ariaLabel || e.closest("label")
                 || e.labels?.length || e.getAttribute("aria-labelledby")))"""
    assert opened.execute_script(nameless) == []
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    width = opened.execute_script("return document.documentElement.scrollWidth")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width <= 360


def test_plain_clip_without_a_log_gives_a_page_without_words_and_run(browser, clip_page):
    opened = open_page(browser, clip_page)
    hidden = [s.get_attribute("id") for s in all_of(opened, "section") if not s.is_displayed()]
    assert hidden == ["run", "words", "label"]
    links = [a.text for a in all_of(opened, "nav a") if a.is_displayed()]
    assert links == ["Matching", "Search"]
    assert len(all_of(opened, ".matrix tbody tr")) == 5 and all_of(opened, ".found img")
    assert "word head" not in all_of(opened, "header")[0].text
