"""Shards and their index: a pattern names shards, every sample in them is found, and damage is
named."""

import os
import tarfile
from pathlib import Path

import pytest
from material import cases, coloured, write_tar

import data
from cli import InputError
from data import Shards

# ---- which shards a pattern names


def test_paths_folders_globs_and_braces_name_shards(tmp_path):
    """In a folder with an odd name, in which other files lie, too. A shard counts once."""
    folder = tmp_path / "my, dätä [1]"
    folder.mkdir()
    shards = [f"{folder}/a b-{i:02d}.tar" for i in range(3)]
    for name in (*shards, "a.tar.part"):
        (folder / name).touch()

    assert data.expand([folder]) == shards
    assert data.expand([f"{tmp_path}/my*/*.tar"]) == shards
    assert data.expand([shards[2], f"{folder}/./a b-{{00..02}}.tar"]) == shards


@pytest.mark.parametrize("pattern, named", [("{0..99999999999}.tar", "1.tar"), ("{2..1}", "2..1")])
def test_braces_name_a_shard_for_each_number(tmp_path, pattern, named):
    """The first that is not there is named at once."""
    (tmp_path / "0.tar").touch()

    with pytest.raises(InputError, match=named):
        data.expand([f"{tmp_path}/{pattern}"])


SIDES = {
    "train": ["train-00000.tar", "cc3m-train-0000.tar", "Train.tar", "x_train2.tar"],
    "validation": ["val-0.tar", "cc3m-validation-0000.tar", "VALID_1.tar", "test.tar", "0val0.tar"],
    None: ["00000.tar", "training-0.tar", "evaluation.tar", "latest-0.tar", "trainval.tar"],
}


def test_the_name_of_a_shard_tells_its_side():
    for side, names in SIDES.items():
        assert {data.split_of(f"train/val/{name}") for name in names} == {side}


def test_shards_are_split_by_their_sides_if_there_are_both():
    train, val = "a/train-0.tar", "a/val-0.tar"

    assert data.by_split([val, train, "a/0.tar"]) == ([train, "a/0.tar"], [val])
    assert data.by_split([val]) == ([val], [])


# ---- what the index finds

FORMATS = {"USTAR": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "PAX": tarfile.PAX_FORMAT}
LONG = "some folder/b.c/" + 80 * "n"  # a header holds 100 bytes of a name
NO_SAMPLE = [
    ("__MACOSX/._a.jpg", b"x"),
    ("a.mask.png", b"x"),  # an extension begins at the first dot: not an image of sample a
    ("README", b"x"),
    ("no image.txt", b"x"),
]


def contents_of(shards):
    """What lies where the index says that image, text and metadata are: a list for each sample."""
    found = []
    for i, row in enumerate(shards.index.tolist()):
        columns = [c for c in (data.IMAGE, data.TEXT, data.JSON) if row[c]]
        found.append([shards.read(i, column) for column in columns])
    return found


@cases("format", FORMATS)
def test_the_index_finds_what_tarfile_wrote(tmp_path, monkeypatch, format):
    """Shards one after the other, and members of a sample in any order. What is no part of a sample
    is named once for each extension."""
    samples = [
        [("a.jpg", b"picture"), ("a.txt", b"text")],
        [(LONG + ".jpg", b"another"), (LONG + ".txt", b"another text")],
        [("größe.JPG", b"large"), ("größe.json", b'{"a": 1}')],
        [("z.jpg", b"last"), ("z.txt", b"last text")],
    ]
    monkeypatch.setattr(tarfile.TarFile, "format", format)  # in which tarfile writes
    members = [member for sample in samples[:-1] for member in sample[::-1]]
    first = write_tar(tmp_path / "0.tar", [*members, *NO_SAMPLE])
    second = write_tar(tmp_path / "1.tar", samples[-1])

    shards = Shards([first, second])

    assert contents_of(shards) == [[content for _, content in sample] for sample in samples]
    assert shards.name(3) == f"{second}:z"
    unused = {name for name, _ in shards.unused}
    assert unused == {f"{first}:{key}" for key in ("*._a.jpg", "*.mask.png", "*", "no image")}


# ---- damage

# case -> (damage to a shard of three samples, how many of them are still in the index)
DAMAGE = {
    "ends inside an image": (lambda tar: tar[: tar.index(b"0002.png") + 600], 3),
    "a damaged header": (lambda tar: tar.replace(b"0001.png", b"????.png"), 1),
    "two archives in one file": (lambda tar: tar + tar, 3),
}


@cases("damage, left", DAMAGE)
def test_a_damaged_shard_is_used_up_to_the_damage(tmp_path, damage, left):
    damaged = Path(coloured(tmp_path / "0.tar", "red", "green", "blue"))
    other = coloured(tmp_path / "1.tar", "red", "green")
    damaged.write_bytes(damage(damaged.read_bytes()))

    shards = Shards([str(damaged), other])

    assert len(shards) == left + 2
    assert [name for name, _ in shards.unused] == [f"{damaged}:"]


def test_a_member_that_claims_three_gigabytes_costs_one_sample(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        data.add_member(tar, "a.png", b"image")
        info = tarfile.TarInfo("b.png")
        info.size = 3 * 2**30
        tar.addfile(info)  # its header alone

    shards = Shards([str(path)], sources=())

    assert [shards.name(i) for i in range(len(shards))] == [f"{path}:a"]
    assert {name for name, _ in shards.unused} == {f"{path}:b", f"{path}:"}  # and it ends early


# ---- the cache of the index


def indexed(*paths):
    """The number of samples in the index of these shards."""
    return len(data.build_index([*paths])[0])


CHANGES = {  # bytes and nanoseconds that a shard of 2 samples gets more, and what is found then
    "neither": (0, 0, 5),  # from the cache: all that the shard holds now is zeros
    "another time": (0, 1, 3),
    "another size": (512, 0, 3),
}


@cases("size, later, expected", CHANGES)
def test_an_index_is_cached_until_a_shard_changes(tmp_path, size, later, expected):
    path = coloured(tmp_path / "0.tar", "red", "green")
    other = coloured(tmp_path / "1.tar", "red", "green", "blue")
    before = os.stat(path)
    assert indexed(path, other) == 5

    Path(path).write_bytes(bytes(before.st_size + size))
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns + later))

    assert indexed(path, other) == expected
    assert indexed(other) == 3  # other shards have an index of their own


def test_a_damaged_cache_is_made_anew(tmp_path):
    path = coloured(tmp_path / "0.tar", "red", "green")
    assert indexed(path) == 2
    for cache in data.cache_folder().glob("index-*"):
        cache.write_bytes(b"damaged")

    assert indexed(path) == 2
