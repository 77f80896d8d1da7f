"""scripts/report.py: the numbers of the page, and the page itself in a real browser."""

import json
from dataclasses import asdict

import pytest
import torch
from material import COLOURS, TOKENIZER, coloured, make_model, numbers_of, requests_of, run, same

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
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = coloured(tmp_path_factory.mktemp("report") / "val.tar", *CAPTIONS)
    return data.Pairs([path], TOKENIZER, 16)


def score(value):
    return {"value": value, "chance": 0.1, "n": 10, "interval": [value / 2, value]}


# Step, loss, R@1 if there is a validation, and images a second
LOGGED = (10, 2.5, None, 8), (20, 9.0, 0.9, 8), (20, 1.5, 0.4, 4), (30, 0.5, 0.6, 8)


def write_log(path, model, **changes):
    """Of a run that was stopped after step 20, resumed at step 10, and killed at the end."""
    header = {"arguments": {"model": "tiny", "batch_size": 4}, "config": asdict(model.config)}
    header |= {"parameters": 1000, "samples": 40, "steps": 30, "device": "a machine", "torch": "2"}
    header |= {"dtype": "float32", "commit": "abc", "date": "2026-01-01 00:00", **changes}
    rows = [{"header": header}]
    for step, loss, r1, speed in LOGGED:
        losses = {"loss": 2 * loss, "contrastive_loss": loss, "classification_loss": loss + 1}
        rows.append({"step": step, "samples": 4 * step, "images_per_second": speed, **losses})
        if r1:
            scores = {"validation": {"image_to_text": {"R@1": score(r1)}}, "mean_r1": r1}
            rows.append({"step": step, **scores, "zeroshot": {"x/held_out": score(r1 + 0.1)}})
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 40, "lo')
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory, model, pairs):
    """The page of a run that is compared with itself."""
    folder = tmp_path_factory.mktemp("page")
    log, path = write_log(folder / "log.jsonl", model), folder / "report.html"
    report.write_report(model, TOKENIZER, pairs, log, path, reference_path=log)
    return path


def test_similarities_scores_and_searches_are_those_of_eval(page, model, pairs):
    content = numbers_of(page)
    images, texts, owner = evaluation.encode_shards(model, pairs)
    shown = [picture["number"] for picture in content["pictures"]]
    assert len(shown) == 12 and content["pairs"] == 13
    assert [content["images"][str(i)]["caption"] for i in shown] == [CAPTIONS[i] for i in shown]
    assert same(content["similarity"], images[shown] @ texts[shown].T, 1e-6)
    result = evaluation.retrieval(images, texts, owner)["text_to_image"]
    assert content["recall"] == result["R@1"]
    for search in content["searches"]:
        right, row = search["caption"], texts[search["caption"]] @ images.T
        ids, values = zip(*search["found"])
        assert same(values, row[list(ids)], 1e-4)
        assert same(values[:5], row.sort(descending=True).values[:5], 1e-4)
        assert right in ids and len(ids) == 5 + (right not in ids[:5])
        assert search["place"] == 1 + (row > row[right] + 1e-6).sum()  # less is a tie


def test_words_maps_and_labels_are_those_of_eval_and_of_the_word_loss(page, model, pairs):
    for picture in numbers_of(page)["pictures"]:
        i, words, label = picture["number"], picture["words"], picture["label"]
        image, (caption,) = evaluation.ShardImages(pairs)[i]
        top = evaluation.top_words(model, TOKENIZER, image[None], 8)[0]
        _, maps = evaluation.word_maps(model, image, [i for _, _, i in top], window=1)
        assert [(w["word"], w["probability"]) for w in words] == [(w, p) for w, p, _ in top]
        assert [w["said"] for w in words] == [i in TOKENIZER.encode(caption) for _, _, i in top]
        assert same([w["map"] for w in words], maps, 1e-3)
        logits = model.class_logits(image[None])
        loss = classification_loss(logits, TOKENIZER([caption]), model.token_weights()).item()
        shown = -sum(part["share"] * part["log_probability"] for part in label)
        assert shown == pytest.approx(loss, abs=1e-4)
        weights = model.token_weights()[[*dict.fromkeys(TOKENIZER.encode(caption))]]
        assert same([part["idf"] for part in label], weights, 1e-6)


def test_a_log_is_read_as_the_resumed_run_left_it(page):
    content = numbers_of(page)["run"]
    assert content["losses"] == [[10, 2.5, 3.5], [20, 1.5, 2.5], [30, 0.5, 1.5]]
    assert content["validations"] == [[20, 0.4], [30, 0.6]] and content["step"] == 30
    assert content["seconds"] == 40 / 8 + 40 / 4 + 40 / 8
    scores = {s.pop("name"): s for s in content["scores"]}
    assert scores == {"image to text R@1": score(0.6), "zero-shot held out": score(0.7)}


