"""scripts/pack.py: a list of images and captions becomes shards, and no row is lost in silence."""

import csv
import hashlib
import io
import json
import shlex

import numpy as np
import pytest
import torch
from material import error_of, photo
from PIL import Image

import data
import train
from scripts import pack, show


def write_list(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(path, *options):
    """Pack the list at `path` into the folder `out` beside it, and return that folder."""
    out = path.with_name("out")
    pack.main(["--csv", str(path), "--out", str(out), *map(str, options)])
    return out


def samples(out, split="*"):
    """What training reads: dict of image -> (fields of .json, text of .txt, bytes of the image)."""
    pairs = data.Pairs(data.expand([f"{out}/{split}-*.tar"]), None, 16)
    found = {}
    for row in pairs.index.tolist():
        fields = json.loads(pairs.read(row, data.JSON))
        [text] = pairs.texts(row, "txt")
        found[fields["image"]] = fields, text, pairs.read(row, data.IMAGE)
    assert len(found) == len(pairs)
    return found


def bad_lines(out):
    return [int(row["line"]) for row in csv.DictReader((out / "bad_rows.csv").open())]


def pack_image(path, *options):
    """Pack the image at `path` alone. Returns the fields of its .json, and its bytes."""
    rows = write_list(path.with_name("list.jsonl"), {"image": path.name, "caption": "a dog"})
    fields, _, content = samples(run(rows, "--val", 0, *options))[path.name]
    return fields, content


@pytest.fixture
def photos(tmp_path):
    """The list of twelve photographs that lie beside it."""
    for i in range(12):
        photo(i, (60 + i, 40)).save(tmp_path / f"é {i}.jpg")
    rows = [{"image": f"é {i}.jpg", "caption": f"a red dog, number {i}"} for i in range(12)]
    return write_list(tmp_path / "list.jsonl", *rows)


# ---- rows


def test_rows_of_one_image_become_one_sample(tmp_path):
    photo().save(tmp_path / "dog.jpg")
    path = tmp_path / "list.csv"
    rows = ["dog.jpg,a dog,one,", "./x/../dog.jpg,second,two,", f"{tmp_path}/dog.jpg,a dog,,"]
    path.write_text("\n".join(["image,title,long,empty", *rows]))

    fields, text, content = samples(run(path, "--val", 0))["dog.jpg"]

    assert fields["captions"] == ["a dog", "second"] and text == "a dog"
    assert fields["long"] == ["one", "two"] and fields["empty"] is None
    assert fields["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("kind, mark", [("csv", ","), ("csv", ";"), ("tsv", "\t"), ("jsonl", "")])
def test_every_kind_of_list_is_read(photos, kind, mark):
    texts = ["a dog", 'pipe 5" long', "x; y", 'two\n\nlines, "quoted"']
    options = {}
    if kind == "tsv":  # where a quotation mark is a character like any other
        texts = ['"big dog', '"a cat"', "x, y; z"]
        options = {"quoting": csv.QUOTE_NONE, "quotechar": None}
    rows = []
    for i, text in enumerate(texts):
        rows.append({"what": f"é {i}.jpg", "alt": text, "caption": "?", "page": text * 40_000})
    path = write_list(photos.with_name(f"l.{kind}"), *rows)
    if mark:
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=mark, **options)
            writer.writeheader()
            writer.writerows(rows)

    out = run(path, "--image_column", "What", "--caption_column", "alt", "--val", 0)

    for row, (image, (fields, text, _)) in zip(rows, samples(out).items(), strict=True):
        assert (image, text) == (row["what"], row["alt"])
        assert (fields["caption"], fields["page"]) == (row["caption"], row["page"])


@pytest.mark.parametrize(
    "content, named",
    [
        (b'image,caption\na.jpg,cat\nb.jpg,"big dog\nc.jpg,cat\nd.jpg,cat', "line 3"),
        (b'image,caption\na.jpg,"big" dog\nb.jpg,cat', "line 2"),
        (b"image,caption,long,long\na.jpg,a dog,x,y", "long"),  # one of them would be lost
        (b"image,caption,width\na.jpg,a dog,3", "width"),  # pack writes its own
        (b"image,caption\na.jpg,caf\xe9", "UTF-8"),
        (b"image,caption\nnone.jpg,a dog", "none.jpg"),  # and no other row can be used
    ],
)
def test_a_list_that_would_lose_something_is_an_error(photos, capsys, content, named):
    path = photos.with_name("l.csv")
    path.write_bytes(content)
    before = sorted(photos.parent.iterdir())

    assert named in error_of(capsys, pack.main, "--csv", path, "--out", path.with_name("out"))
    assert sorted(photos.parent.iterdir()) == before


def test_rows_that_cannot_be_used_are_listed(photos):
    photos.with_name("broken.jpg").write_bytes(photos.with_name("é 1.jpg").read_bytes()[:-99])
    images = ["late.jpg", "broken.jpg", "", ".", "a\0b", "x" * 300, "a/b", 3]
    rows = [{"image": image, "caption": "a cat"} for image in images]
    rows += [{"image": "é 0.jpg", "caption": caption} for caption in [None, [" ", None], 3, ""]]
    rows += [{"caption": "a dog"}, ["é 0.jpg", "a dog"], {"image": "é 0.jpg", "caption": ["a dog"]}]
    write_list(photos, *rows)

    out = run(photos)

    assert [text for _, text, _ in samples(out).values()] == ["a dog"]
    assert bad_lines(out) == [*range(1, len(rows))]


# ---- images


def test_a_large_image_becomes_smaller_and_upright_without_its_metadata(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    photo(0, (300, 200)).save(tmp_path / "large.jpg", exif=turned, comment=b"private")

    fields, content = pack_image(tmp_path / "large.jpg", "--size", 64)

    image = Image.open(io.BytesIO(content))
    expected = photo(0, (300, 200)).transpose(Image.ROTATE_270).resize((64, 96), Image.BICUBIC)
    assert image.size == (fields["width"], fields["height"]) == (64, 96)
    assert not image.getexif() and "comment" not in image.info
    assert np.abs(np.asarray(image, int) - np.asarray(expected)).mean() < 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "MPO"])
