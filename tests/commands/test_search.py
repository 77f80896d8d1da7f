"""scripts/search.py against the slow way to search, and the file that keeps features."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from material import (
    COLOURS,
    TOKENIZER,
    error_of,
    features_of,
    make_model,
    png,
    result_of,
    run,
    write_shard,
)
from PIL import Image

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
    evaluation.write_checkpoint(path, make_model(), TOKENIZER.vocab, header={"arguments": options})

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
        entries = search.file_entries([folder])
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
        [entries[colour]] = search.file_entries([path])
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
    monkeypatch.chdir(folders)
    sample = {"png": Path("red/0.png").read_bytes(), "txt": b"a red ring", "json": b'{"image":"r"}'}
    write_shard("a.tar", [sample])
    argv = ["--checkpoint", checkpoint, "--data", "a.tar", "--images", "blue", "a red zebra"]
    argv += ["--like", "green/0.png", "--features", tmp_path / "x.npz"]

    results, printed = result_of(capsys, search.main, tmp_path / "found.json", *argv)

    by_image, by_text = results
    assert by_image["like"] == "green/0.png"
    assert by_text["text"] == "a red zebra"
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
