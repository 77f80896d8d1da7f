"""scripts/search.py against the slow way to search, and the file that keeps features."""

import os
from pathlib import Path

import numpy as np
import pytest
from material import (
    COLOURS,
    TOKENIZER,
    features_of,
    make_model,
    png,
    result_of,
    run,
    write_shard,
    write_tar,
)
from PIL import Image

import eval as evaluation
from scripts import search
from scripts.pictures import GAP

TEXTS = ["a photo of the red square", "blue thing " * 200]  # the second is longer than the context


@pytest.fixture
def folders(folders, monkeypatch):
    """The usual folders, with pictures that differ enough for a model with random weights."""
    for i, file in enumerate(sorted(folders.rglob("*.png"))):
        pixels = np.random.default_rng(i).integers(0, 256, (3, 3, 3), np.uint8)
        Image.fromarray(pixels).resize((20, 20), Image.NEAREST).save(file)
    monkeypatch.chdir(folders)
    return folders


@pytest.mark.parametrize("workers", [0, 2])
def test_the_ranking_is_the_slow_and_obvious_one(folders, checkpoint, capsys, workers):
    """For an image and for texts. An image finds neither itself nor its copy."""
    photo = Path("red/2.png")
    Path("green/copy.png").write_bytes(photo.read_bytes())
    argv = ["--checkpoint", checkpoint, "--images", ".", "--like", photo, *TEXTS, "--k", 7]

    path = folders / "found.json"
    results, printed = result_of(capsys, search.main, path, *argv, "--workers", workers)

    model, tokenizer, _ = evaluation.load(checkpoint)
    queries = [*features_of(checkpoint, [photo]), *model.encode_text(tokenizer(TEXTS))]
    files = [*Path().rglob("*.png")]
    features = features_of(checkpoint, files)
    for result, query in zip(results, queries, strict=True):
        score_of = dict(zip(map(str, files), (features @ query).tolist()))
        if "like" in result:
            del score_of["red/2.png"], score_of["green/copy.png"]
        best = sorted(score_of, key=score_of.get, reverse=True)[:7]
        assert [found["name"] for found in result["found"]] == best
        for found in result["found"]:
            assert found["score"] == pytest.approx(score_of[found["name"]], abs=1e-5)
            assert f"{found['score']:8.3f}  {found['name']}\n" in printed


def test_shards_and_folders_are_searched_together(folders, checkpoint, capsys):
    """With captions and the names of packed files, and also an image without a caption. A file that
    is named twice is found once."""
    picture = Path("red/0.png").read_bytes()
    sample = {"png": picture, "txt": b"a red ring", "json": b'{"image": "r.png"}'}
    write_shard("a.tar", [sample, {"png": Path("red/1.png").read_bytes()}])
    argv = ["--checkpoint", checkpoint, "--data", "a.tar", "--images", "blue"]
    argv += ["--images", "blue/0.png", TEXTS[0]]

    [result], _ = result_of(capsys, search.main, folders / "found.json", *argv)

    found = [(one["name"], one["file"], one["caption"]) for one in result["found"]]
    expected = [("a.tar:0000", "r.png", "a red ring"), ("a.tar:0001", "", "")]
    assert sorted(found) == expected + [(f"blue/{i}.png", "", "") for i in range(4)]


def test_without_images_the_validation_pictures_of_the_run_are_searched(tmp_path, capsys):
    """With the captions of the run: those of json.long, where txt says something else."""
    picture = png(COLOURS["red"], np.random.default_rng(0))
    sample = {"png": picture, "txt": b"short", "json": b'{"long": "a red ring"}'}
    shard = write_shard(tmp_path / "val.tar", [sample])
    options = {"val_data": [shard], "val_captions": ["json.long"], "captions": ["txt"]}
    header = {"arguments": options}
    evaluation.write_checkpoint(tmp_path / "a.pt", make_model(), TOKENIZER.vocab, header=header)

    assert not run(search.main, "--checkpoint", tmp_path / "a.pt", "red")

    assert f"{shard}:0000  a red ring" in capsys.readouterr().out


