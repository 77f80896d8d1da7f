"""scripts/pack.py: a list of images and captions becomes shards, and no row is lost in silence."""

import csv
import hashlib
import io
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from material import error_of, photo
from PIL import Image

import data
import train
from scripts import pack, show, vocab


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


def write_table(path, *lines):
    path.write_text("\n".join(lines))
    return path


def image_of(sample):
    return Image.open(io.BytesIO(sample[2]))


def test_rows_of_one_image_become_one_sample(tmp_path, capsys):
    photo().save(tmp_path / "dog.jpg")
    lines = ["dog.jpg,a dog,one,", "./x/../dog.jpg,second,two,", f"{tmp_path}/dog.jpg,a dog,,"]
    path = write_table(tmp_path / "list.csv", "image,title,long,empty", *lines)

    out = run(path, "--val", 0)

    fields, text, content = samples(out)["dog.jpg"]
    assert fields["captions"] == ["a dog", "second"] and text == "a dog"
    assert fields["long"] == ["one", "two"] and fields["empty"] is None
    assert fields["sha256"] == hashlib.sha256(content).hexdigest()
    assert bad_lines(out) == []
    assert "--captions json.captions" in capsys.readouterr().out


def test_a_large_image_becomes_smaller_and_upright_without_its_metadata(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    photo(0, (300, 200)).save(tmp_path / "large.jpg", exif=turned, comment=b"private")
    path = write_table(tmp_path / "list.csv", "image,caption", "large.jpg,a dog")

    out = run(path, "--size", 64, "--val", 0)

    sample = samples(out)["large.jpg"]
    image = image_of(sample)
    expected = photo(0, (300, 200)).transpose(Image.ROTATE_270).resize((64, 96), Image.BICUBIC)
    assert image.size == (sample[0]["width"], sample[0]["height"]) == (64, 96)
    assert not image.getexif() and "comment" not in image.info
    assert np.abs(np.asarray(image, int) - np.asarray(expected)).mean() < 3


@pytest.mark.parametrize("name", ["s.jpg", "s.png", "s.webp", "mpo.jpg"])
@pytest.mark.parametrize("options", [["--size", 64], ["--size", 0]], ids=["small enough", "all"])
def test_a_file_is_not_encoded_again_without_need(name, options, tmp_path):
    size = (70, 40) if 64 in options else (300, 200)
    more = {}
    if name == "mpo.jpg":
        more = {"format": "MPO", "save_all": True, "append_images": [photo(2)]}
    photo(0, size).save(tmp_path / name, **more)
    path = write_table(tmp_path / "list.csv", "image,caption", f"{name},a dog")

    out = run(path, *options, "--val", 0)

    assert samples(out)[name][2] == (tmp_path / name).read_bytes()


def test_transparent_parts_become_white(tmp_path):
    Image.new("RGBA", (100, 100), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    path = write_table(tmp_path / "list.csv", "image,caption", "clear.png,a dog")

    out = run(path, "--size", 64, "--val", 0)

    assert np.asarray(image_of(samples(out)["clear.png"])).min() > 250


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


def test_a_group_stays_on_one_side(tmp_path):
    """Two photographs of a product show the same thing, so they must not be on both sides."""
    names = [f"{i}{view}.png" for i in range(40) for view in "ab"]
    for i, name in enumerate(names):
        photo(i).save(tmp_path / name)
    rows = [{"image": name, "caption": "a dog", "product": int(name[:-5])} for name in names]
    path = write_list(tmp_path / "list.jsonl", rows)

    out = run(path, "--val", 0.3, "--group", "product")

    val = {fields["product"] for fields, _, _ in samples(out, "val").values()}
    train = {fields["product"] for fields, _, _ in samples(out, "train").values()}
    assert val and train and not val & train


def test_an_image_in_two_groups_belongs_to_neither_side(tmp_path):
    """Whichever it went to, pictures of one of the groups might be on the other side."""
    rows = []
    for name, product in (("both", "1"), ("both", "2"), ("one", "2")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        rows.append({"image": f"{name}.png", "caption": "a dog", "product": product})
    path = write_list(tmp_path / "list.jsonl", rows)

    out = run(path, "--group", "product")

    assert [*samples(out)] == ["one.png"]
    assert bad_lines(out) == [1, 2]


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


def test_rows_that_cannot_be_used_are_listed(photos):
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
    out = run(photos)
    assert [text for _, text, _ in samples(out).values()] == ["a dog"]
    assert bad_lines(out) == [*range(1, len(rows)), len(rows) + 1]


def test_a_bad_row_of_a_table_costs_no_other_row(photos):
    path = photos.with_name("l.csv")
    text = "image,caption\né 0.jpg,caf\udce9\né 1.jpg,one, two\né 2.jpg,a dog\n\né 3.jpg\n"
    text += 'é 4.jpg,"big dog\né 5.jpg,a cat\né 6.jpg,pipe 5"\né 7.jpg,a dog'
    path.write_text(text, errors="surrogateescape")  # line 2 is not UTF-8
    out = run(path)
    assert samples(out).keys() == {"é 2.jpg", "é 7.jpg"}
    assert bad_lines(out) == [2, 3, 6, 9]  # the last one is of three lines: two were swallowed


def test_only_files_are_opened(photos):
    os.mkfifo(photos.with_name("pipe.jpg"))  # whoever reads it waits
    photos.with_name("device.jpg").symlink_to("/dev/zero")  # and this has no end
    rows = [{"image": name, "caption": "a dog"} for name in ("pipe.jpg", "device.jpg", "é 1.jpg")]
    write_list(photos, rows)

    out = run(photos, "--val", 0)

    assert bad_lines(out) == [1, 2]
    assert samples(out).keys() == {"é 1.jpg"}


def test_a_field_may_be_long(photos):
    path = write_table(
        photos.with_name("l.csv"), "image,caption,page", f"é 1.jpg,a dog,{'x' * 200_000}"
    )

    out = run(path, "--val", 0)

    assert len(samples(out)["é 1.jpg"][0]["page"]) == 200_000


def test_a_folder_that_is_there_stays_as_it_is(photos, capsys):
    out = run(photos, "--val", 0.3)
    old = shards(out)

    message = error_of(capsys, pack.main, "--csv", photos, "--out", out)

    assert str(out) in message
    assert shards(out) == old


def test_no_folder_is_made_if_no_row_can_be_used(photos, capsys):
    """The usual reason: the images are elsewhere."""
    out = photos.with_name("out")
    elsewhere = photos.parent / "elsewhere"
    before = sorted(photos.parent.iterdir())

    message = error_of(capsys, pack.main, "--csv", photos, "--out", out, "--images", elsewhere)

    assert str(elsewhere) in message
    assert sorted(photos.parent.iterdir()) == before


def test_a_shard_has_a_thousand_samples_at_most(photos, monkeypatch):
    monkeypatch.setattr(pack, "SHARD_SIZE", 5)

    pairs = data.Pairs(data.expand([run(photos, "--val", 0)]), None, 0)

    assert pairs.index[:, 0].bincount().tolist() == [5, 5, 2]


# ---- what pack advises


def commands_of(printed):
    """The commands of this project."""
    lines = [line.strip() for line in printed.splitlines()]
    return [shlex.split(line) for line in lines if re.match(r"python (-m|train)", line)]


@pytest.mark.parametrize(
    "n, has_gpu, model",
    [
        pytest.param(2_000, True, "tiny", id="a few pictures"),
        pytest.param(40_000, False, "tiny", id="a shop, no GPU"),
        pytest.param(40_000, True, "ViT-S-16", id="a shop, a GPU"),
    ],
)
def test_pack_advises_what_the_data_allow(n, has_gpu, model, photos, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    out = photos.rename(photos.with_name("anna's photos"))

    pack.print_ways(out, 100, n, several=True)

    printed = capsys.readouterr().out
    trained = [line[2:] for line in commands_of(printed) if line[1] == "train.py"]
    tuned, from_nothing = map(train.make_parser().parse_args, trained)
    for args in (tuned, from_nothing):
        assert args.train_data == [f"{out}/train-*.tar"] and args.val_data == [f"{out}/val-*.tar"]
        assert args.captions == ["json.captions"]
    assert (tuned.init_from, from_nothing.model) == ("clip.pt", model)
    assert ("weak" in printed) == (n < 10_000)


def test_what_pack_prints_works_without_a_network(photos, monkeypatch, capsys):
    """The vocabulary and the look at the pairs."""
    monkeypatch.chdir(photos.parent)
    out = run(photos, "--val", 0.3)
    commands = commands_of(capsys.readouterr().out)

    vocab.main(commands[0][3:])
    show.main(commands[1][3:])

    assert commands[0][2] == "scripts.vocab" and commands[1][2] == "scripts.show"
    assert (out / "vocab.tiktoken").is_file() and Path("grid.png").is_file()
