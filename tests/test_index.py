"""Test shards: patterns name them, the index finds every sample in them, and damage is named."""

import gzip
import os
import tarfile
from pathlib import Path

from material import cases, png, write_captions, write_tar

from common.images import BadSample
from common.shards import IMAGE, JSON, TEXT, build_index, by_split, find_shards, shards_of_run
from data import Samples

# ---- which shards a pattern names


def test_paths_folders_globs_and_braces_name_shards(tmp_path):
    """The folder has an odd name, and other files, too. A shard that is named twice counts once."""
    folder = tmp_path / "my, dätä [1]"
    folder.mkdir()
    shards = [f"{folder}/a b-{i:02d}.tar" for i in range(3)]
    for name in (*shards, "a.tar.part"):
        (folder / name).touch()

    assert find_shards([folder]) == shards
    assert find_shards([f"{tmp_path}/my*/*.tar"]) == shards
    assert find_shards([shards[2], f"{folder}/./a b-{{00..02}}.tar"]) == shards


VALIDATION = ["val-0.tar", "cc3m-validation-0000.tar", "VALID_1.tar", "test.tar", "0val0.tar"]
TRAINING = ["cc3m-train-0.tar", "00000.tar", "evaluation.tar", "latest-0.tar", "trainval.tar"]
# The first split in a name counts. A later one belongs to the name of the data set.
VALIDATION += ["val_test-shop-0000.tar", "test-val2017-0.tar"]
TRAINING += ["train_test-shop-0000.tar", "train-val2017-0.tar"]


def test_the_name_of_a_shard_tells_its_side_or_else_that_of_its_folder():
    train = ["train/00000.tar", "val/train-0.tar", "val/cc3m/00000.tar"]
    train += [f"latest/{name}" for name in TRAINING]
    val = ["val/00000.tar", "cc3m-test/00000.tar"]
    val += [f"train/{name}" for name in VALIDATION]

    assert by_split(train + val) == (train, val)
    assert by_split(val) == (val, [])  # so that there is something to train on


def test_shards_that_val_data_names_are_not_trained_on_even_through_a_link(tmp_path, capsys):
    train, val = tmp_path / "train-0.tar", tmp_path / "link" / "train-1.tar"
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (train, val):
        path.touch()

    assert shards_of_run([tmp_path], [str(val)]) == ([str(train)], [str(val)])
    assert "1 to train on, 1 to validate on" in capsys.readouterr().out


# ---- what the index finds

FORMATS = {"USTAR": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "PAX": tarfile.PAX_FORMAT}
LONG = "some folder/b.c/" + 90 * "n"  # a header holds 100 bytes of a name
COLUMNS = {".txt": TEXT, ".JPG": IMAGE, ".json": JSON}
NO_SAMPLE = {
    "__MACOSX/._a.jpg": b"x",
    "a.mask.png": b"x",  # no image of sample a: its extension is .mask.png
    "README": b"x",
    "no image.txt": b"x",
    "two.2.jpg": b"x",  # its extension is .2.jpg
}


def members_of(key):
    """Return the members of a sample as a dict {name: content}. The content is the name."""
    return {key + extension: (key + extension).encode() for extension in COLUMNS}


@cases("format", FORMATS)
def test_the_index_finds_what_tarfile_wrote(tmp_path, monkeypatch, format):
    """The samples of the second shard follow those of the first. The members of a sample may have
    any order. A sample without an image is named, and other members are ignored."""
    monkeypatch.setattr(tarfile.TarFile, "format", format)  # of new tars
    members = members_of("a") | members_of(LONG) | members_of("größe")
    first = write_tar(tmp_path / "0.tar", members | NO_SAMPLE)
    second = write_tar(tmp_path / "1.tar", members_of("z"))

    shards = Samples([first, second])

    for i, key in enumerate(["a", LONG, "größe", "z"]):
        for extension, column in COLUMNS.items():
            assert shards.read(i, column).decode() == key + extension
    assert shards.name(3) == f"{second}:z"
    assert len(shards) == 4
    no_image, two_dots = shards.unused
    assert no_image.startswith(f"{first}:no image: ")
    assert two_dots.startswith(f"{first}:two: ") and "two dots" in two_dots


def test_a_member_of_2_gib_is_not_used_and_the_others_are(tmp_path):
    """Most of the member is a hole in the file, which takes no space on the disk."""
    path = tmp_path / "0.tar"
    header = tarfile.TarInfo("large.png")
    header.size = 2**31
    members = {"large.txt": b"a", "0.png": png("red"), "0.txt": b"red"}
    others = Path(write_tar(tmp_path / "1.tar", members)).read_bytes()
    with open(path, "wb") as file:
        file.write(header.tobuf())
        file.seek(512 + 2**31)
        file.write(others)

    shards = Samples([path])

    assert [shards.captions(i) for i in range(len(shards))] == [["red"]]
    [unused] = shards.unused
    assert unused.startswith(f"{path}:large: ") and "2 GiB" in unused


# ---- damage


def overwrite(tar, member, byte):
    """Return a tar in which the header of a member and its first data are overwritten."""
    start = tar.index(member)
    return tar[:start] + 1024 * byte + tar[start + 1024 :]


# case -> a function that damages a shard of three samples, and the captions that are left
DAMAGE = {
    "ends inside an image": (lambda tar: tar[: tar.index(b"0002.png") + 600], "red green ?"),
    "a damaged header": (lambda tar: overwrite(tar, b"0001.png", b"?"), "red"),
    "a hole": (lambda tar: overwrite(tar, b"0001.png", b"\0"), "red"),
    "a page instead": (lambda tar: b"<html>the page of an error</html>" * 100, ""),
    "compressed": (gzip.compress, ""),
}


@cases("damage, left", DAMAGE)
def test_a_damaged_shard_is_named_and_used_up_to_the_damage(tmp_path, damage, left):
    damaged = Path(write_captions(tmp_path / "0.tar", "red", "green", "blue"))
    other = write_captions(tmp_path / "1.tar", "grey")
    damaged.write_bytes(damage(damaged.read_bytes()))

    shards = Samples([str(damaged), other])

    captions = []
    for i in range(len(shards)):
        try:
            captions += shards.captions(i)
        except BadSample:  # its caption lies behind the end of the file
            captions.append("?")
    assert captions == [*left.split(), "grey"]
    [unused] = shards.unused
    assert unused.startswith(f"{damaged}: ")


# ---- the cache of the index


def indexed(*paths):
    """Return the number of samples in the index of these shards."""
    return len(build_index([*paths])[0])


CHANGES = {  # case -> bytes and nanoseconds that a shard grows by, and how many samples are found
    "neither": (0, 0, 5),  # the cached number, although the shard holds nothing but zeros now
    "another time": (0, 1, 3),
    "another size": (512, 0, 3),
}


@cases("size, later, expected", CHANGES)
def test_an_index_is_cached_until_a_shard_changes(tmp_path, size, later, expected):
    path = write_captions(tmp_path / "0.tar", "red", "green")
    other = write_captions(tmp_path / "1.tar", "red", "green", "blue")
    third = write_captions(tmp_path / "2.tar", "red")
    before = os.stat(path)
    assert indexed(path, other) == 5

    Path(path).write_bytes(bytes(before.st_size + size))
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns + later))

    assert indexed(path, other) == expected
    assert indexed(path, other, third) == expected + 1  # each shard has its index
