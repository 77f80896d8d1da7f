"""Shards and their index: every sample is found, whatever wrote the tar, and damage is named."""

import os
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from material import TOKENIZER, encoded, good_sample, photo, write_good_shard, write_tar

import cli
import data
from cli import InputError
from data import Pairs

JPEG = encoded(photo())

# ---- which shards a path names


@pytest.fixture
def folder(tmp_path):
    """A folder with three shards and an odd name, in which other files lie, too."""
    folder = tmp_path / "my, dätä [1]"
    folder.mkdir()
    for i in range(3):
        write_good_shard(folder / f"a b-{i:02d}.tar", 1)
    for no_shard in ("a.tar.part", "b.tar.aria2", "a.tar.md5", "x.gz"):
        (folder / no_shard).touch()
    return folder


@pytest.mark.parametrize(
    "pattern",
    ["{folder}", "{parent}/my*/*.tar", "{folder}/a b-{{0..0}}{{0..2}}.tar"],
    ids=["a folder", "a glob", "braces"],
)
def test_a_pattern_names_shards(folder, pattern):
    pattern = pattern.format(folder=folder, parent=folder.parent)

    assert data.expand([pattern]) == [f"{folder}/a b-{i:02d}.tar" for i in range(3)]


def test_patterns_are_added_up(folder):
    shards = data.expand([f"{folder}/a b-{{00..00}}.tar", folder / "a b-02.tar"])

    assert shards == [f"{folder}/a b-00.tar", f"{folder}/a b-02.tar"]


def test_a_shard_that_is_named_in_several_ways_counts_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    path = folder / "a b-00.tar"
    (folder / "link.tar").symlink_to(path)

    assert len(data.expand([path, "a b-00.tar", "./a b-00.tar", "link.tar"])) == 1


def test_a_compressed_shard_is_refused(folder):
    (folder / "c.tar.gz").touch()

    with pytest.raises(InputError, match="c.tar.gz"):
        data.expand([folder])


@pytest.mark.parametrize("pattern, named", [("{0..99999999999}.tar", "0.tar"), ("{2..1}", "2..1")])
def test_braces_stop_at_the_first_number_without_a_shard(tmp_path, pattern, named):
    with pytest.raises(InputError, match=named):
        data.expand([f"{tmp_path}/{pattern}"])


SIDES = {
    "train": ["train-00000.tar", "cc3m-train-0000.tar", "Train.tar", "x_train2.tar"],
    "validation": ["val-0.tar", "cc3m-validation-0000.tar", "VALID_1.tar", "test.tar", "0val0.tar"],
    None: ["00000.tar", "training-0.tar", "evaluation.tar", "latest-0.tar", "trainval.tar"],
}


@pytest.mark.parametrize("side, names", SIDES.items(), ids=map(str, SIDES))
def test_the_name_of_a_shard_tells_its_side(side, names):
    assert {data.side(f"train/val/{name}") for name in names} == {side}


def test_shards_are_split_by_their_sides_if_there_are_both():
    train, val, other = "a/train-0.tar", "a/val-0.tar", "a/0.tar"

    assert data.split_sides([val, train, other]) == ([train, other], [val])
    assert data.split_sides([train, other]) == ([train, other], [])
    assert data.split_sides([val]) == ([val], [])


# ---- what the index finds

FORMATS = {
    "USTAR": tarfile.USTAR_FORMAT,
    "GNU": tarfile.GNU_FORMAT,
    "PAX": tarfile.PAX_FORMAT,
}
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def contents_of(pairs):
    """What lies where the index says that image, text and metadata are: a list for each sample."""
    found = []
    for row in pairs.index.tolist():
        columns = [c for c in (data.IMAGE, data.TEXT, data.JSON) if row[c]]
        found.append([pairs.read(row, column) for column in columns])
    return found


