"""From shard to batch: the index, the order, and what shards off the web hold by mistake."""

import io
import json
import math
import os
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

import data
from data import Batches, Pairs, Tokenizer, batch_indices, load_image
from superclip import InputError

ROOT = Path(data.__file__).parent
WORDS = "a red green blue dog cat runs sits on the grass".split()


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(data.vocabulary_from_words(WORDS))


def photo(seed=0, size=(40, 30), mode="RGB"):
    """A smooth random picture, so that JPEG and resizing change it little."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC).convert(mode)


def encoded(image, format="JPEG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def write_tar(path, members):
    """members: list of (name, bytes) or TarInfo objects of folders and links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return str(path)


def good(key, seed=0):
    return [(f"{key}.jpg", encoded(photo(seed))), (f"{key}.txt", f"a red dog {seed}".encode())]


def shard(path, n, start=0):
    return write_tar(path, [m for i in range(start, start + n) for m in good(f"{i:05d}", i)])


def error_of(image, size=16):
    with pytest.raises(data.BadSample) as error:
        load_image(image, size)
    return str(error.value)


# -----------------------------------------------------------------------------
# Names of shards


def test_expand_takes_paths_folders_globs_braces_and_lists(tmp_path):
    paths = [shard(tmp_path / f"a-{i:02d}.tar", 1) for i in range(3)]
    assert data.expand(str(tmp_path)) == paths
    assert data.expand(f"{tmp_path}/*.tar") == paths
    assert data.expand(f"{tmp_path}/a-{{00..02}}.tar") == paths
    assert data.expand(f"{tmp_path}/a-{{00,02}}.tar") == [paths[0], paths[2]]
    assert data.expand(f"{paths[2]} {paths[0]},{paths[0]}") == [paths[0], paths[2]]
    assert data.expand([paths[1], paths[0]]) == paths[:2]


def test_expand_takes_names_with_spaces_commas_brackets_and_unicode(tmp_path):
    paths = [shard(tmp_path / "my, dätä [1]" / f"ein name-{i}.tar", 1) for i in range(2)]
    assert data.expand(paths[0]) == paths[:1]
    assert data.expand(str(tmp_path / "my, dätä [1]")) == paths
    assert data.expand(f"{tmp_path}/my, d*/*.tar") == paths
    assert data.expand(f"{tmp_path}/my, dätä [1]/ein name-{{0..1}}.tar") == paths


def test_expand_says_what_is_wrong(tmp_path):
    shard(tmp_path / "a-0.tar", 1)
    with pytest.raises(InputError, match="no shards match .*a-1.tar"):  # not downloaded
        data.expand(f"{tmp_path}/a-{{0..1}}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no shards match"):
        data.expand(str(tmp_path / "empty"))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "b.tar.gz").write_bytes(b"")
    for name in ("packed", "packed/b.tar.gz"):
        with pytest.raises(InputError, match="compressed.*unpack it to a .tar"):
            data.expand(str(tmp_path / name))


# -----------------------------------------------------------------------------
# Index


def test_the_index_finds_what_tarfile_finds(tmp_path, tokenizer):
    paths = [shard(tmp_path / "0.tar", 4), shard(tmp_path / "1.tar", 3, 4)]
    pairs = Pairs(paths, tokenizer, 8)
    assert len(pairs) == 7 and pairs.bad == []
    found = {}
    for row in pairs.index.tolist():
        key = pairs.key(row)
        found[paths[row[0]], f"{key}.jpg"] = pairs.read(row, data.IMAGE)
        found[paths[row[0]], f"{key}.txt"] = pairs.read(row, data.TEXT)
    expected = {}
    for path in paths:
        with tarfile.open(path) as tar:
            expected |= {(path, m.name): tar.extractfile(m).read() for m in tar}
    assert found == expected


def test_an_index_takes_less_than_40_bytes_a_sample(tmp_path):
    index, _ = data.build_index([shard(tmp_path / "0.tar", 5)])
    assert index.element_size() * index.shape[1] < 40


def test_the_cache_is_used_until_size_or_mtime_change(tmp_path, monkeypatch):
    path = shard(tmp_path / "0.tar", 2)
    first, _ = data.build_index([path])
    read = []
    original = data._read_headers
    monkeypatch.setattr(data, "_read_headers", lambda p: read.append(p) or original(p))
    assert torch.equal(data.build_index([path])[0], first) and read == []
    os.utime(path, ns=(1, 1))
    data.build_index([path])
    assert read == [path]  # another mtime
    shard(tmp_path / "0.tar", 30)
    os.utime(path, ns=(1, 1))
    assert len(data.build_index([path])[0]) == 30  # another size
    data._cache_file(path).write_bytes(b"damaged")
    assert len(data.build_index([path])[0]) == 30


