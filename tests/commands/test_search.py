"""scripts/search.py against the slow way to search, and the file that keeps features."""

import os
from pathlib import Path

import numpy as np
import pytest
from material import run, write_shard
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
    """Run a search that succeeds -> what it prints, and a list of (score, name) for each text."""
    capsys.readouterr()
    assert not run(search.main, *argv, "--workers", workers)
    printed = capsys.readouterr().out
    blocks = [block.splitlines()[1:] for block in printed.split("\n\n")[1:]]
    lines = [[line.split(maxsplit=1) for line in block] for block in blocks if block]
    return printed, [[(float(score), name) for score, name in block] for block in lines]


def feature_of(checkpoint, file):
    model, _, preprocess = evaluation.load(checkpoint)
    return model.encode_image(preprocess(Path(file).read_bytes())[None])[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_ranking_is_the_slow_and_obvious_one(folders, checkpoint, capsys, monkeypatch, workers):
    """For texts and images. An image does not find itself or its copies. Names are printed without
    the current folder."""
    monkeypatch.chdir(folders)
    files, photo = sorted(Path().rglob("*.png")), Path("red/2.png")
    argv = ["--checkpoint", checkpoint, "--images", ".", "--like", photo, *TEXTS, "--k", 7]
    printed, blocks = found(capsys, *argv, workers=workers)
    model, tokenizer, _ = evaluation.load(checkpoint)
    queries = [feature_of(checkpoint, photo), *model.encode_text(tokenizer(TEXTS))]
    features = {str(file): feature_of(checkpoint, file) for file in files}
    assert printed.startswith("12 images;") and len(blocks) == 3
    for title, query, block in zip([f"like {photo}", *TEXTS], queries, blocks):
        slow = sorted(((float(f @ query), name) for name, f in features.items()), reverse=True)
        slow = [(s, name) for s, name in slow if name != str(photo) or title in TEXTS][:7]
        assert f"\n{title}\n" in printed
        assert [name for _, name in block] == [name for _, name in slow]
        assert [s for s, _ in block] == pytest.approx([s for s, _ in slow], abs=6e-4)
    Path("green/copy.png").write_bytes(photo.read_bytes())
    _, [hits] = found(capsys, *argv[:6], "--k", 500)
    assert len(hits) == 11 and not {str(photo), "green/copy.png"} & {name for _, name in hits}


def test_shards_and_folders_are_searched_together(folders, checkpoint, tmp_path, capsys):
    """Also an image without a caption, which other commands skip. Captions and the names of packed
    files are printed. The file of features says where each image is, and Python can read it."""
    files = [folders / name / "0.png" for name in ("red", "green")]
    samples = [{"png": files[0].read_bytes(), "txt": b"red", "json": b'{"image": "r.png"}'}]
    samples += [{"png": files[1].read_bytes()}]
    shards = [write_shard(tmp_path / f"{i}.tar", samples) for i in (0, 1)]
    argv = ["--checkpoint", checkpoint, "--data", tmp_path / "{0..1}.tar", "--features"]
    argv += [tmp_path / "x.npz", "--images", folders / "blue", "--images", folders / "blue/0.png"]
    _, [hits] = found(capsys, *argv, TEXTS[0])
    originals = {f"{shard}:000{i}": (shard, files[i]) for shard in shards for i in (0, 1)}
    originals |= {str(file): (str(file), file) for file in folders.glob("blue/*")}
    printed = [name if name in originals else name.removesuffix("  r.png  red") for _, name in hits]
    assert sorted(printed) == sorted(originals)  # once, if named twice
    assert sum(name.endswith("0000  r.png  red") for _, name in hits) == 2
    kept = np.load(tmp_path / "x.npz", allow_pickle=False)
    assert kept["features"].dtype == np.float32 and len(kept["names"]) == 8
    columns = (kept[name].tolist() for name in ("names", "files", "offsets", "sizes", "mtimes"))
    for name, file, offset, size, mtime, feature in zip(*columns, kept["features"]):
        in_file, original = originals[name]
        assert (file, mtime) == (in_file, os.stat(in_file).st_mtime_ns)
        assert Path(file).read_bytes()[offset : offset + size] == original.read_bytes()
        np.testing.assert_allclose(feature, feature_of(checkpoint, original), atol=1e-5)


def test_broken_images_are_skipped_and_odd_names_are_not(folders, checkpoint, tmp_path, capsys):
    broken = [folders / "red" / f"{i}.png" for i in range(3)]
    for path, content in zip(broken, (b"no image", b"", b"\x89PNG\r\n\x1a\n")):
        path.write_bytes(content)
    odd = os.fsencode(folders) + b"/\x1b\xe2\x80\xae\xff \xc3\xa9.png"
    os.rename(folders / "red" / "3.png", odd)
    argv = ["--checkpoint", checkpoint, "--images", folders, "--features", tmp_path / "x.npz"]
    for _ in range(2):  # the second time there is nothing new but broken images
        printed, [hits] = found(capsys, *argv, TEXTS[0], "--out", tmp_path / "x.png")
        assert all(printed.count(f"skipped {name}: ") == 1 for name in broken)
        assert rf"{folders}/\x1b\u202e\udcff é.png" in printed and len(hits) == 9


def test_only_new_and_changed_images_are_encoded(folders, checkpoint, tmp_path, monkeypatch):
    """Also after Ctrl-C, and from another folder."""
    model, _, _ = evaluation.load(checkpoint)
    kept, photo, batches = tmp_path / "x.npz", folders / "red/1.png", []

    def count(*_):
        batches.append(1)
        if len(batches) == 11:
            raise KeyboardInterrupt

    model.visual.register_forward_hook(count)

    def encoded(images=folders):
        """Find the features of all images -> how many of them are encoded."""
        batches.clear()
        entries = [*search.file_entries([images], None)]
        features = search.find_features(model, entries, 0, kept, "sha", batch_size=1)
        assert [entry.name for entry in features] == sorted(map(str, folders.rglob("*.png")))
        assert np.load(kept)["names"].tolist() == [entry.name for entry in features]
        return len(batches)

    with pytest.raises(KeyboardInterrupt):
        encoded()
    assert encoded() == 2 and encoded() == 0
    for colour in ("red", "blue"):  # the second edit keeps the size
        Image.new("RGB", (20, 20), colour).save(photo, compress_level=0)
        assert encoded() == 1
    (folders / "blue" / "3.png").unlink()
    assert encoded() == 0
    (folders / "blue" / "2.png").rename(folders / "blue" / "9.png")
    assert encoded() == 1
    monkeypatch.chdir(folders.parent)
    assert encoded("classes") == 0


def test_the_picture_has_a_block_for_each_search(folders, checkpoint, tmp_path, capsys):
    """The text or image that is searched for, then what is found, seven cells a row."""
    photo, step = folders / "red" / "0.png", search.SIDE + GAP
    Image.new("RGB", (20, 20), (1, 2, 250)).save(photo)
    argv = ["--checkpoint", checkpoint, "--images", folders, "--like", photo, TEXTS[0]]
    found(capsys, *argv, "--k", 8, "--out", tmp_path / "found.png")
    picture = np.array(Image.open(tmp_path / "found.png"))
    assert 4 * step < len(picture) < 6 * step  # two rows for each of the two
    image, next_one = (picture[GAP:step, GAP + i * step : (i + 1) * step] for i in range(2))
    assert (image == (1, 2, 250)).all() and (next_one != image).any()
