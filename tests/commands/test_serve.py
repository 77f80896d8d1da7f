"""The page of scripts/serve.py in a real browser, and who is answered."""

import http.client
import json
import re
import time
from urllib.parse import urlsplit

import pytest
from children import Children
from material import features_of, photo, small_model, write_checkpoint

import eval as evaluation

HOSTILE = "<img src=x onerror=alert()>.png"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a checkpoint and twenty pictures, one of them with a hostile name, and two of
    them with the same name."""
    world = tmp_path_factory.mktemp("world")
    (world / "photos" / "more").mkdir(parents=True)
    for i in range(20):
        photo(i).save(world / "photos" / f"{i:02d}.png")
    (world / "photos" / "06.png").rename(world / "photos" / "more" / "04.png")
    (world / "photos" / "05.png").rename(world / "photos" / HOSTILE)
    write_checkpoint(world / "model.pt", small_model())
    return world


@pytest.fixture(scope="module")
def address(server, world):
    """The address that the command names, as long as it runs."""
    argv = ["--checkpoint", world / "model.pt", "--images", world / "photos", "--workers", 0]
    argv += ["--device", "cpu"]  # as the slow search, whose scores are near each other
    children = Children(world)
    process = children.start("scripts.search", [*argv, "--serve", "--port", 0, "--k", 20])
    process.output.touch()
    while "http://" not in process.output.read_text():
        assert process.is_alive()
        time.sleep(0.02)
    yield re.search(r"http://\S+", process.output.read_text())[0]
    children.end()


def answer_of(address, path, host="127.0.0.1"):
    """The status and the bytes with which the server answers; TOKEN stands for the random part."""
    _, netloc, token, *_ = urlsplit(address)
    connection = http.client.HTTPConnection(netloc, timeout=30)
    connection.request("GET", path.replace("/TOKEN/", token), headers={"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read()


PICTURE = "/TOKEN/picture?number=0"
ANSWERS = {  # path and host of a request -> the status of the answer
    (PICTURE, "localhost"): 200,
    (PICTURE, "127.0.0.1:1"): 200,  # that of ssh -L may be another
    (PICTURE, "evil.example"): 404,  # a website that gives its name the address 127.0.0.1
    (PICTURE, "127.0.0.1.evil.example"): 404,
    (PICTURE, ""): 404,
    ("/TOKEN/../../../../../../etc/passwd", "localhost"): 404,
    ("/TOKEN/photos/01.png", "localhost"): 404,
    ("/TOKEN/picture?number=../model.pt", "localhost"): 404,
    ("/TOKEN/picture?number=20", "localhost"): 404,
    ("/TOKEN/search", "localhost"): 404,
    ("/", "localhost"): 404,
    ("/picture?number=0", "localhost"): 404,
    ("/AAAAAAAAAAAAAAAAAAAAAA/picture?number=0", "localhost"): 404,
}


@pytest.mark.parametrize("path, host", ANSWERS)
def test_nothing_but_numbers_of_pictures_is_served_and_only_to_this_machine(address, path, host):
    assert answer_of(address, path, host)[0] == ANSWERS[path, host]


def test_the_server_finds_what_the_slow_search_finds(address, world):
    features = features_of(world / "model.pt", sorted((world / "photos").rglob("*.png")))
    model, tokenizer, _ = evaluation.load(world / "model.pt")

    _, content = answer_of(address, "/TOKEN/search?text=red+zebra")

    order = (features @ model.encode_text(tokenizer("red zebra"))[0]).argsort(descending=True)
    result = json.loads(content)
    assert [found["number"] for found in result["found"]] == order.tolist()
    assert result["unknown"] == ["zebra"]


def requests_of(browser):
    """The addresses that a browser has asked for since it was asked this before."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls = {one["request"]["url"] for one in sent}
    return {url for url in urls if not url.startswith("data:")}


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


def pictures_on(browser):
    """The pictures of a page without errors. Names and texts are only text. Where two pictures have
    the same name, a folder tells which is which. Words that the model lacks are named, too."""
    cards = [card.text for card in all_of(browser, "#results figcaption")]
    assert any(HOSTILE in card for card in cards)
    assert {"more/" in card for card in cards if card.startswith("04.png")} == {False, True}
    assert browser.execute_script("return document.querySelector('[onerror]')") is None
    for result in all_of(browser, "#results section"):
        assert ("“onerror”" in result.text) != result.text.startswith("Like ")
    assert browser.get_log("browser") == []
    return [picture.get_attribute("src") for picture in all_of(browser, "#results figure img")]


def test_a_visit(browser, address):
    """A reader types, sees pictures, and asks for more like one of them, which is not found again.
    The page asks for nothing but what is below its address."""
    browser.implicitly_wait(30)  # for what an answer brings
    requests_of(browser)  # what other tests have asked for
    browser.get(address)

    all_of(browser, "#field")[0].send_keys(HOSTILE + "\ue007")  # Enter
    browser.find_element("xpath", "//h2[starts-with(text(), '“')]")
    found = pictures_on(browser)
    all_of(browser, ".like")[3].click()
    browser.find_element("xpath", "//h2[starts-with(text(), 'Like ')]")
    assert set(pictures_on(browser)) == {*found} - {found[3]}
    assert all(request.startswith(address) for request in requests_of(browser))