def test_no_cache_and_a_read_only_folder_are_no_obstacle(tmp_path, monkeypatch):
    path = shard(tmp_path / "in" / "0.tar", 2)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made there
    os.chmod(tmp_path / "in", 0o555)
    try:
        assert len(data.build_index([path])[0]) == 2
        assert os.listdir(tmp_path / "in") == ["0.tar"]
    finally:
        os.chmod(tmp_path / "in", 0o755)


def test_more_shards_than_a_process_may_open_files(tmp_path):
    limits = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); "
    for i in range(100):
        shard(tmp_path / f"{i:03d}.tar", 1, i)
    code = f"import data; print(len(data.build_index(data.expand({str(tmp_path)!r}))[0]))"
    run = [sys.executable, "-c", limits + code]
    assert subprocess.run(run, cwd=ROOT, capture_output=True, text=True).stdout == "100\n"


def test_a_million_samples_from_the_cache_in_two_seconds(tmp_path):
    paths = [str(tmp_path / f"{i}.tar") for i in range(50)]
    rows = torch.ones(20_000, 7, dtype=torch.int32)
    for path in paths:
        Path(path).write_bytes(b"")
        data._cache_file(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"stamp": data._stamp(path), "rows": rows, "bad": []}, data._cache_file(path))
    start = time.perf_counter()
    assert len(data.build_index(paths)[0]) == 1_000_000
    assert time.perf_counter() - start < 2


# -----------------------------------------------------------------------------
# Order


def test_every_sample_once_an_epoch_and_epochs_differ():
    n, B = 103, 10
    per_epoch = n // B
    epochs = [[s for step in range(e * per_epoch, (e + 1) * per_epoch)
               for _, s in batch_indices(n, B, 7, step)] for e in range(2)]  # fmt: skip
    for samples in epochs:
        assert len(set(samples)) == len(samples) == per_epoch * B  # the rest of three is left out
        assert set(samples) <= set(range(n))
    assert epochs[0] != epochs[1]
    assert batch_indices(n, B, 8, 0) != batch_indices(n, B, 7, 0)
    draws = [draw for step in range(2 * per_epoch) for draw, _ in batch_indices(n, B, 7, step)]
    assert draws == list(range(2 * per_epoch * B))


def test_the_order_is_a_pure_function_of_seed_and_step():
    forwards = [batch_indices(50, 8, 1, step) for step in range(20)]
    backwards = [batch_indices(50, 8, 1, step) for step in reversed(range(20))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_same_global_batches(world):
    whole = list(Batches(40, 12, 3, 0, 7))
    parts = [list(Batches(40, 12, 3, 0, 7, rank, world)) for rank in range(world)]
    assert [sum(batch, []) for batch in zip(*parts, strict=True)] == whole


def load(pairs, start, stop, workers=0):
    return list(data.loader(pairs, Batches(len(pairs), 4, 5, start, stop), workers))


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for a, b in zip(batches, expected, strict=True):
        for name in ("images", "tokens", "label_tokens"):
            assert torch.equal(a[name], b[name])
        assert a["bad"] == b["bad"]


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    broken = [("bad.jpg", b"no image"), ("bad.txt", b"a dog")]
    members = [m for i in range(6) for m in good(f"{i}", i)]
    return [write_tar(folder / "0.tar", members[:6] + broken + members[6:]),
            shard(folder / "1.tar", 6, 6)]  # fmt: skip


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])  # three: more than there are shards
def test_batches_do_not_depend_on_the_workers(two_shards, tokenizer, workers):
    pairs = Pairs(two_shards, tokenizer, 24)
    assert_same(load(pairs, 0, 7, workers), load(pairs, 0, 7))


def test_a_run_started_at_step_k_goes_on_exactly(two_shards, tokenizer):
    pairs = Pairs(two_shards, tokenizer, 24)
    whole = load(pairs, 0, 7)
    assert_same(load(pairs, 4, 7), whole[4:])
    # the same sample in two epochs: another crop
    assert not torch.equal(pairs[0, 2][0], pairs[13, 2][0])


