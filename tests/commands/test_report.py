"""scripts/report.py: the log of a run, the numbers of the page, and the page in a real browser."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from material import COLOURS, TOKENIZER, coloured, error_of, make_model, png, run, write_shard
from webpage import are_near, numbers_of, requests_of

import data
import eval as evaluation
from scripts import report, words
from superclip import classification_loss, contrastive_loss

HOSTILE = '</script><b id="x">a red</b> square <!-- <script> &lt; "\' \u2028'
CAPTIONS = [HOSTILE, *(f"a {c} {shape}" for c in COLOURS for shape in ("square", "ring", "thing"))]


@pytest.fixture(scope="module")
def model():
    """Random weights, and the token counts of the captions."""
    model = make_model(cls_weight=0.5)
    model.count_tokens(TOKENIZER(CAPTIONS))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def val_pairs(tmp_path_factory):
    path = coloured(tmp_path_factory.mktemp("report") / "val.tar", *CAPTIONS)
    return data.Pairs([path], TOKENIZER, 16)


# ---- The log


def score(value):
    return {"value": value, "chance": 0.1, "n": 10, "interval": [value / 2, value]}


def header_row(step, batch_size=4, **changes):
    header = {
        "arguments": {"model": "tiny", "batch_size": batch_size},
        "config": asdict(make_model(cls_weight=0.5).config),
        "parameters": 1000,
        "pairs": 40,
        "steps": 30,
        "device": "a machine",
        "dtype": "float32",
        "torch": "2",
        "commit": "abc",
        "date": "2026-01-01 00:00",
        **changes,
    }
    return {"header": header, "step": step}


def training_row(step, loss, speed=8, batch_size=4, **more):
    return {
        "step": step,
        "samples": step * batch_size,
        "images_per_second": speed,
        "loss": 2 * loss,
        "contrastive_loss": loss,
        "classification_loss": loss + 1,
        **more,
    }


def validation_row(step, r1):
    validation = {"image_to_text": {"R@1": score(r1)}}
    zeroshot = {"x/held_out": score(r1 + 0.1)}
    return {
        "step": step,
        "validation": validation,
        "mean_r1": r1,
        "val_contrastive_loss": 2 - r1,
        "val_group": 4,
        "zeroshot": zeroshot,
    }


def write_log(path, *rows, end=""):
    path.write_text("\n".join([*map(json.dumps, rows), end]))
    return path


def write_run(path, **changes):
    """The log of a run of 30 steps that was stopped after step 20, and went on from step 10."""
    rows = [header_row(0, **changes), training_row(10, 2.5), training_row(20, 9.0)]
    rows += [validation_row(20, 0.9), header_row(10, **changes), training_row(20, 1.5, speed=4)]
    rows += [validation_row(20, 0.4), training_row(30, 0.5), validation_row(30, 0.6)]
    return write_log(path, *rows)


def test_a_log_is_read_as_the_resumed_run_left_it(tmp_path):
    page = report.read_run(write_run(tmp_path / "log.jsonl"))

    assert page["losses"]["contrastive_loss"] == [[10, 2.5], [20, 1.5], [30, 0.5]]
    assert page["losses"]["classification_loss"] == [[10, 3.5], [20, 2.5], [30, 1.5]]
    assert page["validations"] == [[20, 0.4], [30, 0.6]]
    assert page["validation_losses"] == [[20, 1.6], [30, 1.4]]
    assert page["step"] == 30
    assert page["seconds"] == 40 / 8 + 40 / 4 + 40 / 8
    names = [part["name"] for part in page["scores"]]
    assert names == ["image to text R@1", "zero-shot held out"]
    assert page["scores"][0] == {"name": names[0], **score(0.6)}


def test_every_term_of_the_loss_has_a_curve(tmp_path):
    """That of a fork, too; other numbers have none."""
    rows = [training_row(10, 2.5, grad_norm=1.0), training_row(20, 2.0, my_loss=0.25)]

    page = report.read_run(write_log(tmp_path / "log.jsonl", header_row(0), *rows))

    assert set(page["losses"]) == {"contrastive_loss", "classification_loss", "my_loss"}
    assert page["losses"]["my_loss"] == [[20, 0.25]]


def test_folders_of_one_last_name_keep_both_scores(tmp_path):
    zeroshot = {"birds/test": score(0.5), "cars/test": score(0.6), "x/colour": score(0.7)}
    row = {"step": 10, "zeroshot": zeroshot}

    page = report.read_run(write_log(tmp_path / "log.jsonl", header_row(0), row))

    found = {part["name"]: part["value"] for part in page["scores"]}
    assert found == {
        "zero-shot birds/test": 0.5,
        "zero-shot cars/test": 0.6,
        "zero-shot colour": 0.7,
    }


# ---- The numbers of the page


@pytest.fixture(scope="module")
def page(tmp_path_factory, model, val_pairs):
    """The page of a run that is compared with itself."""
    folder = tmp_path_factory.mktemp("page")
    log = write_run(folder / "log.jsonl")
    path = folder / "report.html"
    report.write_report(model, TOKENIZER, val_pairs, log, path, reference_path=log)
    return path


def test_similarities_and_scores_are_those_of_eval(page, model, val_pairs):
    content = numbers_of(page)

    images, texts, owner = evaluation.encode_shards(model, val_pairs)
    shown = [picture["number"] for picture in content["pictures"]]
    assert len(shown) == 12
    assert content["pairs"] == 13
    assert [content["images"][str(i)]["caption"] for i in shown] == [CAPTIONS[i] for i in shown]
    assert are_near(content["similarity"], images[shown] @ texts[shown].T, 1e-6)
    result = evaluation.retrieval(images, texts, owner)["text_to_image"]
    assert content["recall"] == result["R@1"]


def test_searches_show_the_best_pictures_and_the_right_one(page, model, val_pairs):
    content = numbers_of(page)

    images, texts, _ = evaluation.encode_shards(model, val_pairs)
    assert content["searches"]
    for search in content["searches"]:
        right = search["caption"]
        similarity = texts[right] @ images.T
        ids, values = zip(*search["found"])
        assert are_near(values, similarity[list(ids)], 1e-4)
        assert are_near(values[:5], similarity.sort(descending=True).values[:5], 1e-4)
        assert right in ids
        assert search["place"] == 1 + (similarity > similarity[right] + 1e-6).sum()  # less: a tie


def test_words_and_maps_are_those_of_eval(page, model, val_pairs):
    for picture in numbers_of(page)["pictures"]:
        said = picture["words"]
        image, [caption] = evaluation.ShardImages(val_pairs)[picture["number"]]
        top = evaluation.top_words(model, TOKENIZER, image[None], 8)[0]
        _, maps = words.word_maps(model, image, [i for _, _, i in top], window=1)

        assert [(w["word"], w["probability"]) for w in said] == [(w, p) for w, p, _ in top]
        assert [w["said"] for w in said] == [i in TOKENIZER.encode(caption) for _, _, i in top]
        assert are_near([w["map"] for w in said], maps, 1e-3)


def test_words_of_all_captions_of_a_picture_are_ticked(model, tmp_path):
    """Not only of the first one. A picture has its captions in a list here."""
    captions = ["a photo", "a red ring", "the blue thing"]
    about = json.dumps({"captions": captions}).encode()
    sample = {"png": png(COLOURS["red"], np.random.default_rng(0)), "json": about}
    shard = write_shard(tmp_path / "val.tar", [sample, sample])
    pairs = data.Pairs([shard], TOKENIZER, 16, ["json.captions"])

    content = report.examine(model, TOKENIZER, pairs, n=2)

    said = set(" ".join(captions).split())
    for picture in content["pictures"]:
        for word in picture["words"]:
            assert word["said"] == (word["word"] in said)
        assert all(caption in picture["captions"] for caption in captions)


def test_a_label_adds_up_to_the_classification_loss(page, model, val_pairs):
    for picture in numbers_of(page)["pictures"]:
        image, [caption] = evaluation.ShardImages(val_pairs)[picture["number"]]
        logits = model.class_logits(image[None])
        loss = classification_loss(logits, TOKENIZER([caption]), model.token_weights()).item()

        label = picture["label"]

        shown = -sum(part["share"] * part["log_probability"] for part in label)
        assert shown == pytest.approx(loss, abs=1e-4)
        weights = model.token_weights()[[*dict.fromkeys(TOKENIZER.encode(caption))]]
        assert are_near([part["idf"] for part in label], weights, 1e-6)


# ---- The command


REFERENCES = {
    "another machine": ({"device": "b"}, True),
    "more pairs": ({"pairs": 41}, False),
    "another model": ({"config": {}}, False),
    "the same run": ({}, False),
}


@pytest.mark.parametrize("changes, is_equal", REFERENCES.values(), ids=REFERENCES)
def test_only_an_equal_run_is_a_reference(
    changes, is_equal, tmp_path, model, val_pairs, monkeypatch
):
    monkeypatch.setattr(report, "REFERENCE", tmp_path / "other.jsonl")
    write_run(tmp_path / "other.jsonl", **changes)
    write_run(tmp_path / "log.jsonl")  # beside the checkpoint, where the command finds it
    evaluation.write_checkpoint(tmp_path / "best.pt", model, TOKENIZER.vocab)
    argv = ["--checkpoint", tmp_path / "best.pt", "--data", *val_pairs.shards, "--n", 3]

    assert not run(report.main, *argv, "--out", tmp_path / "page.html")

    content = numbers_of(tmp_path / "page.html")
    assert len(content["pictures"]) == 3
    assert content["run"]["step"] == 30
    assert bool(content["reference"]) == is_equal


def test_data_and_captions_are_those_of_the_run_and_an_option_wins(tmp_path, model, val_pairs):
    """The run's captions are not in these shards, which --captions txt puts right."""
    options = {"val_data": val_pairs.shards, "val_captions": ["json.none"], "captions": ["txt"]}
    path = tmp_path / "best.pt"
    evaluation.write_checkpoint(path, model, TOKENIZER.vocab, header={"arguments": options})
    argv = ["--checkpoint", path, "--out", tmp_path / "page.html"]

    assert run(report.main, *argv) == 2
    assert not run(report.main, *argv, "--captions", "txt")

    assert numbers_of(tmp_path / "page.html")["pairs"] == len(CAPTIONS)


