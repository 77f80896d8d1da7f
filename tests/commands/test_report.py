"""scripts/report.py: the log of a run, the numbers of the page, and the page in a real browser."""

import json

import pytest
from material import TOKENIZER, run, small_model, write_captions, write_checkpoint, write_shard
from webpage import are_near, numbers_of, requests_of

import data
import eval as evaluation
from scripts import report
from scripts.words import word_maps

HOSTILE = '</script><b id="x">a red</b> square <!-- <script> &lt; "\' \u2028'
CAPTIONS = [HOSTILE, "a blue ring", "a red thing", "the green square", "a photo"]
SCORE = {"value": 0.7, "chance": 0.1, "n": 10, "interval": [0.35, 0.9]}
HEADER = dict.fromkeys(report.HEADER, 1)
HEADER |= {"arguments": {"model": "tiny", "batch_size": 4}}
HEADER |= {"config": {"vocab_size": 7, "loss": "softmax"}}


def training_row(step, loss):
    """With a term of a fork, which is subtracted."""
    terms = {"contrastive_loss": loss, "my_loss": -loss, "classification_loss": loss}
    return {"step": step, "loss": 0, **terms, "grad_norm": 1}


def validation_row(step, r1):
    zeroshot = dict.fromkeys(["x/held_out", "a/x/seen", "b/x/seen"], SCORE)
    scores = {"validation": {"image_to_text": {"R@1": SCORE}}, "zeroshot": zeroshot}
    return {"step": step, "mean_r1": r1, "val_contrastive_loss": 2 - r1, "val_group": 4, **scores}


def write_log(path):
    """The log of a run of 30 steps that was killed after step 25, and went on from step 10."""
    begin = {"header": HEADER, "step": 0}
    rows = [begin, training_row(10, 2.5), training_row(20, 9.0), validation_row(20, 0.9)]
    rows += [training_row(25, 9.0), {**begin, "step": 10}]
    rows += [training_row(20, 1.5), validation_row(20, 0.4)]
    rows += [training_row(30, 0.5), validation_row(30, 0.6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_log_is_read_as_the_resumed_run_left_it(tmp_path):
    """A score has the name of its folder, and of those above it where several have that name."""
    page = report.read_run(write_log(tmp_path / "log.jsonl"))

    assert page["losses"]["contrastive_loss"] == [[10, 2.5], [20, 1.5], [30, 0.5]]
    assert page["losses"]["my_loss"] == [[10, -2.5], [20, -1.5], [30, -0.5]]
    assert page["validations"] == [[20, 0.4], [30, 0.6]]
    names = [f"zero-shot {name}" for name in ("held out", "a/x/seen", "b/x/seen")]
    assert page["scores"][1:] == [{"name": name, **SCORE} for name in names]
    assert [curve["name"] for curve in page["zeroshot"]] == names
    assert page["zeroshot"][0]["points"] == [[20, 0.7], [30, 0.7]]


@pytest.mark.parametrize("path", report.REFERENCES)
@pytest.mark.parametrize("change, is_alike", [({"my_weight": 1.0}, True), ({"loss": "x"}, False)])
def test_the_projects_run_stands_beside_models_whose_common_fields_are_equal(
    path, change, is_alike
):
    """That of SuperCLIP, or that of CLIP."""
    own = report.read_run(path)
    header = {**own["header"], "date": "later", "config": own["header"]["config"] | change}

    assert report.own_reference({"header": header}) == (own if is_alike else None)
    assert report.own_reference(own) is None  # not beside itself


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model with random weights, the pairs on which its run was validated, and its page. The
    picture of one more pair cannot be read."""
    folder = tmp_path_factory.mktemp("report")
    broken = write_shard(folder / "val-0.tar", [{"png": b"no image", "txt": b"a"}])
    shard = write_captions(folder / "val-1.tar", *CAPTIONS)
    model = small_model().requires_grad_(False)
    header = {"arguments": {"val_data": [broken, shard], "captions": ["txt"]}}
    write_checkpoint(folder / "best.pt", model, header=header)
    log = write_log(folder / "log.jsonl")
    argv = ["--checkpoint", folder / "best.pt", "--reference", log, "--device", "cpu"]
    assert not run(report.main, *argv, "--out", folder / "report.html")
    return model, data.Shards([shard]), folder / "report.html"


def test_the_numbers_of_the_page_are_those_of_eval(world):
    model, shards, page = world
    content = numbers_of(page)

    samples = evaluation.ShardImages(shards, 16)
    for picture, (image, [caption]) in zip(content["pictures"], samples, strict=True):
        assert picture["caption"] == caption
        [top] = evaluation.top_words(model, TOKENIZER, image[None], 8)
        _, maps = word_maps(model, image, [i for _, _, i in top], window=1)
        for word, (text, p, i), falls in zip(picture["words"], top, maps, strict=True):
            assert (word["word"], word["probability"]) == (text, p)
            assert word["said"] == (i in TOKENIZER.encode(caption))
            assert are_near(word["map"], falls)


def test_the_page_of_plain_clip_has_its_curves_alone(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "clip.pt", small_model(cls_weight=0))
    write_log(tmp_path / "log.jsonl")
    page = tmp_path / "clip.html"

    assert not run(report.main, "--checkpoint", checkpoint, "--out", page)

    content = numbers_of(page)
    assert content["run"]["step"] == 30
    assert content["pictures"] == []


def test_a_visit(browser, world):
    """The page asks for nothing, a caption is only text, and what moves shows right numbers."""
    _, _, page = world
    requests_of(browser)  # what other tests have asked for
    browser.get(page.as_uri())

    def all_of(selector):
        return browser.find_elements("css selector", selector)

    assert requests_of(browser) == {page.as_uri()}
    assert browser.get_log("browser") == []
    assert all_of("#x, main b") == []

    # A plot is as high as its curve needs it, even if a term is negative. Scores are in percent.
    titles = [title.text for title in all_of("#curves h3")]
    said = [caption.text for caption in all_of("#curves figcaption")]
    plots = "[...document.querySelectorAll('#curves svg')]"
    is_inside = "({y, height}) => y >= 0 && y + height <= 186"
    assert titles[:3] == ["Contrastive loss", "My loss", "Word loss"]
    assert "held out" in titles[-3] and "70.00" in said[-3]
    assert browser.execute_script(f"return {plots}.map((svg) => svg.getBBox()).every({is_inside})")

    # A word shows its map while it has the focus.
    browser.execute_script("arguments[0].focus()", all_of("#pictures button")[1])
    assert len(all_of("canvas:not([hidden])")) == 1