def test_the_batch_holds_uint8_images_and_trimmed_tokens(two_shards, tokenizer):
    batch = load(Pairs(two_shards, tokenizer, 24), 0, 1)[0]
    assert batch["images"].shape == (4, 3, 24, 24) and batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    assert batch["tokens"].shape == (4, 16)
    assert (batch["tokens"][:, 0] == tokenizer.start).all()


def test_pairs_travel_to_workers_that_are_not_forked(two_shards, tokenizer):
    pairs = Pairs(two_shards, tokenizer, 24)
    pairs[0, 0]
    assert pairs.files and pairs.__getstate__()["files"] == {}


def test_a_batch_larger_than_the_data_is_an_error():
    with pytest.raises(InputError, match="more than the 3 samples"):
        Batches(3, 4, 0, 0, 1)


# -----------------------------------------------------------------------------
# Captions


def test_captions_from_json_one_of_a_list_each_draw(tmp_path, tokenizer):
    fields = {"captions": ["a red dog", "a blue cat"], "long": "the green grass"}
    members = [("0.jpg", encoded(photo())), ("0.json", json.dumps(fields).encode())]
    path = write_tar(tmp_path / "0.tar", members)
    pairs = Pairs([path], tokenizer, 8, "json.captions", "json.long")
    items = [pairs[draw, 0] for draw in range(40)]
    drawn = [tokenizer.decode(ids) for _, ids, _, _ in items]
    assert set(drawn) == {"a red dog", "a blue cat"} and 8 < drawn.count("a red dog") < 32
    assert {tokenizer.decode(label) for _, _, label, _ in items} == {"the green grass"}
    assert drawn == [tokenizer.decode(pairs[draw, 0][1]) for draw in range(40)]  # by the draw
    same = Pairs([path], tokenizer, 8, "json.captions")
    for _, ids, label, _ in (same[draw, 0] for draw in range(10)):
        assert ids == label  # one caption for both


def test_labels_are_not_cut_to_the_context(tmp_path):
    tokenizer = Tokenizer(data.vocabulary_from_words(WORDS), context_length=8)
    path = write_tar(
        tmp_path / "0.tar", [("0.jpg", encoded(photo())), ("0.txt", b"a red dog " * 9)]
    )
    pairs = Pairs([path], tokenizer, 8)
    batch = pairs.collate([pairs[0, 0]])
    assert batch["tokens"].shape == (1, 8) and batch["tokens"][0, -1] == tokenizer.end
    assert batch["label_tokens"].shape == (1, 32)
    assert (batch["label_tokens"] == tokenizer.end).nonzero().tolist() == [[0, 28]]


def test_an_unknown_source_of_captions_is_an_error(tmp_path, tokenizer):
    with pytest.raises(InputError, match="txt or json.FIELD"):
        Pairs([shard(tmp_path / "0.tar", 1)], tokenizer, 8, "caption")


# -----------------------------------------------------------------------------
# Images


def reference(image, box, size):
    """The crop and the antialiased bicubic resize, by Pillow."""
    x, y, w, h = box
    resized = image.resize((size, size), Image.BICUBIC, box=(x, y, x + w, y + h))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def mean_difference(a, b):
    return (a.int() - b.int()).abs().float().mean().item()


@pytest.mark.parametrize("size", [20, 50])
def test_crop_and_resize_equal_pillows(size):
    image = photo(1, (40, 30))
    box = data.crop_box(40, 30, random.Random(2))
    pixels = load_image(encoded(image, "PNG"), size, random.Random(2))
    assert mean_difference(pixels, reference(image, box, size)) < 0.6
    centre = load_image(encoded(image, "PNG"), size)
    assert mean_difference(centre, reference(image, (5, 0, 30, 30), size)) < 0.6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(3, (48, 32)), quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    box = data.crop_box(*upright.size, random.Random(0))
    assert (
        mean_difference(load_image(content, 32, random.Random(0)), reference(upright, box, 32)) < 1
    )


def test_draft_never_decodes_below_the_crop(monkeypatch):
    sizes = []
    original = data._rgb
    monkeypatch.setattr(data, "_rgb", lambda image: sizes.append(image.size) or original(image))
    for i in range(200):
        rng = random.Random(i)
        width, height, size = rng.randint(20, 300), rng.randint(20, 300), rng.choice([16, 24, 33])
        content = encoded(Image.new("L", (width, height), 128))
        load_image(content, size, random.Random(i))
        _, _, w, h = data.crop_box(width, height, random.Random(i))
        factor = sizes[-1][0] / width
        assert factor == 1 or (w * factor >= size - 1e-6 and h * factor >= size - 1e-6)
        if min(w, h) >= 2.2 * size:
            assert factor < 0.6  # and it is used where it can be


