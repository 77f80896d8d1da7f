"""From shard to batch: the index, the order, the loader, images, and bad samples."""

import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import select
import signal
import tarfile
import time
from collections import Counter
from importlib import reload
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from material import photo, write_tar
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop

import cli
import data
from cli import InputError, run_command
from data import Pairs, Tokenizer, batch_indices, load_image, words_to_tiktoken

CPU = torch.device("cpu")
WORDS = "a red green blue dog cat runs sits on the grass".split()
TOKENIZER = Tokenizer(words_to_tiktoken(WORDS), context_length=32)


def encoded(image, format="JPEG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


JPEG = encoded(photo(0))


def good(key, seed=0):
    return [(f"{key}.jpg", encoded(photo(seed))), (f"{key}.txt", f"a red dog {seed}".encode())]


def shard(path, n, start=0):
    return write_tar(path, [m for i in range(start, start + n) for m in good(f"{i:05d}", i)])


# ---- Shards and their index


def test_expand_takes_paths_folders_globs_and_braces_and_each_shard_once(tmp_path, monkeypatch):
    folder = tmp_path / "my, dätä [1]"
    folder.mkdir()
    paths = [shard(folder / f"a b-{i:02d}.tar", 1) for i in range(3)]
    for no_shard in ("a.tar.part", "b.tar.aria2", "a.tar.md5", "x.gz"):
        (folder / no_shard).touch()
    (tmp_path / "link.tar").symlink_to(paths[0])
    monkeypatch.chdir(folder)
    for patterns in ([folder], [f"{tmp_path}/my*/*.tar"], [f"{folder}/a b-{{0..0}}{{0..2}}.tar"]):
        assert data.expand(patterns) == paths
    assert data.expand([f"{folder}/a b-{{00..00}}.tar", paths[2]]) == [paths[0], paths[2]]
    assert len(data.expand([paths[0], "a b-00.tar", "./a b-00.tar", tmp_path / "link.tar"])) == 1
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


NO_SAMPLE = [
    ("__MACOSX/._a.jpg", b"x"),
    ("a.mask.png", b"x"),  # the name of its sample ends at the first dot: not an image of sample a
    ("README", b"x"),
    ("dir.jpg", tarfile.DIRTYPE),
    ("pipe.txt", tarfile.FIFOTYPE),
    ("link.jpg", tarfile.SYMTYPE),
]
SAMPLES = [good("a", 0), good("some folder/b.c/UPPER", 1)]
SAMPLES += [[("j.JPG", JPEG), ("j.json", b'{"a": 1}')]]
LONG = ("folder/" + "n" * 93 + ".jpg", JPEG), ("größe.jpeg", JPEG), ("n" * 200 + ".webp", JPEG)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_finds_what_tarfile_wrote(tmp_path, format):
    samples = SAMPLES + [[m] for m in LONG if format != tarfile.USTAR_FORMAT]  # has no long names
    members = [member for sample in samples for member in sample[::-1]]  # images last
    members = [*NO_SAMPLE, *members, ("a.txt", b"there is one")]
    paths = [write_tar(tmp_path / "0.tar", members, format), shard(tmp_path / "1.tar", 3)]
    pairs = Pairs(paths, None, 8)
    rows, columns = pairs.index.tolist(), (data.IMAGE, data.TEXT, data.JSON)
    found = [[pairs.read(row, column) for column in columns if row[column]] for row in rows]
    samples = samples + [good(f"{i:05d}", i) for i in range(3)]
    assert found == [[content for _, content in sample] for sample in samples]
    # Others are named by extension, not one by one.
    unused = {"*._a.jpg", "*.mask.png", "*", "*.txt", "*.jpg", "a"}
    assert {(path, key) for path, key, _ in pairs.unused} == {(paths[0], key) for key in unused}
    # A header holds 100 bytes of a name, and of a longer one enough to find the sample.
    for row, ((name, _), *_) in zip(rows, samples):
        key, name = pairs.key(row), name.rpartition(".")[0]
        assert key[:2] == name[:2] and (key == name or len(name) > 96 or not name.isascii())


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
    paths = [shard(tmp_path / "0.tar", 3), shard(tmp_path / "1.tar", 2, 3)]
    content = Path(paths[0]).read_bytes()
    Path(paths[0]).write_bytes(damage(content))
    pairs = Pairs(paths, TOKENIZER, 16)
    assert len(pairs) == left + 2
    assert (paths[0], "") in [entry[:2] for entry in pairs.unused]
    if left == 3 and len(damage(content)) < len(content):  # the sample is found too short only now
        assert f"{paths[0]} 00002: " in pairs[0, 2][3][0]


def test_the_index_is_cached_until_a_shard_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [shard(tmp_path / "0.tar", 2), shard(tmp_path / "1.tar", 300)]
    mtime, first = os.stat(paths[0]).st_mtime_ns, Path(paths[0]).read_bytes()
    for content, later, expected in (
        (first, 0, 302),
        (bytes(len(first)), 0, 302),  # the same size and time: only a cache can miss that
        (bytes(len(first)), 1, 300),
        (first[:-512], 1, 302),
    ):
        Path(paths[0]).write_bytes(content)
        os.utime(paths[0], ns=(mtime, mtime + later))
        assert len(data.build_index(paths)[0]) == expected
    (cached,) = (tmp_path / "cache" / "superclip").iterdir()
    cached.write_bytes(b"damaged")
    assert len(data.build_index(paths)[0]) == 302
    assert len(data.build_index(paths[1:])[0]) == 300  # another list has an index of its own


@pytest.mark.parametrize("error", [PermissionError(13, "no"), OSError(5, "no"), MemoryError()])
def test_an_error_that_may_pass_names_the_shard_and_is_not_cached(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    path = shard(tmp_path / "0.tar", 2)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", fail)
        with pytest.raises(InputError, match=path):
            data.build_index([path])

    assert len(data.build_index([path])[0]) == 2


def test_where_no_cache_can_be_made_it_is_a_new_folder_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delenv("XDG_CACHE_HOME")
    for home, expected in (("home", tmp_path / "home" / ".cache" / "superclip"), ("file", None)):
        monkeypatch.setenv("HOME", str(tmp_path / home))
        folder = cli.cache_folder()
        assert folder == (expected or folder) and folder.stat().st_mode & 0o777 == 0o700


def test_more_shards_than_open_files_lose_no_sample(tmp_path):
    def read_with_few_files():
        few = max(64, 3 * len(os.listdir("/dev/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
        reload(data)  # it asks for the limit when it is imported
        pairs = data.Pairs(data.expand([tmp_path]), TOKENIZER, 8)
        assert len(pairs) == 200 and not any(pairs[i, i][3] for i in range(200))

    for i in range(200):
        shard(tmp_path / f"{i:03d}.tar", 1, i)
    assert exit_code(read_with_few_files) == 0


# ---- Order and loading


def test_the_order_is_a_pure_function_with_every_sample_once_an_epoch():
    steps = [batch_indices(103, 10, 7, step) for step in reversed(range(20))][::-1]
    assert steps == [batch_indices(103, 10, 7, step) for step in range(20)]
    visits, samples = zip(*sum(steps, []))
    assert visits == tuple(range(200)) and samples[:100] != samples[100:]
    for epoch in (samples[:100], samples[100:]):
        assert len(set(epoch)) == 100 and set(epoch) <= set(range(103))  # three are left out
    assert batch_indices(103, 10, 8, 0) != steps[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers, start", [(0, 0), (1, 2), (3, 0)])
def test_joined_batches_equal_the_collated_whole(tmp_path, monkeypatch, capsys, workers, start):
    """Whatever the workers, and wherever a run begins. A bad sample is named once."""
    monkeypatch.setattr(data, "SMALL", 3)
    long = "a dog sits on the red grass " * 8
    odd = [("long.jpg", JPEG), ("long.txt", long.encode()), ("x.jpg", b"bad"), ("x.txt", b"a")]
    paths = [write_tar(tmp_path / "0.tar", odd), shard(tmp_path / "1.tar", 12)]
    pairs, local = Pairs(paths, TOKENIZER, 24, seed=5), slice(4, 12)  # of a batch of 12
    loaded = list(data.load_batches(pairs, 12, local, 4, start, 6, workers, CPU))
    order = [batch_indices(len(pairs), 12, 5, step)[local] for step in range(start, 6)]
    whole = [pairs.collate([pairs[i] for i in part[j : j + 4]]) for part in order for j in (0, 4)]
    assert len(loaded) == len(whole)
    for (batch, bad), expected in zip(loaded, whole):
        assert bad == len(expected.pop("replaced")) and batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
        assert batch["images"].shape == (4, 3, 24, 24) and batch["images"].dtype == torch.uint8
        assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    assert sum(bad for _, bad in loaded) > 1 == capsys.readouterr().err.count("0.tar x: ")
    # Captions are trimmed. Labels are not cut to the context of 32 tokens.
    assert {batch["tokens"].shape[1] for batch in whole} == {16, 32}
    labels = max((batch["label_tokens"] for batch in whole), key=lambda tokens: tokens.shape[1])
    assert [TOKENIZER.start, *TOKENIZER.encode(long), TOKENIZER.end] in labels[:, :58].tolist()


class Watched(Pairs):
    def __getitem__(self, item):
        if item[0] == 15:  # the last sample of a step
            assert self.handed_out.wait(60), "the whole step was loaded first"
            self.loaded.set()
        return super().__getitem__(item)


def test_computing_begins_before_a_step_is_loaded_which_is_loaded_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SMALL", 1)
    pairs = Watched([shard(tmp_path / "0.tar", 16)], TOKENIZER, 16)
    pairs.handed_out, pairs.loaded = multiprocessing.Event(), multiprocessing.Event()
    batches = data.load_batches(pairs, 16, slice(None), 4, 0, 1, 2, CPU)
    next(batches)
    pairs.handed_out.set()
    assert pairs.loaded.wait(60), "the rest of the step is not loaded before it is asked for"
    assert len(list(batches)) == 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "workers, processes, expected",
    [(None, 1, 3), (None, 2, 1), (2, 1, 2), (999, 1, 5)],
    ids=["a core each", "shared by two processes", "as asked", "no more than batches"],
)
def test_an_evaluation_has_as_many_workers_as_it_can_use(monkeypatch, workers, processes, expected):
    monkeypatch.setattr(data, "cores", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    batches = data.make_loader(range(10), workers, batch_size=2)

    assert next(batches).tolist() == [0, 1]
    assert len(multiprocessing.active_children()) == expected
    assert len(list(batches)) == 4


def two_pools(tell):
    with data.process_pool(2) as pool:
        list(pool.map(abs, range(4)))
        tell()


def two_loading_processes(tell):
    for _ in data.make_loader(range(1000), 2, batch_size=1):
        tell()


@pytest.mark.parametrize("start", [two_pools, two_loading_processes])
def test_processes_end_with_their_parent_even_if_it_is_killed(start):
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    reader, writer = os.pipe()  # open as long as one of the processes lives

    def tell():
        started.set()
        time.sleep(600)

    parent = fork.Process(target=start, args=(tell,))
    parent.start()
    os.close(writer)
    assert started.wait(60)
    parent.kill()

    assert select.select([reader], [], [], 30)[0] and os.read(reader, 1) == b""
    os.close(reader)


def test_loading_processes_outlive_a_signal_to_the_whole_group(tmp_path):
    pairs = Pairs([shard(tmp_path / "0.tar", 16)], TOKENIZER, 16)
    batches = data.load_batches(pairs, 4, slice(None), 4, 0, 40, 2, CPU)
    next(batches)

    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)

    assert len(list(batches)) == 39
    assert multiprocessing.active_children() == []


def exit_code(function):
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    return code


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_loader_that_cannot_start_ends_at_once():
    def start_with_few_files():
        few = len(os.listdir("/dev/fd")) + 25
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
        with pytest.raises(OSError, match="open files"):
            next(data.make_loader(range(100), 50, batch_size=1))

    assert exit_code(start_with_few_files) == 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_program_ends_although_its_loader_is_not_done():
    def leave():
        global left
        left = data.make_loader(range(100), 2, batch_size=1)
        next(left)

    assert exit_code(leave) == 0


class Deadly(Pairs):
    def __getitem__(self, item):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind, workers", [(Deadly, 2), (Pairs, 1), (Pairs, 0)])
def test_a_worker_that_dies_or_finds_only_bad_samples_ends_the_run(tmp_path, capsys, kind, workers):
    members = [m for i in range(120) for m in ((f"{i}.jpg", b"x"), (f"{i}.txt", b"a"))]
    pairs = kind([write_tar(tmp_path / "0.tar", members)], TOKENIZER, 16)
    with pytest.raises(SystemExit) as stop:
        run_command(lambda _: list(data.load_batches(pairs, 4, slice(None), 4, 0, 1, workers, CPU)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert ("--workers" if kind is Deadly else "0.tar") in error
    # A worker that is left over would hold up the end of the program for half a minute.
    assert multiprocessing.active_children() == []


def test_a_caption_that_is_also_the_label_is_tokenised_once(tmp_path, monkeypatch):
    encoded = []
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encoded.append(text) or [1])
    pairs = Pairs([shard(tmp_path / "0.tar", 1)], TOKENIZER, 8)

    _, ids, label_ids, _ = pairs[0, 0]

    assert ids == label_ids == [1] and encoded == ["a red dog 0"]


@pytest.mark.parametrize("n, distance", [(200, 100), (100_000, 100), (250_000, 250)])
def test_every_hundredth_pair_is_held_out_but_a_thousand_at_most(tmp_path, n, distance):
    pairs, val_pairs = (Pairs([shard(tmp_path / "0.tar", 1)], TOKENIZER, 8) for _ in range(2))
    pairs.index = val_pairs.index = torch.arange(n)

    data.hold_out(pairs, val_pairs)

    assert val_pairs.index.tolist() == [*range(0, n, distance)]
    assert len(pairs) + len(val_pairs) == n
    assert not {*pairs.index.tolist()} & {*val_pairs.index.tolist()}


def test_the_fingerprint_changes_with_shards_sources_and_captions(tmp_path):
    def fingerprint(content, captions=("txt",)):
        path.write_bytes(content)
        data.open_shard.cache_clear()
        return Pairs([str(path)], TOKENIZER, 8, captions).fingerprint()

    path = tmp_path / "0.tar"
    shard(path, 150)
    content = path.read_bytes()
    prints = [
        fingerprint(content),
        fingerprint(content, ["txt", "json.long"]),
        fingerprint(content.replace(b"a red dog", b"a red cat")),
        fingerprint(Path(shard(tmp_path / "1.tar", 151)).read_bytes()),
    ]

    assert fingerprint(content) == prints[0]
    assert len({*prints}) == 4


def test_captions_are_drawn_from_their_sources(tmp_path):
    fields = {"both": ["a red dog", "a blue cat"], "long": "the green grass", "odd": "a \ud800 dog"}
    members = [("0.jpg", JPEG), ("0.json", json.dumps(fields).encode()), ("0.txt", b"a dog")]
    path = write_tar(tmp_path / "0.tar", members)
    # What is drawn, and how often: within three standard deviations. Half of a surrogate pair
    # becomes a question mark, or it could not be written to a file.
    for captions, labels, expected, label in (
        (["json.both"], ["json.long"], {"a red dog": 200, "a blue cat": 200}, "the green grass"),
        (["txt", "json.odd", "txt"], None, {"a dog": 267, "a ? dog": 133}, None),
    ):
        pairs = Pairs([path], TOKENIZER, 8, captions, labels)
        items = [pairs[visit, 0] for visit in range(400)]
        drawn, labels = ([TOKENIZER.decode(item[i]) for item in items] for i in (1, 2))
        assert Counter(drawn) == pytest.approx(expected, abs=30)
        assert labels == ([label] * 400 if label else drawn)
        again = pickle.loads(pickle.dumps(pairs))  # a caption is a function of the visit
        assert [again[visit, 0][1] for visit in range(50)] == [item[1] for item in items[:50]]
        again.seed = 1  # of caption and crop
        assert [again[visit, 0][1] for visit in range(50)] != [item[1] for item in items[:50]]


# ---- Images


def difference(pixels, image, box):
    """To the crop and the antialiased bicubic resize by Pillow: mean over pixels, of 255."""
    (x, y, w, h), size = box, pixels.shape[1:]
    resized = image.convert("RGB").resize(size, Image.BICUBIC, box=(x, y, x + w, y + h))
    return np.abs(pixels.permute(1, 2, 0).numpy() - np.asarray(resized, int)).mean()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo(3, (48, 32)), quality=95, exif=exif)


MODES = ("CMYK", "JPEG"), ("L", "JPEG"), ("P", "PNG"), ("1", "PNG"), ("RGB", "WEBP"), ("P", "GIF")
grey = photo(5, mode="L")
wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)  # 16 bits
# case -> (file, its picture; by default as Pillow reads it, on white)
PICTURES = {f"{mode} {f}": (encoded(photo(5, mode=mode), f), None) for mode, f in MODES}
PICTURES |= {f"orientation {i}": (turned(i), None) for i in range(1, 9)}
PICTURES |= {
    "RGBA": (encoded(Image.merge("RGBA", (*photo(5).split(), grey)), "PNG"), None),
    "LA": (encoded(Image.merge("LA", (photo(6, mode="L"), grey)), "PNG"), None),
    "transparent palette": (encoded(photo(5).quantize(4), "PNG", transparency=0), None),
    "16 bits PNG": (encoded(wide, "PNG"), grey),
    "animation": (encoded(photo(6), "PNG", save_all=True, append_images=[photo(7)]), photo(6)),
    "damaged EXIF": (encoded(photo(9), exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff\xff"), None),
    "1 x 999": (encoded(Image.new("RGB", (1, 999), (10, 200, 30)), "PNG"), None),
}


@pytest.mark.parametrize("content, picture", PICTURES.values(), ids=PICTURES)
def test_every_kind_of_picture_is_cropped_and_resized_as_pillow_does_it(content, picture):
    opened = Image.open(io.BytesIO(content))
    before = opened.mode, opened.size
    picture = picture or ImageOps.exif_transpose(opened)
    picture = picture.convert("RGB" if picture.mode == "CMYK" else "RGBA").convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    (width, height), side = picture.size, min(picture.size)
    square = (width - side) // 2, (height - side) // 2, side, side
    pixels = load_image(content, 24)
    assert difference(pixels, picture, square) < 1
    assert torch.equal(load_image(opened, 24), pixels)
    assert (opened.mode, opened.size) == before  # a caller's image is left as it is


def test_random_crops_have_torchvisions_sizes():
    numbers = SimpleNamespace(
        uniform=lambda low, high: torch.empty(1).uniform_(low, high).item(),
        randint=lambda low, high: torch.randint(low, high + 1, (1,)).item(),
    )
    for seed in range(300):
        width, height = random.Random(seed).choices(range(200, 600), k=2)
        image = torch.empty(3, height, width)

        torch.manual_seed(seed)
        x, y, w, h = data.crop_box(width, height, numbers, 0.9)
        torch.manual_seed(seed)
        _, _, *expected = RandomResizedCrop.get_params(image, (0.9, 1.0), (3 / 4, 4 / 3))

        assert [h, w] == expected
        assert 0 <= x <= width - w and 0 <= y <= height - h


SHAPES = {  # (width, height) -> the central crop in an evaluation, and where no random one fits
    (40, 40): ((0, 0, 40, 40), (0, 0, 40, 40)),
    (60, 40): ((10, 0, 40, 40), (3, 0, 53, 40)),  # 3:2
    (30, 90): ((0, 30, 30, 30), (0, 25, 30, 40)),
    (1, 999): ((0, 499, 1, 1), (0, 499, 1, 1)),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_random_crop_it_is_the_centre(shape):
    never_fits = SimpleNamespace(uniform=lambda low, high: 10 * high)

    square, long = SHAPES[shape]

    assert data.crop_box(*shape) == data.crop_box(*shape, random.Random(0), 1) == square
    assert data.crop_box(*shape, never_fits, 0.9) == long


def test_an_image_is_cropped_at_random_only_if_a_crop_area_is_given():
    content = encoded(photo(1), "PNG")  # 40 x 30

    pixels = load_image(content, 20, random.Random(2), 0.9)

    assert difference(pixels, photo(1), data.crop_box(40, 30, random.Random(2), 0.9)) < 1
    assert torch.equal(load_image(content, 20, random.Random(2)), load_image(content, 20))


def test_a_jpeg_decoded_at_a_fraction_keeps_its_detail_and_its_edges():
    for side in (48, 72, 96, 192, 193, 400):  # of one more than 192, the last eighth is padding
        picture = photo(side, (side, side), detail=12)
        pixels = load_image(encoded(picture, quality=95), 24)
        assert difference(pixels, picture, (0, 0, side, side)) < 5
    for seed in range(60):
        white = Image.new("RGB", random.Random(seed).choices(range(60, 400), k=2), "white")
        pixels = load_image(encoded(white), 24, random.Random(seed), 0.9)
        assert pixels.min() == 255  # it is 0 past the edge


GIF = encoded(photo(), "GIF")
BAD_IMAGES = {
    "empty image": b"",
    "corrupt JPEG": JPEG[:99] + bytes(300),
    "no format of the web": encoded(photo(), "PPM"),
    "truncated JPEG": JPEG[:-200],
    "bomb": GIF[:6] + b"\xff" * 4 + GIF[10:],  # it claims to be 65,535 pixels wide and high
    "float TIFF": encoded(Image.new("F", (9, 9)), "TIFF"),
    "32-bit TIFF": encoded(Image.new("I", (9, 9)), "TIFF"),
}
BAD_CAPTIONS = {"empty": b"", "space": b" \n\t ", "Latin-1": b"caf\xe9", "long": b"a " * 20_000}
BAD_JSON = b"{", b"[]", b'{"c": 3}', b'{"c": [null]}', b'{"c": []}', b'{"c": " "}', b"\xff"
BAD_JSON += b"[" * 99_999, b"{}", b'{"d": "a dog"}'
# case -> (members that make one bad sample named x, source of its captions)
BAD = {case: ([("x.jpg", image), ("x.txt", b"a")], "txt") for case, image in BAD_IMAGES.items()}
BAD |= {case: ([("x.jpg", JPEG), ("x.txt", text)], "txt") for case, text in BAD_CAPTIONS.items()}
BAD |= {f"{text[:9]}": ([("x.jpg", JPEG), ("x.json", text)], "json.c") for text in BAD_JSON}
BAD |= {"no caption": ([("x.jpg", JPEG)], "txt"), "no image": ([("x.txt", b"a dog")], "txt")}


@pytest.mark.parametrize("members, source", BAD.values(), ids=BAD)
def test_a_bad_sample_is_named_and_another_one_replaces_it(tmp_path, members, source):
    text = ("a.json", b'{"c": "a red dog"}') if source == "json.c" else ("a.txt", b"a red dog")
    path = write_tar(tmp_path / "0.tar", [*members, ("a.jpg", JPEG), text])
    pairs = Pairs([path], TOKENIZER, 16, [source])
    image, ids, _, replaced = pairs[7, 0]
    assert torch.equal(pairs[7, 0][0], image)  # the same in every process
    assert image.shape == (3, 16, 16) and TOKENIZER.decode(ids) == "a red dog"
    named = replaced or [f"{shard} {key}: {reason}" for shard, key, reason in pairs.unused]
    assert all(text.startswith(f"{path} x: ") for text in named)
    assert not any("0x" in text for text in named)  # no address in memory
    assert named and (replaced or len(pairs) == 1)
