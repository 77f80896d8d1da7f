"""scripts/pack.py: a list of images and captions becomes shards, and no row is lost in silence."""

import csv
import hashlib
import io
import json

import pytest
from material import error_of, photo
from PIL import Image

import data
from scripts import pack


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
    shards = data.Shards(data.expand([f"{out}/{split}-*.tar"]))
    found = {}
    for i in range(len(shards)):
        fields = json.loads(shards.read(i, data.JSON))
        [text] = shards.captions(i)
        found[fields["image"]] = fields, text, shards.read(i, data.IMAGE)
    assert len(found) == len(shards)
    return found


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
    path.write_text("\n".join(["image,caption,long,empty", *rows]))

    fields, text, content = samples(run(path, "--val", 0))["dog.jpg"]

    assert fields["captions"] == ["a dog", "second"] and text == "a dog"
    assert fields["long"] == ["one", "two"] and fields["empty"] is None
    assert fields["sha256"] == hashlib.sha256(content).hexdigest()


LISTS = {
    "commas.csv": '\ufeffwhat,alt,caption\né 1.jpg,"two\n""lines"", x; y",?',
    "semicolons.csv": 'what;alt;caption\né 1.jpg;"two\n""lines"", x; y";?',
    "tabs.tsv": "what\talt\tcaption\né 1.jpg\tbig dog\t?",
    "objects.jsonl": '{"what": "é 1.jpg", "alt": "a dog", "caption": "?"}\n',
}
TEXTS = ['two\n"lines", x; y', 'two\n"lines", x; y', "big dog", "a dog"]


@pytest.mark.parametrize("name, caption", [*zip(LISTS, TEXTS)], ids=LISTS)
def test_every_kind_of_list_is_read(photos, name, caption):
    path = photos.parent / "lists" / name
    path.parent.mkdir()
    path.write_text(LISTS[name], encoding="utf-8")
    columns = ["--image_column", "what", "--caption_column", "alt"]

    out = run(path, "--images", photos.parent, *columns, "--val", 0)

    fields, text, _ = samples(out)["é 1.jpg"]
    assert text == caption
    assert fields["caption"] == "?"


@pytest.mark.parametrize(
    "content, named",
    [
        (b'image,caption\na.jpg,cat\nb.jpg,"big dog\nc.jpg,cat\nd.jpg,cat', "line 3"),
        (b"image,caption\na.jpg,caf\xe9", "UTF-8"),
        (b"image,caption\nnone.jpg,a dog", "none.jpg"),  # and no other row can be used
    ],
)
def test_a_list_that_would_lose_something_is_an_error(photos, capsys, content, named):
    path = photos.with_name("l.csv")
    path.write_bytes(content)

    assert named in error_of(capsys, pack.main, "--csv", path, "--out", path.with_name("out"))
    assert not path.with_name("out").exists()


def test_rows_that_cannot_be_used_are_listed(photos):
    photos.with_name("broken.jpg").write_bytes(photos.with_name("é 1.jpg").read_bytes()[:-99])
    images = ["late.jpg", "broken.jpg", "", ".", "a\0b", 3]
    rows = [{"image": image, "caption": "a cat"} for image in images]
    rows += [{"image": "é 0.jpg", "caption": caption} for caption in (None, [" "], 3)]
    rows += [{"caption": "a dog"}, ["é 0.jpg", "a dog"], {"image": "é 0.jpg", "caption": ["a dog"]}]
    write_list(photos, *rows)

    out = run(photos)

    assert [text for _, text, _ in samples(out).values()] == ["a dog"]
    bad = csv.DictReader((out / "bad_rows.csv").open())
    assert [int(row["line"]) for row in bad] == [*range(1, len(rows))]


# ---- images


def test_a_large_image_becomes_smaller_and_upright_without_its_metadata(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    photo(0, (300, 200)).save(tmp_path / "large.jpg", exif=turned, comment=b"private")

    fields, content = pack_image(tmp_path / "large.jpg", "--size", 64)

    image = Image.open(io.BytesIO(content))
    assert image.size == (fields["width"], fields["height"]) == (64, 96)
    assert not image.getexif() and "comment" not in image.info


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "MPO"])
def test_a_file_is_not_encoded_again_without_need(format, tmp_path):
    """MPO is a JPEG with a second picture behind it, as some phones make it."""
    path = tmp_path / "photo.jpg"
    options = {"save_all": True, "append_images": [photo(1)]} if format == "MPO" else {}
    photo(0, (70, 40)).save(path, format, **options)

    _, content = pack_image(path, "--size", 64)

    assert content == path.read_bytes()


# ---- sides


def test_the_hash_of_an_image_decides_its_side(photos):
    out = run(photos, "--val", 0.3)

    for split, is_val in (("train", False), ("val", True)):
        found = samples(out, split).values()
        assert len(found) > 0
        for fields, _, _ in found:
            assert (int(fields["sha256"], 16) < 0.3 * 2**256) == is_val