def test_draft_changes_little():
    image = photo(4, (400, 300))
    box = data.crop_box(400, 300, random.Random(1))
    pixels = load_image(encoded(image, quality=95), 64, random.Random(1))
    assert mean_difference(pixels, reference(image, box, 64)) < 1.5


def test_crop_box_takes_90_to_100_percent_and_stays_inside():
    shares = []
    for seed in range(1000):
        rng = random.Random(seed)
        width, height = rng.randint(200, 600), rng.randint(200, 600)
        x, y, w, h = data.crop_box(width, height, rng)
        assert 0 <= x <= width - w and 0 <= y <= height - h
        # Where no such rectangle fits, it is the largest central square.
        if (w, h) != (min(width, height),) * 2:
            shares.append(w * h / (width * height))
            assert 0.74 < w / h < 1.35
    assert len(shares) > 300
    assert min(shares) > 0.89 and max(shares) <= 1 and 0.93 < sum(shares) / len(shares) < 0.97
    assert data.crop_box(300, 200) == (50, 0, 200, 200)


MODES = {
    "CMYK": ("CMYK", "JPEG"),
    "palette": ("P", "PNG"),
    "grey": ("L", "JPEG"),
    "one bit": ("1", "PNG"),
    "alpha": ("RGBA", "PNG"),
    "grey and alpha": ("LA", "PNG"),
    "WebP": ("RGB", "WEBP"),
}


@pytest.mark.parametrize("mode, format", MODES.values(), ids=MODES)
def test_every_mode_becomes_rgb(mode, format):
    content = encoded(photo(5, mode=mode), format)
    expected = reference(Image.open(io.BytesIO(content)).convert("RGB"), (5, 0, 30, 30), 24)
    assert mean_difference(load_image(content, 24), expected) < 1


