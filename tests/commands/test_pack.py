"""Test scripts/pack.py. It turns a table into shards, and reports every row that it leaves out."""

import csv
import hashlib
import io
import json

import pytest
from material import error_of, photo
from PIL import Image

import data
from common.shards import IMAGE, JSON, find_shards
from scripts import pack


def run(path, *options):
    """Pack the table at `path` into the folder `out` beside it, and return that folder."""
    out = path.with_name("out")
    argv = ["--csv", path, "--images", path.parent, "--out", out, *options]
    pack.main([*map(str, argv)])
    return out


def samples(out, split="*"):
    """Return the samples as training reads them. The result is a dict {image: (fields of .json,
    text of .txt, bytes of the image)}."""
    shards = data.Samples(find_shards([f"{out}/{split}-*.tar"]))
    found = {}
    for i in range(len(shards)):
        fields = json.loads(shards.read(i, JSON))
        [text] = shards.captions(i)
        found[fields["image"]] = fields, text, shards.read(i, IMAGE)
    assert len(found) == len(shards)
    return found


def write_table(path, *rows):
    path.write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    return path


@pytest.fixture
def photos(tmp_path):
    """Return the path of a table of twelve photographs. They lie beside the table."""
    for i in range(12):
        photo(i, (60 + i, 40)).save(tmp_path / f"é {i}.jpg")
    return write_table(tmp_path / "list.csv", *[f"é {i}.jpg,a red dog {i}" for i in range(12)])


def test_rows_of_one_image_become_one_sample(tmp_path):
    photo().save(tmp_path / "dog.jpg")
    path = tmp_path / "list.csv"
    rows = ["dog.jpg,a dog,one,", "./x/../dog.jpg,second,two,", "dog.jpg,a dog,,"]
    path.write_text("\n".join(["image,caption,long,empty", *rows]))

    fields, text, _ = samples(run(path, "--val", 0))["dog.jpg"]

    assert fields["captions"] == ["a dog", "second"] and text == "a dog"
    assert fields["long"] == ["one", "two"] and fields["empty"] == []


TABLES = {  # {the content of a table: the caption in it}
    '\ufeffimage,alt,caption\né 1.jpg,?,"two\n""lines"", x; y"': 'two\n"lines", x; y',
    "image;alt;caption\né 1.jpg;?;a, b": "a, b",
    'image, alt, caption\né 1.jpg, ?, "a dog, red"': "a dog, red",
    "image,alt,caption,,\né 1.jpg,?,a cat,,": "a cat",
    "image\talt\tcaption\né 1.jpg\t?\tbig dog": "big dog",
}


@pytest.mark.parametrize("content", TABLES)
def test_every_kind_of_table_is_read(photos, content):
    photos.write_text(content, encoding="utf-8")

    fields, text, _ = samples(run(photos, "--val", 0))["é 1.jpg"]

    assert text == TABLES[content]
    assert fields["alt"] == ["?"]


@pytest.mark.parametrize(
    "content, named",
    [
        (b'image,caption\na.jpg,cat\nb.jpg,"big dog\nc.jpg,cat\nd.jpg,cat', "quotation mark"),
        (b"image,caption\na.jpg,caf\xe9", "UTF-8"),
        (b"image,caption\nnone.jpg,a dog", "none.jpg"),  # no row can be used
        (b"image,text\na.jpg,cat", "column"),
        (b"image,caption,caption\na.jpg,a cat,a dog", "column"),
        (b"image,caption,captions\na.jpg,a cat,all cats", "captions"),
    ],
)
def test_a_table_that_would_lose_something_is_an_error(photos, capsys, content, named):
    photos.write_bytes(content)
    out = photos.with_name("out")

    argv = ["--csv", photos, "--images", photos.parent, "--out", out]
    assert named in error_of(capsys, pack.main, *argv)
    assert not out.exists()


def test_rows_that_cannot_be_used_are_listed(photos):
    photos.with_name("broken.jpg").write_bytes(photos.with_name("é 1.jpg").read_bytes()[:-99])
    bad_rows = ["late.jpg,a cat", "late.jpg,a dog", "broken.jpg,a cat", ",a cat", ".,a cat"]
    write_table(photos, *bad_rows, "é 0.jpg, ", "é 0.jpg", "é 0.jpg,a,cat", "é 0.jpg,a dog")

    out = run(photos)

    assert [text for _, text, _ in samples(out).values()] == ["a dog"]
    bad = csv.DictReader((out / "bad_rows.csv").open())
    images = ["", ".", "broken.jpg", "late.jpg", "late.jpg", "é 0.jpg", "é 0.jpg", "é 0.jpg"]
    assert sorted(row["image"] for row in bad) == images


def test_a_large_image_becomes_smaller_and_upright_and_another_one_stays(tmp_path):
    """The smaller image has no metadata. An image that is small enough is not encoded again."""
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    photo(0, (300, 200)).save(tmp_path / "large.jpg", exif=turned, comment=b"private")
    photo(0, (70, 40)).save(tmp_path / "small.webp")
    path = write_table(tmp_path / "list.csv", "large.jpg,a dog", "small.webp,a cat")

    found = samples(run(path, "--val", 0, "--size", 64))

    assert found["small.webp"][2] == (tmp_path / "small.webp").read_bytes()
    image = Image.open(io.BytesIO(found["large.jpg"][2]))
    assert image.size == (64, 96)
    assert not image.getexif() and "comment" not in image.info


def test_the_hash_of_an_image_decides_its_side(photos):
    out = run(photos, "--val", 0.3)

    for split, is_val in (("train", False), ("val", True)):
        found = samples(out, split).values()
        assert len(found) > 0
        for *_, content in found:
            assert (int(hashlib.sha256(content).hexdigest(), 16) < 0.3 * 2**256) == is_val
