"""scripts/search.py against the slow way to search, the file that keeps features, and the pages of
scripts/serve.py in a real browser."""

import json
import os
import re
import shutil
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
    TOKENIZER,
    error_of,
    make_model,
    png,
    result_of,
    run,
    write_checkpoint,
    write_shard,
)
from PIL import Image
from webpage import are_near, numbers_of, requests_of

import eval as evaluation
from scripts import search
from scripts.pictures import GAP

TEXTS = ["a photo of the red square", "blue thing " * 200]  # the second is longer than the context


@pytest.fixture
def folders(folders):
    """The usual folders, with pictures that differ enough for a model with random weights."""
    for i, file in enumerate(sorted(folders.rglob("*.png"))):
        pixels = np.random.default_rng(i).integers(0, 256, (3, 3, 3), np.uint8)
        Image.fromarray(pixels).resize((20, 20), Image.NEAREST).save(file)
    return folders


def found(capsys, *argv, workers=0):
    """Run a search that succeeds. Returns what it prints, and for each search a list of (score,
    name and what else is known of the image)."""
    capsys.readouterr()
    assert not run(search.main, *argv, "--workers", workers)
    printed = capsys.readouterr().out
    results = []
    for block in printed.split("\n\n")[1:]:
        lines = [line.split(maxsplit=1) for line in block.splitlines()[1:]]
        if lines:
            results.append([(float(score), name) for score, name in lines])
    return printed, results


def features_of(checkpoint, files):
    """The features (N, E) of files, one after the other."""
    model, _, preprocess = evaluation.load(checkpoint)
    images = [preprocess(Path(file).read_bytes()) for file in files]
    return torch.cat([model.encode_image(image[None]) for image in images])


# ---- What is found


@pytest.mark.parametrize("workers", [0, 2])
def test_the_ranking_is_the_slow_and_obvious_one(folders, checkpoint, capsys, monkeypatch, workers):
    """For texts and images. An image does not find itself. Names are printed without the current
    folder."""
    monkeypatch.chdir(folders)
    photo = Path("red/2.png")
    argv = ["--checkpoint", checkpoint, "--images", ".", "--like", photo, *TEXTS, "--k", 7]

    printed, results = found(capsys, *argv, workers=workers)

    model, tokenizer, _ = evaluation.load(checkpoint)
    queries = [*features_of(checkpoint, [photo]), *model.encode_text(tokenizer(TEXTS))]
    files = [*Path().rglob("*.png")]
    features = dict(zip(map(str, files), features_of(checkpoint, files)))
    assert printed.startswith("12 images;")
    for title, query, result in zip([f"like {photo}", *TEXTS], queries, results, strict=True):
        slow = sorted(((float(f @ query), name) for name, f in features.items()), reverse=True)
        if title not in TEXTS:
            slow = [(score, name) for score, name in slow if name != str(photo)]
        assert f"\n{title}\n" in printed
        assert [name for _, name in result] == [name for _, name in slow[:7]]
        assert [s for s, _ in result] == pytest.approx([s for s, _ in slow[:7]], abs=6e-4)