def test_each_search_begins_a_row_of_the_picture(folders, checkpoint):
    """With a cell for what it was for, which is white for a text. A row has seven cells."""
    argv = ["--checkpoint", checkpoint, "--images", ".", "--k", 8, "--out", "found.png"]

    assert not run(search.main, *argv, "--like", "red/0.png", TEXTS[0])

    picture = Image.open("found.png").convert("L")
    across = search.SIDE + GAP
    down = (picture.height - GAP) // 4
    assert picture.width == GAP + 7 * across
    shown = ""
    for row in range(4):
        for column in range(7):
            centre = GAP + column * across + 90, GAP + row * down + 90
            shown += "." if picture.getpixel(centre) == 255 else "x"
        shown += " "
    assert shown == "xxxxxxx xx..... .xxxxxx xx..... "


# ---- the file of features


def test_another_program_can_read_the_features(folders, checkpoint, capsys):
    """Also those of shards, where tar headers shorten two long names to one. With the file, the
    command finds what it has found without."""
    pictures = [Path("red/0.png"), Path("red/1.png")]
    members = [("n" * 150 + f"{i}.png", path.read_bytes()) for i, path in enumerate(pictures)]
    write_tar("a.tar", members)
    argv = ["--checkpoint", checkpoint, "--data", "a.tar", "--images", "blue", TEXTS[0]]
    argv += ["--features", "x.npz"]

    first, again = [result_of(capsys, search.main, folders / "a.json", *argv) for _ in range(2)]

    assert again == first
    kept = np.load("x.npz")
    files = sorted(Path("blue").iterdir())
    shard_names = [f"{folders}/a.tar:{'n' * 100}"] * 2
    assert kept["names"].tolist() == [f"{folders}/{file}" for file in files] + shard_names
    expected = features_of(checkpoint, [*files, *pictures])
    np.testing.assert_allclose(kept["features"], expected, atol=1e-5)


def test_only_new_and_changed_images_are_encoded(folders, checkpoint):
    """The edit keeps the size of the file. Features of zero tell which are as they were."""
    Image.new("RGB", (20, 20), "red").save("red/1.png", compress_level=0)
    argv = ["--checkpoint", checkpoint, "--images", ".", "--features", "x.npz", TEXTS[0]]
    assert not run(search.main, *argv)
    content = dict(np.load("x.npz"))
    content["features"][:] = 0
    np.savez("x.npz", **content)

    Image.new("RGB", (20, 20), "blue").save("red/1.png", compress_level=0)
    Path("blue/2.png").rename("blue/9.png")
    assert not run(search.main, *argv)

    kept = np.load("x.npz")
    encoded = kept["names"][kept["features"].any(axis=1)].tolist()
    assert encoded == [f"{folders}/blue/9.png", f"{folders}/red/1.png"]
    Path("blue/3.png").unlink()
    assert not run(search.main, *argv)
    files = sorted(str(file.absolute()) for file in Path().rglob("*.png"))
    assert np.load("x.npz")["names"].tolist() == files


def test_a_search_that_is_interrupted_keeps_what_it_has_encoded(folders, checkpoint):
    """Ctrl-C comes with the second batch of 128 images."""
    for i in range(128):
        Path(f"{i}.png").write_bytes(Path("red/0.png").read_bytes())
    model, _, _ = evaluation.load(checkpoint)

    def stop(_, inputs):
        if len(inputs[0]) < 128:
            raise KeyboardInterrupt

    model.visual.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        search.find_features(model, search.file_entries(["."]), None, 0, Path("x.npz"))

    assert len(np.load("x.npz")["names"]) == 128


def test_broken_images_are_skipped_and_odd_names_are_not(folders, checkpoint, capsys):
    """Also the second time, when there is nothing new but broken images."""
    for i, content in enumerate((b"no image", b"", b"\x89PNG\r\n\x1a\n")):
        Path(f"red/{i}.png").write_bytes(content)
    os.rename("red/3.png", b"red/\x1b\xe2\x80\xae\xff \xc3\xa9.png")
    argv = ["--checkpoint", checkpoint, "--images", "red", "--features", "x.npz", TEXTS[0]]
    for _ in range(2):
        assert not run(search.main, *argv, "--workers", 0)

        printed = capsys.readouterr().out
        assert printed.count("skipped /") == 3
        assert r"red/\x1b\u202e\udcff é.png" in printed
