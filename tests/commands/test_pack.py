"""scripts/pack.py: a list of images and captions becomes shards, and no row is lost in silence."""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import shlex
import time

import numpy as np
import pytest
import torch
from material import error_of, photo
from PIL import Image

import data
import train
from scripts import pack


def write_list(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(path, *options):
    """Pack the list at `path` into the folder `out` beside it, and return that folder."""
    out = path.with_name("out")
    pack.main(["--csv", str(path), "--out", str(out), *map(str, options)])
    return out


def samples(out, split="*"):
    """What training reads: dict of image -> (fields of .json, text of .txt, bytes of the image)."""
    pairs = data.Pairs(data.expand([f"{out}/{split}-*.tar"]), None, 16, ["json.captions"])
    assert pairs.unused == []
    found = {}
    for row in pairs.index.tolist():
        fields = json.loads(pairs.read(row, data.JSON))
        assert fields["captions"] == pairs.texts(row, "json.captions")
        found[fields["image"]] = fields, pairs.texts(row, "txt")[0], pairs.read(row, data.IMAGE)
    assert len(found) == len(pairs)
    return found


def bad_lines(out):
    header, *rows = csv.reader((out / "bad_rows.csv").open())
    assert header == ["line", "image", "reason"] and all(reason for _, _, reason in rows)
    return [int(line) for line, _, _ in rows]


def shards(out):
    return {path.name: path.read_bytes() for path in out.glob("*.tar")}


@pytest.fixture
def photos(tmp_path):
    """The list of twelve photographs that lie beside it."""
    for i in range(12):
        photo(i, (60 + i, 40)).save(tmp_path / f"é {i}.jpg")
    rows = [{"image": f"é {i}.jpg", "caption": f"a red dog, number {i}"} for i in range(12)]
    return write_list(tmp_path / "list.jsonl", rows)


def test_images_and_rows_become_samples(tmp_path, capsys):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    photo(0, (300, 200)).save(tmp_path / "large.jpg", exif=turned, comment=b"private")
    for name in ("s.jpg", "s.png", "s.webp"):
        photo(0, (70, 40)).save(tmp_path / name)
    photo(1).save(tmp_path / "s.mpo.jpg", "MPO", save_all=True, append_images=[photo(2)])
    Image.new("RGBA", (100, 100), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rows = ["image,title,long", "large.jpg,a dog,one", "./x/../large.jpg,second,two"]
    rows += ["large.jpg,a dog,", f"{tmp_path}/s.png,red,x", *(f"{name},a cat," for name in files)]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    out = run(tmp_path / "list.csv", "--size", 64, "--val", 0)
    found = samples(out, "train")
    assert found.keys() == files.keys() and bad_lines(out) == []
    for name, (fields, text, content) in found.items():
        assert Image.open(io.BytesIO(content)).size == (fields["width"], fields["height"])
        assert (content == files[name]) == (name[0] == "s")  # not encoded again without need
        assert fields["sha256"] == hashlib.sha256(files[name]).hexdigest()
        assert text == fields["captions"][0]
    fields = found["large.jpg"][0]
    assert fields["captions"] == ["a dog", "second", "a cat"] and fields["long"] == ["one", "two"]
    assert found["s.jpg"][0]["captions"] == ["a cat"] and found["s.png"][0]["long"] == "x"
    assert "--captions json.captions" in capsys.readouterr().out
    large, clear = (Image.open(io.BytesIO(found[name][2])) for name in ("large.jpg", "clear.png"))
    assert large.size == (64, 96) and not large.getexif() and "comment" not in large.info
    assert np.asarray(clear).min() > 250  # transparent parts are white
    small = photo(0, (300, 200)).transpose(Image.ROTATE_270).resize((64, 96), Image.BICUBIC)
    assert np.abs(np.asarray(large, int) - np.asarray(small)).mean() < 3
    run(tmp_path / "list.csv", "--size", 0, "--out", tmp_path / "whole")
    whole = samples(tmp_path / "whole")
    assert {name: content for name, (_, _, content) in whole.items()} == files


def test_the_content_of_an_image_decides_its_split(tmp_path):
    names = [f"{twin}{i}.png" for i in range(60) for twin in "ab"]
    for name in names:
        photo(int(name[1:-4])).save(tmp_path / name)
    rows = [{"image": name, "caption": "a dog"} for name in names]
    out = run(write_list(tmp_path / "list.jsonl", rows), "--val", 0.3)
    hashes = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names}
    val = {name for name in names if int(hashes[name], 16) < 0.3 * 2**256}
    assert samples(out, "val").keys() == val and 10 < len(val) < 80
    assert samples(out, "train").keys() == {*names} - val


@pytest.mark.parametrize("kind, mark", [("csv", ","), ("csv", ";"), ("tsv", "\t"), ("jsonl", "")])
def test_every_kind_of_list_is_read(photos, kind, mark):
    texts = ["a dog", 'pipe 5" long', "x; y", 'two\n\nlines, "quoted"']
    raw = {"quoting": csv.QUOTE_NONE, "quotechar": None} if kind == "tsv" else {}
    texts = ['"big dog', '"a cat"', "x, y; z"] if raw else texts
    rows = [{"what": f"é {i}.jpg", "Text": x, "long": f"{x}!"} for i, x in enumerate(texts)]
    path = photos.with_name(f"l.{kind}")
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        if mark:
            writer = csv.DictWriter(file, rows[0], delimiter=mark, **raw)
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\r\n".join(map(json.dumps, rows)))
    found = samples(run(path, "--image_column", "What", "--val", 0))
    found = [(image, text, fields["long"]) for image, (fields, text, _) in found.items()]
    assert found == [tuple(row.values()) for row in rows]


@pytest.mark.parametrize(
    "content, named",
    [
        ('image,caption\na.jpg,cat\nb.jpg,"big dog\nc.jpg,cat\nd.jpg,cat', "line 3"),
        ('image,caption\na.jpg,"big" dog\nb.jpg,cat', "line 2"),
        ("image,caption,long,long\na.jpg,a dog,x,y", "long"),  # one of them would be lost
        ("image,caption,width\na.jpg,a dog,3", "width"),  # pack writes its own
        ("image,caption\na.jpg,a dog".encode("utf-16-be").decode(), "l.csv"),
    ],
)
def test_a_list_that_would_lose_something_is_an_error(photos, capsys, content, named):
    path = photos.with_name("l.csv")
    path.write_text(content)
    assert named in error_of(capsys, pack.main, "--csv", path, "--out", path.with_name("out"))
    assert not path.with_name("out").exists()


def test_rows_that_cannot_be_used_are_listed_and_missing_images_may_come_later(photos):
    broken, outside = photos.with_name("broken.jpg"), photos.parent.with_name("outside.jpg")
    broken.write_bytes(photos.with_name("é 1.jpg").read_bytes()[:-99])
    photo().save(outside)
    images = ["late.jpg", "../outside.jpg", str(outside), "", "/", ".", "a\0b", "\ud800", "x" * 300]
    rows = [{"image": image, "caption": "a cat"} for image in [*images, "a/b", 3, "broken.jpg"]]
    captions = [None, [" ", None], 3, "", "\ud800", "a " * 20_000]
    rows += [{"image": "é 0.jpg", "caption": caption} for caption in captions]
    rows += [{"caption": "a dog"}, ["é 0.jpg", "a dog"]]
    rows += [{"image": "é 0.jpg", "caption": [None, "a dog"], "long": "\ud800"}]  # this is good
    photos.write_text("\n".join([*map(json.dumps, rows), "{", "", ""]))
    for first_bad, captions in ((1, ["a dog"]), (2, ["a dog", "a cat"])):
        out = run(photos)
        assert [text for _, text, _ in samples(out).values()] == captions
        assert bad_lines(out) == [*range(first_bad, len(rows)), len(rows) + 1]
        photo(1).save(photos.with_name("late.jpg"))


def test_a_bad_row_of_a_table_costs_no_other_row(photos):
    path = photos.with_name("l.csv")
    text = "image,caption\né 0.jpg,caf\udce9\né 1.jpg,one, two\né 2.jpg,a dog\n\né 3.jpg\n"
    text += 'é 4.jpg,"big dog\né 5.jpg,a cat\né 6.jpg,pipe 5"\né 7.jpg,a dog'
    path.write_text(text, errors="surrogateescape")  # line 2 is not UTF-8
    out = run(path)
    assert samples(out).keys() == {"é 2.jpg", "é 7.jpg"}
    assert bad_lines(out) == [2, 3, 6, 9]  # the last one is of three lines: two were swallowed


def test_a_killed_run_is_finished_and_nothing_is_packed_twice(photos, capsys):
    options = ["--val", 0.3, "--shard_size", 2, "--images", photos.parent]
    whole = shards(run(photos, *options))
    pairs = data.Pairs(sorted(map(str, photos.parent.glob("out/*.tar"))), None, 0)
    assert sorted({*pairs.index[:, 0].bincount().tolist()}) == [1, 2]
    (photos.parent / "x").mkdir()
    path = photos.rename(photos.parent / "x" / photos.name)
    out, last = path.with_name("out"), photos.with_name("é 11.jpg")
    last.rename(path.with_name("away.jpg"))
    os.mkfifo(last)  # whoever reads it waits
    process = multiprocessing.get_context("fork").Process(target=run, args=(path, *options))
    process.start()
    while len(shards(out)) < 2 and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    path.with_name("away.jpg").rename(last)
    finished = {path: path.stat().st_ino for path in out.glob("*.tar")}
    assert 2 <= len(finished) < len(whole)
    assert shards(run(path, *options)) == whole  # equal bytes
    assert all(path.stat().st_ino == number for path, number in finished.items())
    argv = ["--csv", path, "--out", out, *options]
    assert str(out) in error_of(capsys, pack.main, *argv, "--size", 32)
    path.write_text(path.read_text() + "\n")
    assert str(out) in error_of(capsys, pack.main, *argv)  # another list
    assert shards(out) == whole


@pytest.mark.parametrize("gpu", [False, True])
def test_the_next_commands_suit_the_data_and_train_py_knows_their_options(photos, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    out = run(photos, "--val", 0.3)
    cases = (300, True, 5), (3_000, False, 30), (40_000, False, 4), (3_000_000, False, 1)
    for n, several, epochs in cases:  # of the table in the README
        *_, last = map(shlex.split, pack.next_commands(out, n, several))
        assert last[:2] == ["python", "train.py"]
        args = train.make_parser().parse_args(last[2:])
        data.expand(args.train_data + args.val_data)  # raises if there are no such files
        assert bool(args.init_from) == (n == 300 or gpu and n <= 40_000)
        assert args.epochs == (epochs if not gpu else 30 if n > 40_000 else 5)
        assert (args.model == "tiny") == (n > 300 and not gpu)
        assert args.captions == (["json.captions"] if several else ["txt"])
