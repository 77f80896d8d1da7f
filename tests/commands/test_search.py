"""Test scripts/search.py: a slow search finds the same. Test its file of features and its page."""

import http.client
import re
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from children import Children
from material import (
    error_of,
    features_of,
    photo,
    png,
    run,
    small_model,
    write_checkpoint,
    write_shard,
)

import eval as evaluation
from scripts import search

TEXTS = ["a photo of the red square", "blue thing " * 200]  # the second is longer than the context


@pytest.fixture
def folders(folders, monkeypatch):
    """Return the folders of conftest.py, with pictures that random weights can tell apart."""
    for i, file in enumerate(sorted(folders.rglob("*.png"))):
        photo(i).save(file)
    monkeypatch.chdir(folders)
    return folders


def test_the_ranking_is_the_slow_and_obvious_one(folders, checkpoint, capsys):
    """The second search takes the features from a file, which other programs can read."""
    argv = ["--checkpoint", checkpoint, "--images", ".", *TEXTS, "--k", 7, "--features", "x.npz"]

    printed = []
    for _ in range(2):
        assert not run(search.main, *argv)
        printed.append(capsys.readouterr().out)

    assert printed[0] == printed[1]
    results = re.findall(r"^ +(-?[01]\.\d{3})  (\S+)$", printed[0], re.M)
    found = [{name: float(score) for score, name in part} for part in (results[:7], results[7:])]
    model, tokenizer, _ = evaluation.load(checkpoint)
    files = sorted(Path().rglob("*.png"))
    features = features_of(checkpoint, files)
    for scores_of, query in zip(found, model.encode_text(tokenizer(TEXTS)), strict=True):
        scores = (features @ query).tolist()
        best = sorted(zip(scores, map(str, files)), reverse=True)[:7]
        assert scores_of == pytest.approx({name: score for score, name in best}, abs=6e-4)
    kept = np.load("x.npz")
    assert kept["names"].tolist() == [str(file) for file in files]
    np.testing.assert_allclose(kept["features"], features, atol=1e-5)


def test_only_new_and_changed_images_are_encoded(folders, checkpoint):
    """We set all kept features to zero. Features that are still zero were not computed again."""
    write_shard("a.tar", [{"png": png("red")}])
    argv = [TEXTS[0], "--features", "x.npz", "--images", "red", "--data", "a.tar"]

    def encoded():
        assert not run(search.main, *argv, "--checkpoint", checkpoint)
        kept = dict(np.load("x.npz"))
        names = {Path(name).name for name, x in zip(kept["names"], kept["features"]) if x.any()}
        kept["features"][:] = 0
        np.savez("x.npz", **kept)
        return names

    files = {file.name for file in Path("red").iterdir()}
    assert encoded() > files  # and the sample in a.tar
    assert encoded() == set()
    Path("red/2.png").rename("red/9.png")
    photo(77).save("red/1.png")
    assert encoded() == {"1.png", "9.png"}


def test_a_search_of_fewer_images_keeps_the_features_of_all(folders, checkpoint):
    argv = [TEXTS[0], "--checkpoint", checkpoint, "--features", "x.npz", "--images"]
    run(search.main, *argv, ".")
    before = Path("x.npz").read_bytes()

    run(search.main, *argv, "red")

    assert Path("x.npz").read_bytes() == before


@pytest.mark.parametrize("content", ["other arrays", "another checkpoint"])
def test_a_file_of_other_features_is_refused_and_kept(folders, checkpoint, content, capsys):
    if content == "other arrays":
        np.savez("x.npz", features=np.zeros((2, 3)))
    else:
        other = write_checkpoint("other.pt", small_model(cls_weight=0))
        argv = ["--images", "red", TEXTS[0], "--features", "x.npz"]
        assert not run(search.main, "--checkpoint", other, *argv)
    before = Path("x.npz").read_bytes()

    argv = ["--checkpoint", checkpoint, "--images", "red", TEXTS[0], "--features", "x.npz"]
    assert "x.npz" in error_of(capsys, search.main, *argv)
    assert Path("x.npz").read_bytes() == before


def test_a_broken_link_in_a_folder_is_named_and_left_out(folders, checkpoint, capsys):
    Path("red/0.jpg").symlink_to("nowhere.jpg")

    argv = ["--checkpoint", checkpoint, "--images", "red", "--workers", 0]
    assert not run(search.main, *argv, TEXTS[0])

    printed = capsys.readouterr().out
    assert "red/0.jpg" in printed and "4 images" in printed


# ---- the page


HOSTILE = "<img src=x onerror=alert()>.png"


@pytest.fixture(scope="module")
def address(server, tmp_path_factory):
    """Return the address of a page of twenty pictures, one of them with a hostile name."""
    world = tmp_path_factory.mktemp("world")
    (world / "photos").mkdir()
    for i in range(20):
        photo(i).save(world / "photos" / (HOSTILE if i == 5 else f"{i:02d}.png"))
    checkpoint = write_checkpoint(world / "model.pt", small_model())
    argv = ["--checkpoint", checkpoint, "--images", world / "photos", "--workers", 0]
    children = Children(world)
    process = children.start("scripts.search", [*argv, "--serve", "--k", 20])
    process.output.touch()
    while "http://" not in process.output.read_text():
        assert process.is_alive()
        time.sleep(0.02)
    yield re.search(r"http://\S+", process.output.read_text())[0]
    children.end()


ANSWERS = {  # {path of a request: status of the answer}
    "/TOKEN/picture?number=0": 200,
    "/TOKEN/picture?number=../model.pt": 404,
    "/TOKEN/picture?number=-1": 404,
    "/TOKEN/photos/01.png": 404,
    "/picture?number=0": 404,
}


def test_nothing_but_numbers_of_pictures_is_served_below_a_secret_path(address):
    _, netloc, token, *_ = urlsplit(address)
    for path, status in ANSWERS.items():
        connection = http.client.HTTPConnection(netloc, timeout=30)
        connection.request("GET", path.replace("/TOKEN/", token))
        assert connection.getresponse().status == status, path


def test_a_reader_searches_on_the_page(browser, address):
    """The page shows HTML in a name or a query as text."""
    browser.implicitly_wait(30)  # wait for elements that come with an answer
    browser.get(address)
    browser.find_element("id", "field").send_keys(HOSTILE + "\ue007")  # Enter
    browser.find_element("xpath", "//h2[starts-with(text(), '“')]")

    assert "onerror" in browser.find_element("id", "status").text
    assert any(HOSTILE in text for text in browser.find_element("id", "results").text.split("\n"))
    assert len(browser.find_elements("css selector", "#results img")) == 20
    assert browser.execute_script("return document.querySelector('[onerror]')") is None
    assert browser.get_log("browser") == []