@every_format
def test_the_index_finds_what_tarfile_wrote(tmp_path, format):
    """Members of a sample in any order, and shards one after the other."""
    samples = [
        good_sample("a", 0),
        good_sample("some folder/b.c/UPPER", 1),
        [("j.JPG", JPEG), ("j.json", b'{"a": 1}')],
        [("w.webp", JPEG)],
    ]
    images_last = [member for sample in samples for member in sample[::-1]]
    paths = [
        write_tar(tmp_path / "0.tar", images_last, format),
        write_tar(tmp_path / "1.tar", good_sample("z", 2), format),
    ]

    pairs = Pairs(paths, None, 8)

    expected = [[content for _, content in sample] for sample in [*samples, good_sample("z", 2)]]
    assert contents_of(pairs) == expected
    assert pairs.unused == []


NO_SAMPLE = [
    ("__MACOSX/._a.jpg", b"x"),
    ("a.mask.png", b"x"),  # the name of its sample ends at the first dot: not an image of sample a
    ("README", b"x"),
    ("dir.jpg", tarfile.DIRTYPE),
    ("pipe.txt", tarfile.FIFOTYPE),
    ("link.jpg", tarfile.SYMTYPE),
]


@every_format
def test_what_is_no_part_of_a_sample_is_named_once_for_each_extension(tmp_path, format):
    members = [*NO_SAMPLE, *good_sample("a"), ("a.txt", b"there is one")]
    path = write_tar(tmp_path / "0.tar", members, format)

    pairs = Pairs([path], None, 8)

    assert contents_of(pairs) == [[content for _, content in good_sample("a")]]
    unused = {"*._a.jpg", "*.mask.png", "*", "*.txt", "*.jpg", "a"}
    assert {(shard, key) for shard, key, _ in pairs.unused} == {(path, key) for key in unused}


LONG_NAMES = {
    "short": "some folder/b.jpg",
    "100 bytes": "folder/" + "n" * 89 + ".jpg",
    "longer": "n" * 200 + ".webp",
    "not ASCII": "größe.jpeg",
}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["GNU", "PAX"])
@pytest.mark.parametrize("name", LONG_NAMES.values(), ids=LONG_NAMES)
def test_the_name_of_a_sample_can_be_read_again(tmp_path, name, format):
    """A header holds 100 bytes of it, and of a longer one enough to find the sample."""
    pairs = Pairs([write_tar(tmp_path / "0.tar", [(name, JPEG)], format)], None, 8)

    key = pairs.key(pairs.index[0].tolist())

    stem = name.rpartition(".")[0]
    if len(name) <= 100 and name.isascii():
        assert key == stem
    assert key[:2] == stem[:2]


# ---- damage

NEGATIVE = tarfile.TarInfo("0.jpg")
NEGATIVE.size = -1024  # after which tarfile would read this header again, without end
HUGE = tarfile.TarInfo("0.jpg")
HUGE.size = 2**62  # where no file can be read, which the system calls an invalid argument
# case -> (damage to a shard of three samples, how many of them are still in the index)
DAMAGE = {
    "ends inside an image": (lambda tar: tar[: tar.index(b"00002.jpg") + 600], 3),
    "ends inside a header": (lambda tar: tar[: tar.index(b"00002.jpg") + 100], 2),
    "a damaged header": (lambda tar: tar.replace(b"00001.jpg", b"?????.jpg"), 1),
    "two archives in one file": (lambda tar: tar + tar, 3),
    "a negative size": (lambda tar: NEGATIVE.tobuf(tarfile.GNU_FORMAT) + tar, 0),
    "a size past the end of all files": (lambda tar: HUGE.tobuf(tarfile.GNU_FORMAT) + tar, 0),
    "empty": (lambda tar: b"", 0),
}