def test_the_command_finds_the_log_and_compares_equals_only(tmp_path, model, pairs, monkeypatch):
    monkeypatch.setattr(report, "REFERENCE", tmp_path / "other.jsonl")
    write_log(tmp_path / "log.jsonl", model)
    argv = ["--checkpoint", tmp_path / "best.pt", "--data", *pairs.shards]
    evaluation.write_checkpoint(argv[1], model, TOKENIZER.vocab)
    for changes, equal in (({"device": "b"}, 1), ({"samples": 41}, 0), ({"config": {}}, 0)):
        write_log(report.REFERENCE, model, **changes)
        assert not run(report.main, *argv, "--n", 3, "--out", tmp_path / "page.html")
        content = numbers_of(tmp_path / "page.html")
        assert len(content["pictures"]) == 3 and content["run"]["step"] == 30
        assert bool(content["reference"]) == equal


def test_the_page_shows_its_numbers_and_asks_for_nothing(browser, page, model, pairs, tmp_path):
    content, run_script = numbers_of(page), browser.execute_script
    numbers = [picture["number"] for picture in content["pictures"]]
    images, texts, _ = evaluation.encode_shards(model, pairs)
    images, texts = images[numbers], texts[numbers]

    def all_of(selector):
        return browser.find_elements("css selector", selector)

    browser.get(page.as_uri())
    # Nothing is loaded, nothing fails, and a hostile caption is only text.
    assert requests_of(browser) == {page.as_uri()}
    assert browser.get_log("browser") == [] and all_of("#x, main b") == []
    assert HOSTILE.split(" \u2028")[0] in all_of("#captions")[0].text
    # The run: its curves and its scores.
    assert len(all_of("#curves svg")) == 3
    scores = " ".join(all_of("#scores")[0].text.split())
    assert "zero-shot held out 70.0 % 10.0 % 35.0 to 70.0 % 10" in scores
    # A word shows its map while it has the focus.
    words = content["pictures"][0]["words"]
    run_script("arguments[0].focus()", all_of("#pictures figure:first-child button")[1])
    pixels = run_script("""const canvas = document.querySelector("canvas:not([hidden])");
        return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]""")
    colours, values = torch.tensor(pixels).view(4, 4, 4), torch.tensor(words[1]["map"])  # RGBA last
    largest = max(torch.tensor(word["map"]).abs().max() for word in words)
    assert (colours[:, :, 3] - 220 * values.abs() / largest).abs().max() <= 1
    strong = values.abs() > 0.2 * largest  # a canvas loses colour where it is nearly clear
    assert ((colours[:, :, 0] > colours[:, :, 2]) == (values > 0))[strong].all()
    # The slider recomputes the softmax and the loss.
    move = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    cells = "return [...document.querySelectorAll('.matrix tbody td')].map(c => +c.textContent)"
    for position in (0, -40, 40):
        run_script(move, all_of("#temperature")[0], position)
        scale = model.logit_scale.exp() / 2 ** (position / 10)
        shown = [float(dd.text) for dd in all_of("#losses dd")]
        assert shown[2] == pytest.approx(contrastive_loss(images, texts, scale).item(), abs=1e-3)
        rows = 100 * (scale * images @ texts.T).softmax(dim=1)
        assert same(run_script(cells), rows.flatten(), 0.51)
    # A caption as a label: its tokens, their weights, and the loss that they add up to.
    all_of("#thumbs input")[1].find_element("xpath", "..").click()
    label = content["pictures"][1]["label"]
    loss = -sum(part["share"] * part["log_probability"] for part in label)
    assert f"{loss:.3f}" in all_of("#label-table tfoot")[0].text
    # It fits a phone.
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert run_script("return document.documentElement.scrollWidth") <= 360
    # A plain CLIP model without a log gives a page without words and run.
    clip = make_model(cls_weight=0).requires_grad_(False)
    report.write_report(clip, TOKENIZER, pairs, None, tmp_path / "clip.html", n=5)
    browser.get((tmp_path / "clip.html").as_uri())
    hidden = [s.get_attribute("id") for s in all_of("section") if not s.is_displayed()]
    assert hidden == ["run", "words", "label"] and len(all_of(".matrix tbody tr")) == 5
    assert browser.get_log("browser") == [] and "word head" not in all_of("header")[0].text
