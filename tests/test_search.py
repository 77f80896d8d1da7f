"""scripts/search.py against the slow way to search, and the file that keeps features."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from material import COLOURS, error_of, make_model, png, run, write_checkpoint, write_shard
from PIL import Image

import eval as evaluation
from scripts import search
from scripts.pictures import GAP
from superclip import SuperCLIP

TEXTS = ["a photo of the red square", "blue thing"]
RNG = np.random.default_rng(0)


@pytest.fixture
def folders(folders):
    """The usual folders, with pictures that differ enough for a model with random weights."""
    for i, file in enumerate(sorted(folders.rglob("*.png"))):
        pixels = np.random.default_rng(i).integers(0, 256, (3, 3, 3), np.uint8)
        Image.fromarray(pixels).resize((20, 20), Image.NEAREST).save(file)
    return folders


@pytest.fixture
def encoded(monkeypatch):
    """A list of how many images each call of encode_image has encoded."""
    counts, encode_image = [], SuperCLIP.encode_image

    def count(self, images):
        counts.append(len(images))
        return encode_image(self, images)

    monkeypatch.setattr(SuperCLIP, "encode_image", count)
    return counts


def found(capsys, *argv, workers=0):
    """Run a search that succeeds -> what it prints, and a list of (score, name) for each text."""
    capsys.readouterr()
    assert not run(search.main, *argv, "--workers", workers)
    printed = capsys.readouterr().out
    blocks = printed.split("\n\n")[1:]
    lines = [[row.split(maxsplit=1) for row in block.splitlines()[1:]] for block in blocks]
    return printed, [[(float(score), name) for score, name in rows] for rows in lines if rows]


def one_by_one(checkpoint, files):
    """file -> feature (E,), each image encoded alone."""
    model, _, preprocess = evaluation.load(checkpoint)
    return {str(f): model.encode_image(preprocess(Path(f).read_bytes())[None])[0] for f in files}


def slow_ranking(checkpoint, files, text):
    """list of (score, name), the best first."""
    model, tokenizer, _ = evaluation.load(checkpoint)
    query = model.encode_text(tokenizer([text]))[0]
    scores = {name: float(f @ query) for name, f in one_by_one(checkpoint, files).items()}
    return sorted(((score, name) for name, score in scores.items()), reverse=True)


# ---- the search


@pytest.mark.parametrize("workers", [0, 2])
def test_the_ranking_is_the_slow_and_obvious_one(folders, checkpoint, capsys, workers):
    argv = ["--checkpoint", checkpoint, "--images", folders, *TEXTS, "--k", 5]
    printed, blocks = found(capsys, *argv, workers=workers)
    assert printed.startswith("12 images;") and len(blocks) == 2
    for text, hits in zip(TEXTS, blocks):
        slow = slow_ranking(checkpoint, folders.rglob("*.png"), text)[:5]
        assert f"\n{text}\n" in printed and len(hits) == 5
        assert [name for _, name in hits] == [name for _, name in slow]
        assert [s for s, _ in hits] == pytest.approx([s for s, _ in slow], abs=6e-4)


def test_shards_and_folders_are_searched_together(folders, checkpoint, tmp_path, capsys, encoded):
    """Also an image without a caption, which other commands skip."""
    files = [folders / name / "0.png" for name in ("red", "green")]
    samples = [{"png": files[0].read_bytes(), "txt": b"red"}, {"png": files[1].read_bytes()}]
    for i in (0, 1):
        write_shard(tmp_path / f"{i}.tar", samples)
    argv = ["--checkpoint", checkpoint, "--data", tmp_path / "{0..1}.tar", "--features"]
    argv += [tmp_path / "x.npz", "--images", folders / "blue", "--images", folders / "blue/0.png"]
    _, [hits] = found(capsys, *argv, TEXTS[0])
    names = [f"{tmp_path}/{shard}.tar:000{i}" for shard in (0, 1) for i in (0, 1)]
    blue = [str(folders / "blue" / f"{i}.png") for i in range(4)]  # once, though one is named twice
    assert sorted(name for _, name in hits) == sorted(names + blue)
    alone = dict(zip(names, [*one_by_one(checkpoint, files).values()] * 2))
    alone |= one_by_one(checkpoint, blue)
    kept = np.load(tmp_path / "x.npz")
    for name, feature in zip(kept["names"], kept["features"]):
        np.testing.assert_allclose(feature, alone[name], atol=1e-5)
    columns = [kept[column].tolist() for column in ("names", "files", "offsets", "sizes")]
    for name, file, offset, size in zip(*columns):  # where the image is
        original = Path(name) if offset == 0 else files[int(name[-1])]
        assert file == name or file == name.rpartition(":")[0]
        assert Path(file).read_bytes()[offset : offset + size] == original.read_bytes()
    encoded.clear()
    found(capsys, *argv, TEXTS[0])
    assert encoded == []
    os.utime(tmp_path / "1.tar")  # perhaps changed
    found(capsys, *argv, TEXTS[0])
    assert encoded == [2]


def test_an_image_finds_itself_and_its_copies_first_with_score_1(folders, checkpoint, capsys):
    photo, copy = folders / "red" / "2.png", folders / "green" / "copy.png"
    argv = ["--checkpoint", checkpoint, "--images", folders, "--like", photo, "--k", 3]
    _, [hits] = found(capsys, *argv)
    assert hits[0] == (1.0, str(photo)) and hits[1][0] < 1
    copy.write_bytes(photo.read_bytes())
    printed, (hits, *others) = found(capsys, *argv, *TEXTS)  # texts and an image together
    assert {hits[0], hits[1]} == {(1.0, str(photo)), (1.0, str(copy))} and hits[2][0] < 1
    assert f"\nlike {photo}\n" in printed and len(others) == 2


def test_more_than_there_is_and_a_text_longer_than_the_context(folders, checkpoint, capsys):
    text = "red square " * 200
    _, [hits] = found(capsys, "--checkpoint", checkpoint, "--images", folders, text, "--k", 500)
    slow = slow_ranking(checkpoint, folders.rglob("*.png"), text)
    assert [name for _, name in hits] == [name for _, name in slow]


def test_names_are_printed_without_the_current_folder(folders, checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    _, [hits] = found(capsys, "--checkpoint", checkpoint, "--images", "red", TEXTS[0])
    assert {name for _, name in hits} == {f"red/{i}.png" for i in range(4)}


def test_a_name_that_is_not_utf_8_is_found_kept_and_drawn(folders, checkpoint, tmp_path, capsys):
    odd, kept = os.fsencode(folders) + b"/\xff.png", tmp_path / "x.npz"
    os.rename(folders / "red" / "0.png", odd)
    argv = ["--checkpoint", checkpoint, "--images", folders, "--features", kept]
    for _ in range(2):
        printed, _ = found(capsys, *argv, TEXTS[0], "--out", tmp_path / "found.png")
        assert f"{folders}/?.png" in printed
    names = np.load(kept)["names"].tolist()
    assert odd in map(os.fsencode, names) and len(names) == 12


# ---- the file of features


def test_the_file_holds_names_and_unit_features_of_the_model(folders, checkpoint, tmp_path, capsys):
    argv = ["--checkpoint", checkpoint, "--images", folders, "--features", tmp_path / "x.npz"]
    found(capsys, *argv, TEXTS[0])
    kept = np.load(tmp_path / "x.npz", allow_pickle=False)
    alone = one_by_one(checkpoint, sorted(folders.rglob("*.png")))
    assert kept["names"].tolist() == list(alone)
    assert kept["features"].dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(kept["features"], axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(kept["features"], torch.stack([*alone.values()]), atol=1e-5)
    stats = [os.stat(name) for name in alone]
    assert kept["sizes"].tolist() == [stat.st_size for stat in stats]
    assert kept["mtimes"].tolist() == [stat.st_mtime_ns for stat in stats]


def test_only_changed_new_and_removed_images_are_worked_on(
    folders, checkpoint, tmp_path, capsys, encoded, monkeypatch
):
    kept = tmp_path / "x.npz"
    argv = ["--checkpoint", checkpoint, "--features", kept, TEXTS[0], "--images"]

    def encoded_again(images=folders):
        """Search -> number of encoded images. The result is that of a search without a file."""
        encoded.clear()
        _, hits = found(capsys, *argv, images)
        count = sum(encoded)
        expected = found(capsys, "--checkpoint", checkpoint, "--images", images, TEXTS[0])[1]
        assert [[name for _, name in rows] for rows in hits] == [
            [name for _, name in rows] for rows in expected
        ]
        names = np.load(kept)["names"].tolist()
        assert names == sorted(map(str, Path(folders).rglob("*.png")))
        return count

    assert encoded_again() == 12
    written = kept.stat().st_mtime_ns
    assert encoded_again() == 0 and kept.stat().st_mtime_ns == written  # not even written again

    photo = folders / "red" / "1.png"
    for colour in ("red", "blue"):  # the second edit keeps the size
        before = photo.stat().st_size
        Image.new("RGB", (20, 20), colour).save(photo, compress_level=0)
        assert encoded_again() == 1
    assert photo.stat().st_size == before
    os.utime(photo)  # perhaps changed
    assert encoded_again() == 1
    (folders / "new.png").write_bytes(png(COLOURS["grey"], np.random.default_rng(9)))
    assert encoded_again() == 1
    (folders / "blue" / "3.png").unlink()
    assert encoded_again() == 0
    (folders / "blue" / "2.png").rename(folders / "blue" / "9.png")
    assert encoded_again() == 1
    monkeypatch.chdir(folders.parent)
    assert encoded_again("classes") == 0  # from another folder


def test_another_checkpoint_does_not_read_the_features(folders, checkpoint, tmp_path, capsys):
    kept, argv = tmp_path / "x.npz", ["--images", folders, TEXTS[0], "--features"]
    found(capsys, *argv, kept, "--checkpoint", checkpoint)
    before = kept.read_bytes()
    model = make_model()
    model.visual.proj.data.neg_()
    other = ["--checkpoint", write_checkpoint(tmp_path / "other.pt", model)]
    assert "x.npz is of another checkpoint" in error_of(capsys, search.main, *argv, kept, *other)
    assert kept.read_bytes() == before
    found(capsys, *argv, tmp_path / "y.npz", *other)
    assert (np.load(tmp_path / "y.npz")["features"] == -np.load(kept)["features"]).all()


def test_a_damaged_or_foreign_file_stays_as_it_is(folders, checkpoint, tmp_path, capsys):
    kept = tmp_path / "x.npz"
    argv = ["--checkpoint", checkpoint, "--images", folders, TEXTS[0], "--features", kept]
    found(capsys, *argv)
    good, parts = kept.read_bytes(), dict(np.load(kept))
    flipped = bytearray(good)
    flipped[good.index(parts["features"].tobytes()) + 5] ^= 1

    def saved(save, *args, **arrays):
        with open(kept, "wb") as file:
            save(file, *args, **arrays)
        return kept.read_bytes()

    contents = [b"", b"a photo", good[:-100], good[: len(good) // 2], flipped]
    contents += [saved(np.save, np.zeros(3)), saved(np.savez, names=parts["names"])]
    contents += [saved(np.savez, **{**parts, "features": parts["features"][1:]})]
    contents += [saved(np.savez, **{**parts, "names": parts["names"].astype(object)})]
    for content in contents:
        kept.write_bytes(content)
        assert "x.npz is damaged, or no file of this" in error_of(capsys, search.main, *argv)
        assert kept.read_bytes() == content


def test_ctrl_c_keeps_what_is_done(folders, checkpoint, tmp_path, capsys, encoded, monkeypatch):
    kept = tmp_path / "x.npz"
    argv = ["--checkpoint", checkpoint, "--images", folders, TEXTS[0], "--features", kept]
    model = evaluation.load(checkpoint)[0]
    entries = list(map(search.file_entry, sorted(folders.rglob("*.png"))))
    original = search.load_batch

    def interrupted(batch, side):
        if batch[0] == entries[10]:
            raise KeyboardInterrupt
        return original(batch, side)

    monkeypatch.setattr(search, "load_batch", interrupted)
    sha = search.hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    with pytest.raises(KeyboardInterrupt):
        search.find_features(model, entries, 0, kept, sha, batch_size=5)
    assert len(np.load(kept)["names"]) == 10
    monkeypatch.setattr(search, "load_batch", original)
    encoded.clear()
    found(capsys, *argv)
    assert encoded == [2]


# ---- what cannot be read


def test_broken_images_are_named_and_skipped_each_time(folders, checkpoint, tmp_path, capsys):
    (folders / "red" / "0.png").write_bytes(b"no image")
    (folders / "red" / "1.png").write_bytes((folders / "red" / "1.png").read_bytes()[:60])
    (folders / "red" / "2.png").write_bytes(b"")
    (folders / "red" / "gone.png").symlink_to("nowhere")
    (folders / "red" / "folder.png").mkdir()
    argv = ["--checkpoint", checkpoint, "--images", folders, "--features", tmp_path / "x.npz"]
    for _ in range(2):  # the second time there is nothing new but broken images
        printed, [hits] = found(capsys, *argv, TEXTS[0])
        for name in ("0.png", "1.png", "2.png", "gone.png", "folder.png"):
            assert printed.count(f"skipped {folders / 'red' / name}: ") == 1
        assert "9 images;" in printed and len(hits) == 9
        assert len(np.load(tmp_path / "x.npz")["names"]) == 9
    samples = [{"png": b"no image"}, {"png": png((9, 9, 9), RNG)}, {"txt": b"no image"}]
    shard = write_shard(tmp_path / "x.tar", samples)
    printed, [hits] = found(capsys, "--checkpoint", checkpoint, "--data", shard, TEXTS[0])
    assert printed.startswith("parts of shards not used: 1 ")
    assert f"skipped {shard}:0000: the image cannot be decoded" in printed
    assert [name for _, name in hits] == [f"{shard}:0001"]


def test_mistakes_are_one_sentence(folders, checkpoint, tmp_path, capsys):
    photo, broken = folders / "red" / "0.png", tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    (tmp_path / "hollow").mkdir()
    link = tmp_path / "link.png"
    link.symlink_to(photo)
    before = photo.read_bytes()
    images = ["--images", folders]
    base = ["--checkpoint", checkpoint, *images]
    # These are found before any work is done: there is no such checkpoint.
    early = ["--checkpoint", tmp_path / "none.pt", TEXTS[0]]
    for argv, sentence in (
        ([*early, *images], "none.pt"),
        (["--checkpoint", photo, *images, TEXTS[0]], "0.png is damaged or not a checkpoint"),
        (base, "--like"),
        (early, "--images"),
        ([*early, "--images", tmp_path / "hollow"], "hollow"),
        ([*early, "--images", tmp_path / "nowhere.png"], "nowhere.png"),
        ([*early, "--data", tmp_path / "nowhere.tar"], "nowhere.tar"),
        ([*early, *images, ""], "empty"),
        ([*early, *images, photo], "repeat --images"),
        ([*early, *images, "--k", 0], "--k"),
        ([*early, *images, "--out", tmp_path / "x.txt"], "x.txt"),
        ([*early, *images, "--out", tmp_path / "nowhere" / "x.png"], "nowhere"),
        ([*early, *images, "--out", photo], "0.png"),
        ([*early, *images, "--out", link], "link.png"),
        ([*early, "--images", link, "--out", photo], "0.png"),
        ([*early, *images, "--like", broken, "--out", broken], "broken.png"),
        ([*early, *images, "--features", tmp_path / "x.npy"], ".npz"),
        ([*early, *images, "--features", tmp_path / "nowhere" / "x.npz"], "folder"),
        ([*early, *images, "--like", tmp_path / "nowhere.png"], "nowhere.png"),
        ([*base, "--like", broken], "broken.png: the image cannot be decoded"),
        ([*base, "--like", folders], "Is a directory"),
        (["--checkpoint", checkpoint, "--images", broken, TEXTS[0]], "broken.png: the image"),
    ):
        assert sentence in error_of(capsys, search.main, *argv), argv
    assert photo.read_bytes() == before and link.is_symlink()


# ---- the picture


def test_the_picture_has_a_block_for_each_search(folders, checkpoint, tmp_path, capsys):
    """Seven cells a row: the text or image that is searched for, then what is found."""
    photo, sheet = folders / "red" / "0.png", tmp_path / "found.png"
    Image.new("RGB", (20, 20), (1, 2, 250)).save(photo)
    argv = ["--checkpoint", checkpoint, "--images", folders, "--like", photo, TEXTS[0]]
    printed, _ = found(capsys, *argv, "--k", 8, "--out", sheet)
    assert printed.endswith(f"wrote {sheet}\n")
    picture, step = Image.open(sheet), search.SIDE + GAP
    assert picture.width == GAP + 7 * step
    rows = (picture.height - GAP) // step
    assert rows == 4  # nine cells are two rows

    def middle(row, column):
        height = (picture.height - GAP) // 4
        return picture.getpixel((GAP + column * step + 90, GAP + row * height + 90))

    assert middle(0, 0) == middle(0, 1) == (1, 2, 250)  # what is searched for finds itself
    assert middle(1, 2) == middle(3, 6) == (255, 255, 255)  # the ends of both blocks
    assert middle(2, 0) == (255, 255, 255) != middle(2, 1)  # the text
    text = picture.crop((GAP, 0, step, picture.height)).convert("L")
    top = GAP + 2 * (picture.height - GAP) // 4
    assert text.crop((0, top, text.width, top + 60)).getextrema()[0] < 100


def test_a_picture_of_too_many_images_shows_the_first(folders, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "MAX_IMAGES", 3)
    entries = [search.file_entry(folders / "red" / f"{i}.png") for i in range(4)]
    os.remove(folders / "red" / "0.png")  # since it was found: its place says so
    search.draw([[(e, "x") for e in entries]], tmp_path / "found.webp")
    assert Image.open(tmp_path / "found.webp").width == GAP + 3 * (search.SIDE + GAP)
