"""The pages of scripts/serve.py in a real browser, and who is answered."""

import json
import os
import re
import signal
import socket
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from children import Children, finish
from material import (
    COLOURS,
    TINY,
    error_of,
    features_of,
    make_model,
    png,
    run,
    write_checkpoint,
    write_shard,
)
from PIL import Image
from webpage import are_near, numbers_of, requests_of

import eval as evaluation
from scripts import search, words

HOSTILE = "<img src=x onerror=document.title='stolen'></script><b id=x>a red \u2028ring"
HOSTILE_NAME = "<img src=x onerror=document.title='stolen'>.png"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a checkpoint, pictures in three colours, one of which has a hostile name, and a
    shard of one picture with a hostile caption."""
    world = tmp_path_factory.mktemp("world")
    (world / "photos").mkdir()
    for i in range(30):
        pixels = np.random.default_rng(i).integers(0, 256, (3, 3, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((20, 20), Image.NEAREST)
        picture.save(world / "photos" / f"{i:02d}.png")
    (world / "photos" / "05.png").rename(world / "photos" / HOSTILE_NAME)
    picture = png(COLOURS["red"], np.random.default_rng(0))
    write_shard(world / "a.tar", [{"png": picture, "txt": HOSTILE.encode()}])
    write_checkpoint(world / "model.pt", make_model())
    return world


@contextmanager
def serving(world, *options):
    """The command with --serve, as a process, and the address that it names."""
    argv = ["--checkpoint", world / "model.pt", "--images", world / "photos", "--workers", 0]
    argv += ["--data", world / "a.tar", "--serve", "--port", 0, *options]
    children = Children(Path(tempfile.mkdtemp(dir=world)), TINY)
    process = children.start("scripts.search", argv)
    try:
        yield process, address_in(process.output)
    finally:
        children.end()


def address_in(output):
    """Waits until the address is there."""
    deadline = time.monotonic() + 60
    while True:
        printed = output.read_text() if output.exists() else ""
        found = re.search(r"http://\S+(?= in a browser)", printed)
        if found:
            return found[0]
        assert time.monotonic() < deadline, printed
        time.sleep(0.02)


@pytest.fixture(scope="module")
def address(server, world):
    with serving(world) as (_, address):
        yield address


@pytest.fixture(scope="module")
def slow_search(world):
    """The slow way to search: names of all pictures, and their features (N, E)."""
    files = sorted((world / "photos").glob("*.png"))
    return [file.name for file in files], features_of(world / "model.pt", files)


def ask(address, path, host=None):
    """A connection on which the server has been asked for `path`, which is sent as it is."""
    port, folder = re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/.+/)", address).groups()
    lines = [f"GET {path.replace('TOKEN/', folder)} HTTP/1.0", f"Host: {host or '127.0.0.1'}"]
    if host == "none":
        lines.pop()
    connection = socket.create_connection(("127.0.0.1", int(port)), timeout=30)
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    return connection


def answer_of(address, path, host=None):
    """The status and the text with which the server answers."""
    with ask(address, path, host) as connection:
        answer = connection.makefile("rb").read().decode()
    return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]


REFUSED = [
    "TOKEN/../../../../../../etc/passwd",
    "TOKEN/photos/01.png",
    "TOKEN/picture?number=../model.pt",
    "TOKEN/picture?number=31",
    "TOKEN/picture?number=-1",
    "TOKEN/picture?number=" + "9" * 5000,
    "TOKEN/picture",
    "TOKEN/words?number=31",
    "TOKEN/search?like=31",
    "TOKEN/search?text=red&skip=x",
    "TOKEN/search",
    "/",
    "/picture?number=0",
    "/AAAAAAAAAAAAAAAAAAAAAA/picture?number=0",
    "/\u00e9/picture?number=0",
    "//[/",
]


@pytest.mark.parametrize("path", REFUSED, ids=lambda path: path[:40])
def test_nothing_but_numbers_of_pictures_is_served(address, path):
    status, text = answer_of(address, path)

    assert status == 404
    assert len(text) < 1000


HOSTS = {
    "localhost": 200,
    "localhost:1234": 200,
    "127.0.0.1:1": 200,
    "evil.example": 404,
    "localhost.evil.example:80": 404,
    "127.0.0.1.evil.example": 404,
    "none": 404,
}


@pytest.mark.parametrize("host", HOSTS)
def test_only_hosts_of_this_machine_are_answered(address, host):
    """With any port, because that of ssh -L may be another. A website that gives its name the
    address 127.0.0.1 is none of them."""
    for path in ("TOKEN/", "TOKEN/picture?number=0"):
        status, _ = answer_of(address, path, host)

        assert status == HOSTS[host]


def test_the_server_finds_what_the_slow_search_finds(address, world, slow_search):
    """For a text and for a picture, and page by page."""
    names, features = slow_search
    model, tokenizer, _ = evaluation.load(world / "model.pt")
    queries = {"text=a+red+square": model.encode_text(tokenizer(["a red square"]))[0]}
    queries["like=7"] = features[7]
    for query, feature in queries.items():
        found = []
        for skip in (0, 12, 24):
            _, text = answer_of(address, f"TOKEN/search?{query}&skip={skip}")
            found += json.loads(text)["found"]

        score_of = dict(zip(names, (features @ feature).tolist()))
        if query == "like=7":
            del score_of[names[7]]
        best = sorted(score_of, key=score_of.get, reverse=True)
        in_folder = [one for one in found if not one["caption"]]
        assert [Path(one["name"]).name for one in in_folder] == best
        assert [one["score"] for one in in_folder] == pytest.approx(
            [score_of[name] for name in best], abs=1e-5
        )
        assert len(found) == len(best) + 1  # the one in the shard


def test_ctrl_c_ends_it(server, world):
    """Also while it computes: Python cannot end threads that are inside torch."""
    with serving(world) as (process, address):
        asked = [ask(address, f"TOKEN/maps?number={i}") for i in range(6)]
        asked[0].recv(1)

        os.kill(process.pid, signal.SIGINT)

        code, printed = finish(process)
        _, _, last = printed.partition("Ctrl-C ends it\n")
        assert code == 0
        assert last.count("\n") <= 2  # and no trace


def test_a_port_that_is_taken_is_a_sentence(address, world, capsys):
    port = address.split(":")[2].split("/")[0]

    error = error_of(capsys, search.main, "--checkpoint", "none.pt", "--serve", "--port", port)

    assert "--port" in error


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


@pytest.fixture
def opened(browser, address):
    """A browser that has just opened the page."""
    browser.implicitly_wait(30)  # for elements that an answer brings
    browser.get_log("browser")
    browser.get("about:blank")  # or a page that differs after "#" only would not be loaded
    browser.get(address)
    return browser


def type_in(browser, text):
    field = browser.find_element("css selector", "#field")
    field.clear()
    field.send_keys(text + "\ue007")  # Enter
    browser.find_element("xpath", f"//h2[contains(text(), '{text}')]")


def titles_of(browser):
    return [title.text for title in all_of(browser, "#results figcaption p")]


def test_a_reader_types_and_sees_the_best_pictures(opened, world, slow_search):
    names, features = slow_search
    model, tokenizer, _ = evaluation.load(world / "model.pt")

    type_in(opened, "a blue zebra")

    scores = features @ model.encode_text(tokenizer(["a blue zebra"]))[0]
    best = [names[i] for i in scores.argsort(descending=True)]
    titles = [title for title in titles_of(opened) if title.endswith(".png")]
    assert titles == best[: len(titles)]
    assert len(titles_of(opened)) == 12
    pictures = "img[src^='data:image/jpeg']"
    opened.find_element("css selector", f"#results li:last-child {pictures}")


def test_more_results_and_more_like_this_work_by_keyboard_and_back_goes_back(opened, slow_search):
    names, features = slow_search
    type_in(opened, "red")
    first = titles_of(opened)

    all_of(opened, "#results section > p > button")[0].send_keys("\ue007")
    opened.find_element("css selector", "#results li:nth-child(24)")
    assert titles_of(opened)[:12] == first
    focused = opened.switch_to.active_element  # the first new picture
    title = focused.find_element("xpath", "ancestor::figure//p").text
    assert title == titles_of(opened)[12]
    focused.send_keys("\ue007")
    opened.find_element("xpath", "//h2[contains(text(), 'Like this picture')]")

    if title in names:
        scores = features @ features[names.index(title)]
        best = [names[i] for i in scores.argsort(descending=True)[1:]]
        found = [title for title in titles_of(opened) if title.endswith(".png")]
        assert found == best[: len(found)]
    opened.back()
    opened.find_element("xpath", "//h2[contains(text(), 'red')]")
    assert titles_of(opened) == first


def test_a_click_on_a_word_shows_its_map(opened, world, slow_search):
    type_in(opened, "red")
    [title] = [title for title in titles_of(opened) if title.endswith(".png")][:1]
    figure = opened.find_element("xpath", f'//figure[.//p[text()="{title}"]]')

    figure.find_element("css selector", ".actions button").click()
    word = figure.find_elements("css selector", ".words button")[1]
    word.click()
    canvas = figure.find_element("css selector", "canvas:not([hidden])")

    model, tokenizer, preprocess = evaluation.load(world / "model.pt")
    image = preprocess((world / "photos" / title).read_bytes())
    top = evaluation.top_words(model, tokenizer, image[None], 8)[0]
    _, maps = words.word_maps(model, image, [i for _, _, i in top], window=1)
    assert top[1][0] in figure.text
    script = "return [...arguments[0].getContext('2d').getImageData(0, 0, 4, 4).data]"
    pixels = torch.tensor(opened.execute_script(script, canvas)).view(4, 4, 4)
    assert are_near(pixels[:, :, 3].tolist(), 220 * maps[1].abs() / maps.abs().max(), 1.5)


def test_the_page_says_that_maps_take_time_and_that_the_server_has_gone(opened):
    type_in(opened, "red")
    all_of(opened, ".actions button")[0].click()
    word = all_of(opened, ".words button")[0]

    opened.execute_script("window.fetch = () => new Promise(() => {})")  # there is no answer yet
    word.click()
    assert all_of(opened, "figure progress")[0].is_displayed()

    opened.execute_script("window.fetch = () => Promise.reject()")
    all_of(opened, "#form button")[0].click()
    opened.find_element("xpath", "//*[@id='status'][contains(text(), 'server')]")


def test_hostile_captions_and_names_are_text(opened, address):
    """And the page asks for nothing but what is below its address."""
    type_in(opened, "<b id=x>")
    for _ in range(2):
        all_of(opened, "#results section > p > button")[0].click()
        opened.find_element("css selector", "#results section > p > button:enabled, button[hidden]")
    opened.find_element("css selector", "#results li:nth-child(31)")

    opened.implicitly_wait(0)
    titles = titles_of(opened)
    assert HOSTILE_NAME in titles
    assert HOSTILE.split("\u2028")[0].strip() in " ".join(titles)
    assert all_of(opened, "#x, [onerror]") == []
    assert opened.title != "stolen"
    script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert all(request.startswith(address) for request in opened.execute_script(script))
    assert opened.get_log("browser") == []


def test_plain_clip_is_served_without_words(server, browser, world):
    write_checkpoint(world / "clip.pt", make_model(cls_weight=0))
    with serving(world, "--checkpoint", str(world / "clip.pt")) as (_, address):
        browser.implicitly_wait(30)
        browser.get(address)
        type_in(browser, "red")

        assert len(all_of(browser, ".like")) == 12
        browser.implicitly_wait(0)
        assert all_of(browser, ".actions button") == []


PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}


def test_the_page_of_out_needs_no_network_and_fits_a_phone(browser, world, capsys):
    """One file with the results of several searches, and their pictures."""
    photo = world / "photos" / HOSTILE_NAME
    path = world / "found.html"
    argv = ["--checkpoint", world / "model.pt", "--images", world / "photos", "--workers", 0]
    argv += ["--data", world / "a.tar", "red zebra", HOSTILE, "--like", photo, "--k", 31]
    assert not run(search.main, *argv, "--out", path)
    browser.implicitly_wait(0)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    browser.get_log("performance")
    browser.get_log("browser")

    browser.get(path.as_uri())

    assert requests_of(browser) == {path.as_uri()}
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    results = numbers_of(path)["results"]
    assert [len(result["found"]) for result in results] == [30, 31, 31]
    assert len(all_of(browser, "#results section")) == 3
    shown = all_of(browser, "#results li img")
    assert len(shown) == 92
    assert all(image.get_property("naturalWidth") == 224 for image in shown)
    assert all_of(browser, "#x, [onerror], form:not([hidden]), .actions") == []
    assert browser.title != "stolen"