def test_a_run_that_held_pairs_out_needs_data(tmp_path, model, capsys):
    path = tmp_path / "best.pt"
    evaluation.write_checkpoint(
        path, model, TOKENIZER.vocab, header={"arguments": {"val_data": None}}
    )

    error = error_of(capsys, report.main, "--checkpoint", path, "--out", tmp_path / "page.html")

    assert "--data" in error


# ---- The page in a browser


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


@pytest.fixture
def opened(browser, page):
    """A browser that has just loaded the page, in a window as wide as it was."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    requests_of(browser)  # what other tests have asked for
    browser.get_log("browser")
    browser.get(page.as_uri())
    return browser


def test_the_page_asks_for_nothing_and_has_no_error(opened, page):
    assert requests_of(opened) == {page.as_uri()}
    assert opened.get_log("browser") == []


def test_a_hostile_caption_is_only_text(opened):
    assert all_of(opened, "#x, main b") == []
    assert HOSTILE.split(" \u2028")[0] in all_of(opened, "#captions")[0].text


def test_the_run_has_its_curves_and_its_scores(opened):
    titles = [title.text for title in all_of(opened, "#curves h3")]
    scores = " ".join(all_of(opened, "#scores")[0].text.split())

    terms = ["Contrastive loss", "Classification loss"]
    assert titles == [*terms, "Contrastive loss of validation pairs", "R@1 in %, mean of both ways"]
    assert "zero-shot held out 70.0 % 10.0 % 35.0 to 70.0 % 10" in scores


def test_the_page_says_that_the_model_overfits(opened):
    """The loss of the last validation, 1.4 in groups of 4, is above ln 4 = 1.39, and in training it
    is 0.5."""
    assert all_of(opened, "#overfitting")[0].is_displayed()


def test_a_word_shows_its_map_while_it_has_the_focus(opened, page):
    words = numbers_of(page)["pictures"][0]["words"]
    buttons = all_of(opened, "#pictures figure:first-child button")

    opened.execute_script("arguments[0].focus()", buttons[1])

    pixels = opened.execute_script("""const canvas = document.querySelector("canvas:not([hidden])");
        return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]""")
    red, _, blue, alpha = torch.tensor(pixels).view(4, 4, 4).movedim(2, 0)
    values = torch.tensor(words[1]["map"])
    largest = max(torch.tensor(word["map"]).abs().max() for word in words)
    assert (alpha - 220 * values.abs() / largest).abs().max() <= 1
    strong = values.abs() > 0.2 * largest  # a canvas loses colour where it is nearly clear
    assert ((red > blue) == (values > 0))[strong].all()


@pytest.mark.parametrize("position", [0, -40, 40])
def test_the_slider_computes_softmax_and_loss(opened, page, model, val_pairs, position):
    numbers = [picture["number"] for picture in numbers_of(page)["pictures"]]
    images, texts, _ = evaluation.encode_shards(model, val_pairs)
    images, texts = images[numbers], texts[numbers]

    move = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    opened.execute_script(move, all_of(opened, "#temperature")[0], position)

    read = "return [...document.querySelectorAll('.matrix tbody td')].map(c => +c.textContent)"
    cells = opened.execute_script(read)
    losses = [float(dd.text) for dd in all_of(opened, "#losses dd")]
    scale = model.logit_scale.exp() / 2 ** (position / 10)
    assert losses[2] == pytest.approx(contrastive_loss(images, texts, scale).item(), abs=1e-3)
    rows = 100 * (scale * images @ texts.T).softmax(dim=1)
    assert are_near(cells, rows.flatten(), 0.51)


def test_a_caption_is_shown_as_a_label_with_its_loss(opened, page):
    label = numbers_of(page)["pictures"][1]["label"]

    all_of(opened, "#thumbs input")[1].find_element("xpath", "..").click()

    loss = -sum(part["share"] * part["log_probability"] for part in label)
    assert f"{loss:.3f}" in all_of(opened, "#label-table tfoot")[0].text


def test_the_page_fits_a_phone(opened):
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)

    assert opened.execute_script("return document.documentElement.scrollWidth") <= 360


def test_plain_clip_without_a_log_has_no_words_and_no_run(browser, val_pairs, tmp_path):
    clip = make_model(cls_weight=0).requires_grad_(False)
    report.write_report(clip, TOKENIZER, val_pairs, None, tmp_path / "clip.html", n=5)

    browser.get((tmp_path / "clip.html").as_uri())

    hidden = [s.get_attribute("id") for s in all_of(browser, "section") if not s.is_displayed()]
    assert hidden == ["run", "words", "label"]
    assert len(all_of(browser, ".matrix tbody tr")) == 5
    assert browser.get_log("browser") == []
    assert "word head" not in all_of(browser, "header")[0].text