@pytest.mark.parametrize("sides, size", [((70, 40), 64), ((70, 300), 0)])
def test_a_file_is_not_encoded_again_without_need(format, sides, size, tmp_path):
    """MPO is a JPEG with a second picture behind it, as some phones make it."""
    path = tmp_path / "photo.jpg"
    options = {"save_all": True, "append_images": [photo(1)]} if format == "MPO" else {}
    photo(0, sides).save(path, format, **options)

    _, content = pack_image(path, "--size", size)

    assert content == path.read_bytes()


# ---- sides


def test_the_content_of_an_image_decides_its_side(tmp_path):
    names = [f"{twin}{i}.png" for i in range(60) for twin in "ab"]
    for name in names:
        photo(int(name[1:-4])).save(tmp_path / name)
    rows = [{"image": name, "caption": "a dog"} for name in names]

    out = run(write_list(tmp_path / "list.jsonl", *rows), "--val", 0.3)

    hashes = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names}
    val = {name for name in names if int(hashes[name], 16) < 0.3 * 2**256}
    assert samples(out, "val").keys() == val and 10 < len(val) < 80
    assert samples(out, "train").keys() == {*names} - val


def test_a_group_stays_on_one_side(photos):
    """Two photographs of a product show the same thing, so they must not be on both sides. An image
    in two groups is left out: whichever it went to, the other might be on the other side."""
    rows = [json.loads(line) for line in photos.read_text().splitlines()]
    rows = [{**row, "product": i // 2} for i, row in enumerate(rows)]
    write_list(photos, *rows, {**rows[0], "product": 9})

    out = run(photos, "--val", 0.5, "--group", "product")

    val = {fields["product"] for fields, _, _ in samples(out, "val").values()}
    training = {fields["product"] for fields, _, _ in samples(out, "train").values()}
    assert val and training and not val & training
    assert bad_lines(out) == [1, 13]


def test_a_shard_has_a_thousand_samples_at_most(photos, monkeypatch):
    monkeypatch.setattr(pack, "SHARD_SIZE", 5)

    pairs = data.Pairs(data.expand([run(photos, "--val", 0)]), None, 16)

    assert pairs.index[:, 0].bincount().tolist() == [5, 5, 2]


def test_a_folder_that_is_there_stays_as_it_is(photos, capsys):
    """It is refused before anything is read."""
    out = run(photos)
    before = {path: path.read_bytes() for path in out.iterdir()}

    assert str(out) in error_of(capsys, pack.main, "--csv", "none.csv", "--out", out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


# ---- what pack advises


@pytest.mark.parametrize("n, n_val, model", [(40_000, 900, "ViT-S-16"), (2_000, 0, "tiny")])
def test_pack_advises_what_the_data_and_a_gpu_allow(n, n_val, model, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = "anna's photos"

    pack.print_ways(out, n, n_val, several=True)

    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "train.py" in line]
    tuned, from_nothing = (train.make_parser().parse_args(shlex.split(line)[2:]) for line in lines)
    for args in (tuned, from_nothing):
        assert args.train_data == [f"{out}/train-*.tar"] and args.captions == ["json.captions"]
        assert args.val_data == ([f"{out}/val-*.tar"] if n_val else None)
    assert (tuned.init_from, from_nothing.model) == ("clip.pt", model)
    assert ("weak" in printed) == (n < 10_000)


def test_the_look_that_pack_advises_works(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos.parent)
    run(photos, "--val", 0.3)
    [command] = [line for line in capsys.readouterr().out.splitlines() if "scripts.show" in line]

    show.main(shlex.split(command)[3:])

    assert photos.with_name("grid.png").is_file()