@pytest.mark.parametrize("damage, left", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_named_and_the_others_are_used(tmp_path, damage, left):
    damaged = write_good_shard(tmp_path / "0.tar", 3)
    other = write_good_shard(tmp_path / "1.tar", 2, start=3)
    Path(damaged).write_bytes(damage(Path(damaged).read_bytes()))

    pairs = Pairs([damaged, other], TOKENIZER, 16)

    assert len(pairs) == left + 2
    assert (damaged, "") in [entry[:2] for entry in pairs.unused]


def test_an_image_that_the_shard_cuts_off_is_replaced(tmp_path):
    """The index cannot tell, because the header is sound."""
    path = Path(write_good_shard(tmp_path / "0.tar", 3))
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"00002.jpg") + 600])

    *_, replaced = Pairs([str(path)], TOKENIZER, 16)[0, 2]

    assert f"{path} 00002: " in replaced[0]


@pytest.mark.parametrize("error", [PermissionError(13, "no"), OSError(5, "no"), MemoryError()])
def test_an_error_that_may_pass_names_the_shard_and_is_not_cached(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    path = write_good_shard(tmp_path / "0.tar", 2)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", fail)
        with pytest.raises(InputError, match=path):
            data.build_index([path])

    assert len(data.build_index([path])[0]) == 2


# ---- the cache of the index


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of indices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "superclip"


def indexed(*paths):
    """The number of samples in the index of these shards."""
    return len(data.build_index([*paths])[0])


def overwrite(path, content, later=0):
    """Gives a file another content, and a time of change that is so many nanoseconds later."""
    mtime = os.stat(path).st_mtime_ns
    Path(path).write_bytes(content)
    os.utime(path, ns=(mtime, mtime + later))


def test_an_index_is_taken_from_the_cache(tmp_path, cache):
    """A shard of the same size and time is not read again: only a cache misses its new content."""
    path = write_good_shard(tmp_path / "0.tar", 2)
    other = write_good_shard(tmp_path / "1.tar", 3)
    assert indexed(path, other) == 5

    overwrite(path, bytes(os.path.getsize(path)))

    assert indexed(path, other) == 5


@pytest.mark.parametrize("size, later", [(0, 1), (512, 0)], ids=["another time", "another size"])
def test_a_shard_that_has_changed_is_indexed_again(tmp_path, cache, size, later):
    path = write_good_shard(tmp_path / "0.tar", 2)
    other = write_good_shard(tmp_path / "1.tar", 3)
    indexed(path, other)

    overwrite(path, bytes(os.path.getsize(path) + size), later)

    assert indexed(path, other) == 3


def test_other_shards_have_an_index_of_their_own(tmp_path, cache):
    path = write_good_shard(tmp_path / "0.tar", 2)
    other = write_good_shard(tmp_path / "1.tar", 3)
    indexed(path, other)

    assert indexed(other) == 3


def test_a_damaged_cache_is_made_again(tmp_path, cache):
    path = write_good_shard(tmp_path / "0.tar", 2)
    indexed(path)
    [file] = cache.iterdir()
    file.write_bytes(b"damaged")

    assert indexed(path) == 2


@pytest.mark.parametrize("is_folder", [True, False], ids=["a home", "no home"])
def test_the_cache_is_a_folder_of_this_user_alone(tmp_path, monkeypatch, is_folder):
    home = tmp_path / "home"
    if not is_folder:
        home.touch()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    folder = cli.cache_folder()

    expected = home / ".cache" / "superclip" if is_folder else tmp_path / f"superclip-{os.getuid()}"
    assert folder == expected
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# ---- many shards

READ_ALL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import data
pairs = data.Pairs(data.expand(sys.argv[1:]), None, 8)
for i in range(len(pairs)):
    assert pairs.read(pairs.index[i].tolist(), data.IMAGE)
print(len(pairs))
"""


def test_more_shards_than_a_process_may_open_lose_no_sample(tmp_path):
    for i in range(100):
        write_good_shard(tmp_path / f"{i:03d}.tar", 1, start=i)
    command = [sys.executable, "-c", READ_ALL, tmp_path]

    done = subprocess.run(command, cwd=Path(data.__file__).parent, capture_output=True, text=True)

    assert done.stdout == "100\n", done.stderr