def test_sixteen_bits_are_scaled_not_clipped():
    grey = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    pixels = load_image(encoded(Image.fromarray(grey), "PNG"), 32)
    assert mean_difference(pixels, torch.from_numpy(grey // 256).expand(3, 32, 32)) < 0.6


def test_the_first_picture_of_an_animation_is_taken():
    first = photo(6)
    content = encoded(first, "PNG", save_all=True, append_images=[photo(7)])
    assert mean_difference(load_image(content, 24), reference(first, (5, 0, 30, 30), 24)) < 1
    gif = encoded(first, "GIF", save_all=True, append_images=[photo(7)])
    assert load_image(gif, 24).shape == (3, 24, 24)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_odd_shapes_are_fine(size):
    content = encoded(Image.new("RGB", size, (10, 200, 30)), "PNG")
    for rng in (None, random.Random(0)):
        pixels = load_image(content, 16, rng)
        assert pixels.flatten(1).T.unique(dim=0).tolist() == [[10, 200, 30]]


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    start = time.perf_counter()
    content = encoded(Image.new("1", (40_000, 40_000)), "PNG")
    made = time.perf_counter()
    assert "decompression bomb" in error_of(content)
    assert time.perf_counter() - made < 0.5 + (made - start)


def test_what_cannot_be_decoded_says_so():
    content = encoded(photo(8, (200, 200)).filter(ImageFilter.FIND_EDGES), quality=95)
    for broken in (b"", b"text", content[: len(content) // 2], content[:20] + bytes(400)):
        assert "cannot be decoded" in error_of(broken)
    assert "cannot be decoded" in error_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def test_a_jpeg_damaged_inside_never_raises_anything_else():
    content = bytearray(encoded(photo(9, (120, 90)), quality=90))
    rng = random.Random(0)
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(5):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            assert load_image(bytes(damaged), 16).shape == (3, 16, 16)
        except data.BadSample:
            pass


def test_damaged_exif_data_is_no_reason_to_lose_the_picture():
    content = encoded(photo(9), exif=b"Exif\0\0MM\0*\0\0\0\xff\xff\xff\xff garbage")
    assert load_image(content, 16).shape == (3, 16, 16)


def test_an_image_that_the_caller_opened_is_left_as_it_is():
    image = Image.open(io.BytesIO(encoded(photo(9, (400, 300)))))
    assert data.Preprocess(16)(image).shape == (3, 16, 16)
    assert image.size == (400, 300)


# -----------------------------------------------------------------------------
# Nothing breaks it


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


JPEG = encoded(photo(0))
# case -> (members that make one bad sample, its key, what the reason must say)
NASTY = {
    "empty image": ([("x.jpg", b""), ("x.txt", b"a dog")], "x", "no image, or an empty one"),
    "empty caption": ([("x.jpg", JPEG), ("x.txt", b"")], "x", "no .txt, or an empty one"),
    "white-space caption": ([("x.jpg", JPEG), ("x.txt", b" \n\t ")], "x", "caption is empty"),
    "caption not UTF-8": ([("x.jpg", JPEG), ("x.txt", b"caf\xe9")], "x", "not UTF-8"),
    "caption absurdly long": ([("x.jpg", JPEG), ("x.txt", b"a " * 20_000)], "x", "40,000 char"),
    "image without caption": ([("x.jpg", JPEG)], "x", "no .txt"),
    "caption without image": ([("x.txt", b"a dog")], "x", "no image"),
    "corrupt JPEG": ([("x.jpg", JPEG[:99] + bytes(300)), ("x.txt", b"a")], "x", "be decoded"),
    "text as image": ([("x.jpg", b"404 not found"), ("x.txt", b"a")], "x", "cannot be decoded"),
    "truncated JPEG": ([("x.jpg", JPEG[:-200]), ("x.txt", b"a")], "x", "cannot be decoded"),
    "bomb": ([("x.png", encoded(Image.new("1", (11_000, 11_000)), "PNG")), ("x.txt", b"a")],
             "x", "decompression bomb"),
    "Unicode name": ([("größe 日.jpg", b"-"), ("größe 日.txt", b"a")], "größe 日", "be decoded"),
    "long name": ([("n" * 99 + ".jpg", b"-"), ("n" * 99 + ".txt", b"a")], "n" * 99, "be decoded"),
}  # fmt: skip


def all_bad(pairs):
    """Everything that a run through all samples names: list of (shard, key, reason)."""
    named = list(pairs.bad)
    for sample in range(len(pairs)):
        named += [entry[1:] for entry in pairs[sample, sample][3] if entry[0] == sample]
    return named


@pytest.mark.parametrize("members, key, reason", NASTY.values(), ids=NASTY)
def test_a_bad_sample_is_named_once_and_the_others_are_used(
    tmp_path, tokenizer, members, key, reason
):
    path = write_tar(tmp_path / "0.tar", [*good("a", 1), *members, *good("b", 2)])
    pairs = Pairs([path], tokenizer, 16)
    named = all_bad(pairs)
    assert [(shard, k) for shard, k, _ in named] == [(path, key)]
    assert reason in named[0][2]
    assert {pairs.key(row) for row in pairs.index.tolist()} >= {"a", "b"}


def test_a_json_that_is_none_is_named(tmp_path, tokenizer):
    contents = [b"{", b"[]", b'{"c": 3}', b'{"c": [null]}', b'{"c": []}', b'{"c": " "}', b"\xff",
                b"[" * 99_999,
                b"{}", b'{"c": "a dog"}', b'{"c": "\\ud800 dog"}']  # fmt: skip
    members = [m for i, c in enumerate(contents) for m in ((f"{i}.jpg", JPEG), (f"{i}.json", c))]
    pairs = Pairs([write_tar(tmp_path / "0.tar", members)], tokenizer, 16, "json.c")
    assert [key for _, key, _ in all_bad(pairs)] == [str(i) for i in range(9)]


def test_a_sample_that_is_there_twice_is_named_and_the_first_is_used(tmp_path, tokenizer):
    path = write_tar(tmp_path / "0.tar", [*good("a", 1), *good("a", 2), *good("b", 3)])
    pairs = Pairs([path], tokenizer, 16)
    assert len(pairs) == 2 and pairs.texts(pairs.index[0].tolist(), "txt") == ["a red dog 1"]
    assert [key for _, key, _ in pairs.bad] == ["a"] and "twice" in pairs.bad[0][2]


def test_what_is_no_sample_is_passed_over(tmp_path, tokenizer):
    others = [
        special("dir.jpg", tarfile.DIRTYPE),
        special("link.jpg", tarfile.SYMTYPE, "a.jpg"),
        special("hard.jpg", tarfile.LNKTYPE, "a.jpg"),
        special("pipe.txt", tarfile.FIFOTYPE),
        ("__MACOSX/._a.jpg", b"x"),
        ("a.mask.png", b"x"),  # a webdataset key of its own, not a second image of sample a
        ("README", b"x"),
        ("a.cls", b"3"),
    ]
    pairs = Pairs(
        [write_tar(tmp_path / "0.tar", [*good("a"), *others, *good("d/b.c/e", 1)])], tokenizer, 16
    )
    assert len(pairs) == 2 and pairs.bad == []
    assert [pairs.key(row) for row in pairs.index.tolist()] == ["a", "d/b.c/e"]


def cut(tmp_path, where):
    """A shard of three samples, cut at `where(member)` of the third image."""
    path = Path(shard(tmp_path / "0.tar", 3))
    with tarfile.open(path) as tar:
        member = tar.getmember("00002.jpg")
    path.write_bytes(path.read_bytes()[: where(member)])
    return str(path)


def test_a_shard_that_ends_inside_an_image(tmp_path, tokenizer):
    path = cut(tmp_path, lambda member: member.offset_data + 100)
    pairs = Pairs([path], tokenizer, 16)
    assert len(pairs) == 2 and all_bad(pairs) == [
        (path, "00002", "the shard ends inside 00002.jpg")
    ]


def test_a_shard_that_ends_inside_a_header(tmp_path, tokenizer):
    path = cut(tmp_path, lambda member: member.offset + 100)
    pairs = Pairs([path], tokenizer, 16)
    assert len(pairs) == 2 and len(all_bad(pairs)) == 1 and "damaged header" in pairs.bad[0][2]


def test_a_damaged_header_in_the_middle(tmp_path, tokenizer):
    path = Path(shard(tmp_path / "0.tar", 3))
    with tarfile.open(path) as tar:
        offset = tar.getmember("00001.jpg").offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 200] = b"?" * 200
    path.write_bytes(content)
    pairs = Pairs([str(path)], tokenizer, 16)
    assert len(pairs) == 1 and f"damaged header at byte {offset}" in pairs.bad[0][2]


def test_a_shard_that_is_none_does_not_stop_the_others(tmp_path, tokenizer):
    (tmp_path / "0.tar").write_bytes(b"")  # empty
    (tmp_path / "1.tar").write_bytes(b"<html>" * 500)
    write_tar(tmp_path / "2.tar", [])  # a tar of nothing
    with tarfile.open(tmp_path / "3.tar", "w:gz") as tar:  # compressed under a wrong name
        tar.addfile(tarfile.TarInfo("a.jpg"))
    shard(tmp_path / "4.tar", 2)
    pairs = Pairs(data.expand(str(tmp_path)), tokenizer, 16)
    assert len(pairs) == 2
    assert [Path(path).name for path, _, _ in pairs.bad] == ["0.tar", "1.tar", "3.tar"]
    assert all("not a tar" in reason for _, _, reason in pairs.bad)
    with pytest.raises(InputError, match="no image-caption pairs in .*not a tar"):
        Pairs([str(tmp_path / "1.tar")], tokenizer, 16)
    with pytest.raises(InputError, match="no image-caption pairs"):
        Pairs([str(tmp_path / "2.tar")], tokenizer, 16)


def test_a_shard_that_changes_during_the_run(tmp_path, tokenizer):
    path = shard(tmp_path / "0.tar", 3)
    pairs = Pairs([path], tokenizer, 16)
    os.truncate(path, pairs.index[2, data.IMAGE].item() * 512 + 10)
    image, _, _, bad = pairs[0, 2]
    assert image.shape == (3, 16, 16) and "shorter than its index" in bad[0][3]


def test_nothing_but_bad_samples_is_an_error_in_one_sentence(tmp_path, tokenizer, capsys):
    members = [m for i in range(120) for m in ((f"{i}.jpg", b"x"), (f"{i}.txt", b"a"))]
    pairs = Pairs([write_tar(tmp_path / "0.tar", members)], tokenizer, 16)
    for workers in (0, 1):
        with pytest.raises(SystemExit) as stop:
            data.cli(lambda _, workers=workers: load(pairs, 0, 1, workers))
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1
        assert message.startswith("error: a hundred bad samples in a row")


@pytest.fixture(scope="module")
def nasty_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nasty")
    for i, (members, _, _) in enumerate(NASTY.values()):
        write_tar(folder / f"{i:02d}.tar", [*good("a", i), *members, *good("b", i + 50)])
    path = Path(shard(folder / "90.tar", 3))
    path.write_bytes(path.read_bytes()[:-11_000])
    (folder / "91.tar").write_bytes(b"")
    (folder / "vocab.tiktoken").write_text(data.vocabulary_from_words(WORDS))
    return folder


TRAIN = "--model tiny --image_size 24 --batch_size 8 --device cpu --log_every 1 --workers 0"


def test_it_trains_through_all_of_it_and_names_each_once(nasty_shards, tmp_path, capsys):
    import train

    flags = ["--train_data", str(nasty_shards), "--out_dir", str(tmp_path / "out")]
    train.main([*flags, *TRAIN.split(), "--steps", "12", "--max_bad", "0.9"])  # four epochs
    printed = "".join(capsys.readouterr())
    for name, (_, key, reason) in NASTY.items():
        lines = [line for line in printed.splitlines() if reason in line and f" {key}" in line]
        path = f"{list(NASTY).index(name):02d}.tar"
        assert sum(path in line for line in lines) == 1, (name, printed)


def test_more_than_max_bad_is_an_error_that_says_so(nasty_shards, tmp_path):
    import train

    flags = ["--train_data", str(nasty_shards), "--out_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match="max_bad"):
        train.main([*flags, *TRAIN.split(), "--steps", "12", "--max_bad", "0.02"])


# -----------------------------------------------------------------------------
# pack and show


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for i in range(12):
        photo(i, (300 + i, 200)).save(folder / f"é {i}.jpg", quality=95)
    photo(1, (50, 40)).save(folder / "small.jpg")
    photo(2, (400, 300), "RGBA").save(folder / "alpha.png")
    (folder / "broken.jpg").write_bytes(b"?")
    rows = [f'é {i}.jpg,"a red dog, number {i}"' for i in range(12)]
    rows += ["small.jpg,a cat", "alpha.png,a blue cat", "é 0.jpg,a second caption"]
    rows += ["broken.jpg,a dog", "missing.jpg,a dog", "small.jpg,  ", "small.jpg,one, two"]
    (tmp_path / "pairs.csv").write_text("\n".join(["filepath,title", *rows]) + "\n")
    return tmp_path


def pack(folder, *flags):
    flags = ["--out", str(folder / "out"), "--images", str(folder / "my pictures"), *flags]
    data.main(["pack", "--csv", str(folder / "pairs.csv"), *flags])


def contents(folder):
    return {p.name: p.read_bytes() for p in (folder / "out").iterdir()}


def test_pack_makes_shards_that_pairs_reads(pictures, tokenizer, capsys):
    pack(pictures, "--size", "64", "--val", "0.3", "--shard_size", "4")
    shards = data.expand(str(pictures / "out"))
    pairs = Pairs(shards, tokenizer, 16, "json.captions")
    assert len(pairs) == 14 and pairs.bad == []
    sizes = json.loads((pictures / "out" / "sizes.json").read_text())
    assert sorted(sizes) == [Path(s).name for s in shards] and sum(sizes.values()) == 14
    captions = {}
    for row in pairs.index.tolist():
        fields = json.loads(pairs.read(row, data.JSON))
        captions[fields["image"]] = pairs.texts(row, "json.captions")
        image = Image.open(io.BytesIO(pairs.read(row, data.IMAGE)))
        assert min(image.size) == (40 if fields["image"] == "small.jpg" else 64)  # never enlarged
        assert image.size == (fields["width"], fields["height"])
        assert pairs.texts(row, "txt") == captions[fields["image"]][:1]
    assert captions["é 0.jpg"] == ["a red dog, number 0", "a second caption"]
    assert "train" in capsys.readouterr().out
    bad = (pictures / "out" / "bad_rows.csv").read_text().splitlines()
    assert bad[0] == "line,image,reason"
    assert [line.split(",")[0] for line in bad[1:]] == ["17", "18", "19", "20"]
    for line, reason in zip(
        bad[1:], ["cannot be decoded", "no file", "empty", "quotes"], strict=True
    ):
        assert reason in line


def test_pack_goes_on_where_it_was_stopped(pictures, monkeypatch):
    from scripts import pack as script

    flags = ["--size", "64", "--val", "0.3", "--shard_size", "4"]
    original, calls = script.encode, []

    def stops(path, size, quality):
        calls.append(path)
        if len(calls) == 7:
            raise RuntimeError  # in the pool, so not KeyboardInterrupt
        return original(path, size, quality)

    monkeypatch.setattr(script, "encode", stops)
    with pytest.raises(RuntimeError):
        pack(pictures, *flags, "--workers", "1")
    finished = {n: c for n, c in contents(pictures).items() if n.endswith(".tar")}
    assert len(finished) == 1
    calls.clear()
    monkeypatch.setattr(script, "encode", lambda *a: calls.append(a[0]) or original(*a))
    pack(pictures, *flags)
    assert len(calls) == 16 - 4  # the first shard's are not done again
    resumed = contents(pictures)
    assert resumed.items() >= finished.items() and not any(".tmp" in n for n in resumed)
    calls.clear()
    pack(pictures, *flags)  # nothing left to do
    assert calls == [] and contents(pictures) == resumed
    for path in (pictures / "out").iterdir():
        path.unlink()
    pack(pictures, *flags)  # in one go: the same bytes
    assert contents(pictures) == resumed
    (pictures / "out" / "train-00001.tar").unlink()
    pack(pictures, *flags)  # a shard was lost: it is made again
    assert contents(pictures) == resumed
    with pytest.raises(InputError, match="other flags"):
        pack(pictures, "--size", "32")


def test_pack_keeps_the_files_with_size_0(pictures, tokenizer):
    pack(pictures, "--size", "0", "--val", "0")
    pairs = Pairs(data.expand(str(pictures / "out")), tokenizer, 16)
    for row in pairs.index.tolist():
        name = json.loads(pairs.read(row, data.JSON))["image"]
        assert pairs.read(row, data.IMAGE) == (pictures / "my pictures" / name).read_bytes()


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_pack_reads_other_lists(pictures, tokenizer, kind):
    rows = [(f"é {i}.jpg", f"a dog, {i}", f"a long text {i}") for i in range(3)]
    if kind == "tsv":
        text = "\n".join("\t".join(row) for row in [("what", "Text", "long"), *rows])
    else:
        names = ("what", "Text", "long")
        text = "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows) + "\n{"
    (pictures / f"list.{kind}").write_text(text)
    flags = ["--csv", str(pictures / f"list.{kind}"), "--out", str(pictures / "out")]
    flags += ["--images", str(pictures / "my pictures"), "--val", "0"]
    with pytest.raises(InputError, match="columns what, Text, long.*--image_column"):
        data.main(["pack", *flags])
    data.main(["pack", *flags, "--image_column", "what"])
    pairs = Pairs(data.expand(str(pictures / "out")), tokenizer, 16, "txt", "json.long")
    assert [pairs.texts(r, "txt") for r in pairs.index.tolist()] == [
        [f"a dog, {i}"] for i in range(3)
    ]
    assert pairs.texts(pairs.index[2].tolist(), "json.long") == ["a long text 2"]


def test_pack_says_what_is_wrong(pictures, tmp_path):
    with pytest.raises(InputError, match="no file"):
        data.main(["pack", "--csv", str(tmp_path / "none.csv"), "--out", str(tmp_path / "o")])
    with pytest.raises(InputError, match="none of the .* rows .* line 2, there is no file"):
        data.main(["pack", "--csv", str(pictures / "pairs.csv"), "--out", str(tmp_path / "o")])
    shard(pictures / "out" / "mine.tar", 1)
    with pytest.raises(InputError, match="not made by this command"):
        pack(pictures)


def test_show_prints_and_draws(tmp_path, capsys):
    (tmp_path / "vocab.tiktoken").write_text(data.vocabulary_from_words(WORDS))
    twins = [("t.jpg", JPEG), ("t.txt", b"A red  dog 1")]
    broken = [("x.jpg", b"?"), ("x.txt", b"a dog"), ("y.txt", b"a cat")]
    members = [m for i in range(5) for m in good(f"{i}", i)] + twins + broken
    write_tar(tmp_path / "0.tar", members)
    data.main(["show", str(tmp_path / "0.tar"), "--picture", str(tmp_path / "grid.png")])
    printed = capsys.readouterr().out
    assert "7 samples in 1 shards, 7 captions from txt" in printed
    assert "repeats: 1 (14.3%)" in printed and "2 x a red dog 1" in printed
    assert "0.tar x: the image cannot be decoded" in printed and "0.tar y: no image" in printed
    # label weights by hand: caption "a red dog 3", seven captions, "3" in one of them
    weights = {
        "a": math.log(8 / 8),
        "red": math.log(8 / 7),
        "dog": math.log(8 / 8),
        "3": math.log(4),
    }
    share = {word: weight / sum(weights.values()) for word, weight in weights.items()}
    assert f"label: 3 {share['3']:.2f}  red {share['red']:.2f}  a 0.00  dog 0.00" in printed
    picture = Image.open(tmp_path / "grid.png")
    assert picture.width > 4 * 240 and picture.height > 2 * 240