# A guess has ln 4 = 1.39 in groups of 4.
@pytest.mark.parametrize("val_loss, is_said", [(1.5, True), (1.2, False)])
def test_what_overfits_is_not_trusted(folders, checkpoint, tmp_path, capsys, val_loss, is_said):
    """The log of the run, which lies beside the checkpoint, tells."""
    header = {"header": {"arguments": {"batch_size": 4}}, "step": 0}
    row = {"step": 1, "loss": 0.1, "contrastive_loss": 0.1}
    validation = {"step": 1, "val_contrastive_loss": val_loss, "val_group": 4}
    lines = [json.dumps(line) for line in (header, row, validation)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    shutil.copy(checkpoint, tmp_path / "best.pt")
    argv = ["--images", folders / "red", TEXTS[0]]

    printed, _ = found(capsys, "--checkpoint", tmp_path / "best.pt", *argv)

    assert ("--epochs" in printed) == is_said


def test_a_log_of_another_program_is_no_reason_to_stop(folders, checkpoint, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("hello\n")
    shutil.copy(checkpoint, tmp_path / "best.pt")

    _, results = found(
        capsys, "--checkpoint", tmp_path / "best.pt", "--images", folders / "red", TEXTS[0]
    )

    assert len(results) == 1


def test_an_image_does_not_find_its_copies(folders, checkpoint, capsys):
    photo = folders / "red" / "2.png"
    copy = folders / "green" / "copy.png"
    copy.write_bytes(photo.read_bytes())
    argv = ["--checkpoint", checkpoint, "--images", folders, "--like", photo, "--k", 500]

    _, [result] = found(capsys, *argv)

    assert len(result) == 11
    assert not {str(photo), str(copy)} & {name for _, name in result}


def test_shards_and_folders_are_searched_together(folders, checkpoint, tmp_path, capsys):
    """Also an image without a caption, which other commands skip. Captions and the names of packed
    files are printed. A file that is named twice is found once."""
    first, second = folders / "red" / "0.png", folders / "green" / "0.png"
    samples = [
        {"png": first.read_bytes(), "txt": b"a red ring", "json": b'{"image": "r.png"}'},
        {"png": second.read_bytes()},
    ]
    shards = [write_shard(tmp_path / f"{i}.tar", samples) for i in range(2)]
    argv = ["--checkpoint", checkpoint, "--data", tmp_path / "{0..1}.tar", TEXTS[0]]
    argv += ["--images", folders / "blue", "--images", folders / "blue" / "0.png"]

    _, [result] = found(capsys, *argv)

    known = {name.split()[0]: name.split()[1:] for _, name in result}
    expected = {str(file): [] for file in folders.glob("blue/*")}
    for shard in shards:
        expected |= {f"{shard}:0000": ["r.png", "a", "red", "ring"], f"{shard}:0001": []}
    assert known == expected
    assert len(result) == len(expected)


def test_broken_images_are_skipped_and_odd_names_are_not(folders, checkpoint, tmp_path, capsys):
    """Also in the picture, and the second time, when there is nothing new but broken images."""
    broken = [folders / "red" / f"{i}.png" for i in range(3)]
    for path, content in zip(broken, (b"no image", b"", b"\x89PNG\r\n\x1a\n")):
        path.write_bytes(content)
    odd = os.fsencode(folders) + b"/\x1b\xe2\x80\xae\xff \xc3\xa9.png"
    os.rename(folders / "red" / "3.png", odd)
    argv = ["--checkpoint", checkpoint, "--images", folders, "--features", tmp_path / "x.npz"]

    for _ in range(2):
        printed, [result] = found(capsys, *argv, TEXTS[0], "--out", tmp_path / "x.png")

        assert len(result) == 9
        assert rf"{folders}/\x1b\u202e\udcff é.png" in printed
        for path in broken:
            assert printed.count(f"skipped {path}: ") == 1


def test_without_images_the_validation_pictures_of_the_run_are_searched(tmp_path, capsys):
    """With the captions of the run: those of json.long, where txt says something else."""
    picture = png(COLOURS["red"], np.random.default_rng(0))
    sample = {"png": picture, "txt": b"short", "json": b'{"long": "a red ring"}'}
    shard = write_shard(tmp_path / "val.tar", [sample, sample])
    options = {"val_data": [shard], "val_captions": ["json.long"], "captions": ["txt"]}
    path = tmp_path / "best.pt"
    evaluation.write_checkpoint(path, make_model(), TOKENIZER.vocab, arguments=options)

    _, [result] = found(capsys, "--checkpoint", path, "red")

    assert sorted(name for _, name in result) == [f"{shard}:000{i}  a red ring" for i in range(2)]


# ---- The file of features


def test_the_file_of_features_says_where_each_image_is(folders, checkpoint, tmp_path, capsys):
    """Another program can read it: each name has its feature, and its place holds the image."""
    packed = folders / "red" / "0.png"
    shard = write_shard(tmp_path / "a.tar", [{"png": packed.read_bytes()}])
    argv = ["--checkpoint", checkpoint, "--data", shard, "--images", folders / "blue", TEXTS[0]]

    found(capsys, *argv, "--features", tmp_path / "x.npz")

    kept = np.load(tmp_path / "x.npz", allow_pickle=False)
    originals = {str(file): file for file in folders.glob("blue/*")} | {f"{shard}:0000": packed}
    assert set(kept["names"]) == set(originals)
    assert kept["features"].dtype == np.float32
    for i, name in enumerate(kept["names"]):
        file, offset, size = kept["files"][i], kept["offsets"][i], kept["sizes"][i]
        content = originals[name].read_bytes()
        assert Path(file).read_bytes()[offset : offset + size] == content
        assert kept["mtimes"][i] == os.stat(file).st_mtime_ns
    expected = features_of(checkpoint, [originals[name] for name in kept["names"]])
    np.testing.assert_allclose(kept["features"], expected, atol=1e-5)


class Counted:
    """Finds the features of all images of a folder, and counts how many are encoded for it."""

    def __init__(self, model, kept):
        self.model = model
        self.kept = kept
        self.n = 0
        self.stop_at = None  # Ctrl-C comes with this image
        model.visual.register_forward_hook(self.count)

    def count(self, *_):
        self.n += 1
        if self.n == self.stop_at:
            raise KeyboardInterrupt

    def __call__(self, folder):
        self.n = 0
        entries = search.file_entries([folder], None)
        features = search.find_features(self.model, entries, 0, self.kept, "sha", batch_size=1)
        names = [entry.name for entry in features]
        assert names == sorted(str(file.absolute()) for file in Path(folder).rglob("*.png"))
        assert np.load(self.kept)["names"].tolist() == names
        return self.n


@pytest.fixture
def encoded(checkpoint, tmp_path):
    model, _, _ = evaluation.load(checkpoint)
    return Counted(model, tmp_path / "x.npz")


def test_a_search_that_is_interrupted_goes_on_where_it_was(folders, encoded):
    encoded.stop_at = 11
    with pytest.raises(KeyboardInterrupt):
        encoded(folders)
    encoded.stop_at = None

    assert encoded(folders) == 2
    assert encoded(folders) == 0


def test_only_new_and_changed_images_are_encoded(folders, encoded, monkeypatch):
    """The second edit keeps the size of the file."""
    assert encoded(folders) == 12
    for colour in ("red", "blue"):
        picture = Image.new("RGB", (20, 20), colour)
        picture.save(folders / "red" / "1.png", compress_level=0)
        assert encoded(folders) == 1
    (folders / "blue" / "3.png").unlink()
    assert encoded(folders) == 0
    (folders / "blue" / "2.png").rename(folders / "blue" / "9.png")
    assert encoded(folders) == 1
    monkeypatch.chdir(folders.parent)
    assert encoded("classes") == 0


CHANGES = {
    "float64": lambda features: features.astype(np.float64),
    "float16": lambda features: features.astype(np.float16),
    "NaN": lambda features: features * np.nan,
    "another width": lambda features: features[:, :-1],
    "fewer": lambda features: features[:-1],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_features_that_another_program_has_changed_are_refused(
    change, folders, checkpoint, tmp_path, capsys
):
    path = tmp_path / "x.npz"
    argv = ["--checkpoint", checkpoint, "--images", folders, "--features", path, TEXTS[0]]
    found(capsys, *argv)
    content = dict(np.load(path))
    content["features"] = change(content["features"])
    np.savez(path, **content)

    error = error_of(capsys, search.main, *argv)

    assert "x.npz" in error


# ---- The picture


def test_each_search_begins_a_row_of_the_picture(folders, tmp_path):
    """Also if one has found fewer than the others: each has its own colour, and no row two."""
    colours = ["red", "green", "blue"]
    entries = {}
    for colour in colours:
        path = folders / f"{colour}.png"
        Image.new("RGB", (20, 20), colour).save(path)
        [entries[colour]] = search.file_entries([path], None)
    counts = {"red": 2, "green": 3, "blue": 8}  # the last one has eight, and a row seven
    blocks = [[(entries[colour], "")] * n for colour, n in counts.items()]

    search.draw(blocks, tmp_path / "found.png")

    picture = torch.from_numpy(np.array(Image.open(tmp_path / "found.png")))
    step = search.SIDE + GAP
    assert picture.shape[1] == GAP + 7 * step
    top_of_rows = (picture != 255).any(dim=2).any(dim=1).nonzero().flatten()
    rows = [y for y in top_of_rows.tolist() if y - 1 not in top_of_rows]
    shown = []
    for y in rows:
        cells = [picture[y + 5, GAP + i * step + 5] for i in range(7)]
        shown.append([tuple(cell.tolist()) for cell in cells])
    red, green, blue, white = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)
    assert shown[0] == [red] * 2 + [white] * 5
    assert shown[1] == [green] * 3 + [white] * 4
    assert shown[2] == [blue] * 7
    assert shown[3] == [blue] + [white] * 6


def test_the_command_draws_the_picture(folders, checkpoint, tmp_path, capsys):
    """Of a text and an image, where the image finds one fewer because it does not find itself."""
    photo = folders / "red" / "0.png"
    argv = ["--checkpoint", checkpoint, "--images", folders / "red", "--like", photo, TEXTS[0]]

    found(capsys, *argv, "--k", 4, "--out", tmp_path / "found.png")

    assert Image.open(tmp_path / "found.png").width == GAP + 5 * (search.SIDE + GAP)


# ---- The file of results


def test_json_keeps_names_captions_and_scores(folders, checkpoint, tmp_path, capsys, monkeypatch):
    """And the words that the model does not know."""
    monkeypatch.chdir(folders)
    sample = {"png": Path("red/0.png").read_bytes(), "txt": b"a red ring", "json": b'{"image":"r"}'}
    write_shard("a.tar", [sample])
    argv = ["--checkpoint", checkpoint, "--data", "a.tar", "--images", "blue", "a red zebra"]
    argv += ["--like", "green/0.png", "--features", tmp_path / "x.npz"]

    results, printed = result_of(capsys, search.main, tmp_path / "found.json", *argv)

    by_image, by_text = results
    assert by_image["like"] == "green/0.png"
    assert by_text["text"] == "a red zebra"
    assert list(by_text["unknown"]) == ["zebra"]
    features = np.load(tmp_path / "x.npz")
    query = features_of(checkpoint, ["green/0.png"])[0].numpy()
    for result in results:
        found = {one["name"]: one for one in result["found"]}
        assert sorted(found) == ["a.tar:0000", *(f"blue/{i}.png" for i in range(4))]
        assert (found["a.tar:0000"]["file"], found["a.tar:0000"]["caption"]) == ("r", "a red ring")
        assert (found["blue/0.png"]["file"], found["blue/0.png"]["caption"]) == ("", "")
    for one in by_image["found"]:
        feature = features["features"][
            features["names"].tolist().index(os.path.abspath(one["name"]))
        ]
        assert one["score"] == pytest.approx(feature @ query, abs=1e-5)
        assert f"{one['score']:8.3f}  {one['name']}" in printed


# ---- The pages

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

    assert "zebra" in all_of(opened, "#results > section > p")[0].text
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
    words = evaluation.top_words(model, tokenizer, image[None], 8)[0]
    _, maps = evaluation.word_maps(model, image, [i for _, _, i in words], window=1)
    assert words[1][0] in figure.text
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
    assert "zebra" in all_of(browser, "#results")[0].text
    assert all_of(browser, "#x, [onerror], form:not([hidden]), .actions") == []
    assert browser.title != "stolen"
