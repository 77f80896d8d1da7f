"""From shard to batch: the index, the order, and what shards off the web hold by mistake."""

import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import tarfile
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps, PngImagePlugin
from PIL.Image import Transpose

import data
import train
from data import Pairs, Tokenizer, batch_indices, load_image, words_to_tiktoken
from superclip import InputError, cli

ROOT = Path(data.__file__).parent
WORDS = "a red green blue dog cat runs sits on the grass".split()


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(words_to_tiktoken(WORDS))


def photo(seed=0, size=(40, 30), mode="RGB"):
    """A smooth random picture, so that JPEG and resizing change it little."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC).convert(mode)


def encoded(image, format="JPEG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def bomb():
    """A PNG of a few hundred bytes that claims to have 40,000 x 40,000 pixels."""
    content = bytearray(encoded(photo(), "PNG"))
    content[16:24] = (40_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """members: list of (name, bytes) or TarInfo objects of folders and links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
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


# -----------------------------------------------------------------------------
# Names of shards


def test_expand_takes_paths_folders_globs_and_braces(tmp_path):
    paths = [shard(tmp_path / f"a-{i:02d}.tar", 1) for i in range(3)]
    assert data.expand([tmp_path]) == paths
    assert data.expand([f"{tmp_path}/*.tar"]) == paths
    assert data.expand([f"{tmp_path}/a-{{00..02}}.tar"]) == paths
    assert data.expand([f"{tmp_path}/a-{{00..00}}.tar", paths[2]]) == [paths[0], paths[2]]
    assert data.expand([f"{tmp_path}/a-{{0..0}}{{0..2}}.tar"]) == paths


def test_expand_takes_names_with_spaces_commas_brackets_and_unicode(tmp_path):
    folder = tmp_path / "my, dätä [1]"
    paths = [shard(folder / f"ein name-{i}.tar", 1) for i in range(2)]
    assert data.expand(paths[:1]) == paths[:1]
    assert data.expand([folder]) == paths
    assert data.expand([f"{tmp_path}/my, d*/*.tar"]) == paths
    assert data.expand([f"{folder}/ein name-{{0..1}}.tar"]) == paths


def test_a_shard_that_is_given_twice_counts_once(tmp_path, monkeypatch):
    path = shard(tmp_path / "x.tar", 1)
    (tmp_path / "link.tar").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for again in (path, "x.tar", "./x.tar", "link.tar", "*.tar", "."):
        assert len(data.expand([path, again])) == 1


def test_expand_says_what_is_wrong(tmp_path):
    shard(tmp_path / "a-0.tar", 1)
    with pytest.raises(InputError, match="no shards match .*a-1.tar"):  # not downloaded
        data.expand([f"{tmp_path}/a-{{0..1}}.tar"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no shards match"):
        data.expand([tmp_path / "empty"])
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "b.tar.gz").write_bytes(b"")
    for name in ("packed", "packed/b.tar.gz"):
        with pytest.raises(InputError, match="compressed.*unpack it to .tar"):
            data.expand([tmp_path / name])


# -----------------------------------------------------------------------------
# Index


def test_the_index_finds_what_tarfile_finds(tmp_path, tokenizer):
    paths = [shard(tmp_path / "0.tar", 4), shard(tmp_path / "1.tar", 3, 4)]
    pairs = Pairs(paths, tokenizer, 8)
    assert len(pairs) == 7 and pairs.unused == []
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


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """An empty index cache, and a list of the shards whose headers are read."""
    reads = []

    class Pool:
        def __init__(self, processes):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def map(self, function, shards, numbers):
            reads.extend(shards)
            return map(function, shards, numbers)

    monkeypatch.setattr(data, "ProcessPoolExecutor", Pool)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return reads


def test_the_cache_is_used_until_a_shard_of_the_list_changes(tmp_path, reads):
    paths = [shard(tmp_path / "0.tar", 2), shard(tmp_path / "1.tar", 3)]
    first, _ = data.build_index(paths)
    assert reads == paths and len(first) == 5
    reads.clear()
    assert torch.equal(data.build_index(paths)[0], first) and reads == []
    os.utime(paths[0], ns=(1, 1))  # another mtime
    assert torch.equal(data.build_index(paths)[0], first) and reads == paths
    time = os.stat(paths[1]).st_mtime_ns
    shard(tmp_path / "1.tar", 30)
    os.utime(paths[1], ns=(time, time))  # another size
    assert len(data.build_index(paths)[0]) == 32
    for cached in (tmp_path / "cache" / "superclip-5").iterdir():
        cached.write_bytes(b"damaged")
    assert len(data.build_index(paths)[0]) == 32
    reads.clear()
    data.build_index(paths)
    assert reads == []
    data.build_index(paths[:1])  # another list has an index of its own
    assert reads == paths[:1]


def test_an_index_takes_less_than_40_bytes_a_sample_also_on_the_disk(tmp_path, reads):
    path = write_tar(tmp_path / "0.tar", [(f"{i}.jpg", b"x") for i in range(2000)])
    index, _ = data.build_index([path])
    assert index.element_size() * index.shape[1] < 40
    (cached,) = (tmp_path / "cache" / "superclip-5").iterdir()
    assert cached.stat().st_size < 40 * 2000


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
    for i in range(100):
        shard(tmp_path / f"{i:03d}.tar", 1, i)
    before, in_use = resource.getrlimit(resource.RLIMIT_NOFILE), set(os.listdir("/dev/fd"))
    limit = [n for n in range(1000) if str(n) not in in_use][40]  # so 40 more files may be open
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        with mock.patch("os.cpu_count", return_value=1):  # one process reads all headers
            assert len(data.build_index(data.expand([tmp_path]))[0]) == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_key_is_exact_if_it_is_ascii_and_fits_into_a_header(tmp_path, format):
    """A header holds 100 bytes of a name. Of a longer key, or of one that is not ASCII, it holds
    enough to find the sample: PAX puts question marks in, and GNU cuts it."""
    short, long, umlaut = "some folder/0012", "folder/" + "n" * 93, "größe"
    keys = [short, *([] if format == tarfile.USTAR_FORMAT else [long, umlaut])]
    pairs = Pairs(
        [write_tar(tmp_path / "0.tar", [(f"{k}.jpg", b"x") for k in keys], format)], None, 8
    )
    found = [pairs.key(row) for row in pairs.index.tolist()]
    assert found[:1] == [short] and len(found) == len(keys)
    if len(keys) == 3:
        assert found[1] == long
        assert found[2] == {tarfile.GNU_FORMAT: "größe", tarfile.PAX_FORMAT: "gr??e"}[format]


# -----------------------------------------------------------------------------
# Order


def test_every_sample_once_an_epoch_and_epochs_differ():
    n, B = 103, 10
    per_epoch = n // B
    steps = [batch_indices(n, B, 7, step) for step in range(2 * per_epoch)]
    epochs = [[s for batch in part for _, s in batch] for part in (steps[:10], steps[10:])]
    for samples in epochs:
        assert len(set(samples)) == len(samples) == per_epoch * B  # the rest of three is left out
        assert set(samples) <= set(range(n))
    assert epochs[0] != epochs[1]
    assert batch_indices(n, B, 8, 0) != batch_indices(n, B, 7, 0)
    visits = [visit for batch in steps for visit, _ in batch]
    assert visits == list(range(2 * per_epoch * B))


def test_the_order_is_a_pure_function_of_seed_and_step():
    forwards = [batch_indices(50, 8, 1, step) for step in range(20)]
    backwards = [batch_indices(50, 8, 1, step) for step in reversed(range(20))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 3, 4, 12])
def test_ranks_and_micro_batches_share_the_same_global_batches(world, micro):
    local, parts = 12 // world, []
    for rank in range(world):
        rows = slice(rank * local, (rank + 1) * local)
        mine = list(data.micro_batches(40, 12, rows, micro, 3, 2, 7))
        assert all(0 < len(part) <= micro for part in mine)
        parts.append(sum(mine, []))
    for step in range(2, 7):
        at = slice((step - 2) * local, (step - 1) * local)
        assert sum((mine[at] for mine in parts), []) == batch_indices(40, 12, 3, step)
    assert sum(map(len, parts)) == 5 * 12


def load(pairs, start, stop, workers=0):
    order = data.micro_batches(len(pairs), 4, slice(None), 4, 5, start, stop)
    loader = data.make_loader(pairs, workers, batch_sampler=order, collate_fn=pairs.collate)
    return list(loader)


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for a, b in zip(batches, expected):
        for name in ("images", "tokens", "label_tokens"):
            assert torch.equal(a[name], b[name])
        assert a["replaced"] == b["replaced"]


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    broken = [("bad.jpg", b"no image"), ("bad.txt", b"a dog")]
    members = [m for i in range(6) for m in good(f"{i}", i)]
    first = write_tar(folder / "0.tar", members[:6] + broken + members[6:])
    return [first, shard(folder / "1.tar", 6, 6)]


def test_workers_follow_the_cores_and_hold_four_gib_at_most(two_shards, tokenizer, monkeypatch):
    asked = []
    loader = lambda *_, num_workers, **__: asked.append(num_workers) or []  # noqa: E731
    monkeypatch.setattr(data, "DataLoader", loader)
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda _: range(32), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    pairs, device = Pairs(two_shards, tokenizer, 224), torch.device("cpu")
    for micro_batch_size, workers, expected in (
        (256, None, 16),  # the cores of this process; two batches of 256 take 77 MB a worker
        (4096, None, 3),  # two of 4,096 take 1.2 GB
        (10**6, None, 1),
        (10**6, 5, 5),  # whoever asks for them gets them
        (256, 0, 0),
    ):
        assert list(data.load_batches(pairs, [], micro_batch_size, workers, device)) == []
        assert asked[-1] == expected
        images = 2 * micro_batch_size * 3 * 224**2
        assert workers or expected <= 1 or expected * images <= 4 * 2**30


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])  # three: more than there are shards
def test_batches_do_not_depend_on_the_workers(two_shards, tokenizer, workers):
    pairs = Pairs(two_shards, tokenizer, 24)
    assert_same(load(pairs, 0, 7, workers), load(pairs, 0, 7))


def test_a_run_started_at_step_k_goes_on_exactly(two_shards, tokenizer):
    pairs = Pairs(two_shards, tokenizer, 24)
    whole = load(pairs, 0, 7)
    assert any(batch["replaced"] for batch in whole)
    assert_same(load(pairs, 4, 7), whole[4:])
    # The same sample in two epochs: another crop.
    assert not torch.equal(pairs[0, 2][0], pairs[13, 2][0])


def test_the_batch_holds_uint8_images_and_trimmed_tokens(two_shards, tokenizer):
    batch = load(Pairs(two_shards, tokenizer, 24), 0, 1)[0]
    assert batch["images"].shape == (4, 3, 24, 24) and batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    assert batch["tokens"].shape == (4, 16)
    assert (batch["tokens"][:, 0] == tokenizer.start).all()


def test_pairs_travel_to_workers_that_are_not_forked(two_shards, tokenizer):
    pairs = Pairs(two_shards, tokenizer, 24)
    image, ids, _, _ = pairs[5, 2]
    copy = pickle.loads(pickle.dumps(pairs))
    assert torch.equal(copy[5, 2][0], image) and copy[5, 2][1] == ids


# -----------------------------------------------------------------------------
# Captions


def one_sample(path, fields, *more):
    """A shard of one sample with these fields in its .json."""
    members = [("0.jpg", JPEG), ("0.json", json.dumps(fields).encode()), *more]
    return [write_tar(path, members)]


def test_captions_from_json_one_of_a_list_each_visit(tmp_path, tokenizer):
    fields = {"captions": ["a red dog", "a blue cat"], "long": "the green grass"}
    shards = one_sample(tmp_path / "0.tar", fields)
    pairs = Pairs(shards, tokenizer, 8, ["json.captions"], ["json.long"])
    items = [pairs[visit, 0] for visit in range(40)]
    drawn = [tokenizer.decode(ids) for _, ids, _, _ in items]
    assert set(drawn) == {"a red dog", "a blue cat"} and 8 < drawn.count("a red dog") < 32
    assert {tokenizer.decode(label) for _, _, label, _ in items} == {"the green grass"}
    assert drawn == [tokenizer.decode(pairs[visit, 0][1]) for visit in range(40)]
    same = Pairs(shards, tokenizer, 8, ["json.captions"])
    for _, ids, label, _ in (same[visit, 0] for visit in range(10)):
        assert ids == label  # one caption for both


def test_a_source_named_twice_is_drawn_twice_as_often(tmp_path, tokenizer):
    shards = one_sample(tmp_path / "0.tar", {"long": "the grass"}, ("0.txt", b"a dog"))
    for captions, expected in ((["txt", "json.long"], 200), (["txt", "json.long", "txt"], 267)):
        pairs = Pairs(shards, tokenizer, 8, captions)
        drawn = [tokenizer.decode(pairs[visit, 0][1]) for visit in range(400)]
        assert abs(drawn.count("a dog") - expected) < 30  # three standard deviations
        assert set(drawn) == {"a dog", "the grass"}


def test_half_of_a_surrogate_pair_does_not_break_what_prints_it(tmp_path, tokenizer):
    path = one_sample(tmp_path / "0.tar", {"c": ["a \ud800 dog", "\ud83d\ude00"]})
    pairs = Pairs(path, tokenizer, 8, ["json.c"])
    texts = pairs.texts(pairs.index[0].tolist(), "json.c")
    assert texts == ["a ? dog", "😀"]
    assert "".join(texts).encode()


def test_labels_are_not_cut_to_the_context(tmp_path):
    tokenizer = Tokenizer(words_to_tiktoken(WORDS), context_length=8)
    path = write_tar(tmp_path / "0.tar", [("0.jpg", JPEG), ("0.txt", b"a red dog " * 9)])
    pairs = Pairs([path], tokenizer, 8)
    batch = pairs.collate([pairs[0, 0]])
    assert batch["tokens"].shape == (1, 8) and batch["tokens"][0, -1] == tokenizer.end
    assert batch["label_tokens"].shape == (1, 32)
    assert (batch["label_tokens"] == tokenizer.end).nonzero().tolist() == [[0, 28]]


def test_an_unknown_source_of_captions_is_an_error(tmp_path, tokenizer):
    path = shard(tmp_path / "0.tar", 1)
    for captions, labels in ((["caption"], None), (["txt"], ["json."])):
        with pytest.raises(InputError, match="txt or json.FIELD"):
            Pairs([path], tokenizer, 8, captions, labels)


# -----------------------------------------------------------------------------
# Images


def reference(image, box, size):
    """The crop and the antialiased bicubic resize, by Pillow."""
    x, y, w, h = box
    resized = image.resize((size, size), Image.BICUBIC, box=(x, y, x + w, y + h))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def mean_difference(a, b):
    return (a.int() - b.int()).abs().float().mean().item()


def error_of(image, size=16):
    with pytest.raises(data.BadSample) as error:
        load_image(image, size)
    return str(error.value)


@pytest.mark.parametrize("size", [20, 50])
def test_crop_and_resize_equal_pillows(size):
    image = photo(1, (40, 30))
    box = data.crop_box(40, 30, random.Random(2))
    pixels = load_image(encoded(image, "PNG"), size, random.Random(2))
    assert mean_difference(pixels, reference(image, box, size)) < 0.6
    centre = load_image(encoded(image, "PNG"), size)
    assert mean_difference(centre, reference(image, (5, 0, 30, 30), size)) < 0.6


TURN = [None, Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM]
TURN += [Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_crop_is_taken_in_the_stored_picture_and_then_turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(3, (48, 32)), quality=95, exif=exif)
    stored = Image.open(io.BytesIO(content))
    x, y, w, h = data.crop_box(48, 32, random.Random(0))
    crop = stored.crop((x, y, x + w, y + h))
    turned = crop if orientation == 1 else crop.transpose(TURN[orientation - 1])
    expected = reference(turned, (0, 0, *turned.size), 32)
    assert mean_difference(load_image(content, 32, random.Random(0)), expected) < 1
    # The centre is the same one before and after.
    upright = ImageOps.exif_transpose(stored)
    box = data.crop_box(*upright.size)
    assert mean_difference(load_image(content, 32), reference(upright, box, 32)) < 1


def test_draft_never_decodes_below_the_crop(monkeypatch):
    sizes = []
    original = Image.Image.crop
    monkeypatch.setattr(
        Image.Image, "crop", lambda image, box: sizes.append(image.size) or original(image, box)
    )
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


def test_a_crop_of_a_draft_stays_inside_the_picture():
    """A crop that ran past the edge would be black there."""
    for size in ((375, 500), (1023, 768), (301, 203)):
        white = encoded(Image.new("RGB", size, "white"))
        for seed in range(60):
            assert load_image(white, 72, random.Random(seed)).min() == 255


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


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_pictures_go_on_white(mode):
    """The upper half is grey. The lower one would be black, but is transparent."""
    options = {} if mode[-1] == "A" else {"transparency": {"RGB": (0, 0, 0)}.get(mode, 0)}
    image = Image.new(mode.removesuffix("A"), (16, 16), 0)
    if mode == "P":
        image.putpalette([0, 0, 0, 100, 100, 100])
    image.paste({"P": 1, "LA": 100, "L": 100}.get(mode, (100,) * 3), (0, 0, 16, 8))
    if mode[-1] == "A":
        alpha = Image.new("L", (16, 16), 0)
        alpha.paste(255, (0, 0, 16, 8))
        image.putalpha(alpha)
    pixels = load_image(encoded(image, "PNG", **options), 16)
    assert (pixels[:, :8] == 100).all() and (pixels[:, 8:] == 255).all()


def test_half_transparent_is_half_white():
    content = encoded(Image.new("RGBA", (16, 16), (100, 0, 255, 128)), "PNG")
    assert load_image(content, 16)[:, 0, 0].tolist() == pytest.approx([177, 127, 255], abs=1)


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


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    decode = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda *_: pytest.fail("decoded"))
    assert "decompression bomb" in error_of(bomb())
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)


def test_what_cannot_be_decoded_says_so():
    content = encoded(photo(8, (200, 200)).filter(ImageFilter.FIND_EDGES), quality=95)
    for broken in (b"", b"text", content[: len(content) // 2], content[:20] + bytes(400)):
        reason = error_of(broken)
        assert "cannot be decoded" in reason and "0x" not in reason  # no address in memory
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
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (encoded(photo(9, (400, 300)), exif=exif), encoded(photo(9, mode="P"), "PNG")):
        image = Image.open(io.BytesIO(content))
        before = image.size, image.mode
        assert torch.equal(partial(load_image, size=16)(image), load_image(image, 16))
        assert (image.size, image.mode) == before
        assert mean_difference(load_image(image, 16), load_image(content, 16)) < 4  # by draft


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
    "empty caption": ([("x.jpg", JPEG), ("x.txt", b"")], "x", "no txt, or an empty one"),
    "white-space caption": ([("x.jpg", JPEG), ("x.txt", b" \n\t ")], "x", "caption is empty"),
    "caption not UTF-8": ([("x.jpg", JPEG), ("x.txt", b"caf\xe9")], "x", "not UTF-8 text"),
    "caption absurdly long": ([("x.jpg", JPEG), ("x.txt", b"a " * 20_000)], "x", "20,000 char"),
    "image without caption": ([("x.jpg", JPEG)], "x", "no txt"),
    "caption without image": ([("x.txt", b"a dog")], "x", "no image"),
    "corrupt JPEG": ([("x.jpg", JPEG[:99] + bytes(300)), ("x.txt", b"a")], "x", "be decoded"),
    "text as image": ([("x.jpg", b"404 not found"), ("x.txt", b"a")], "x", "cannot be decoded"),
    "truncated JPEG": ([("x.jpg", JPEG[:-200]), ("x.txt", b"a")], "x", "cannot be decoded"),
    "bomb": ([("x.png", bomb()), ("x.txt", b"a")], "x", "decompression bomb"),
    "Unicode name": ([("größe 日.jpg", b"-"), ("größe 日.txt", b"a")], "gr??e ?", "be decoded"),
    "long name": ([("n" * 99 + ".jpg", b"-"), ("n" * 99 + ".txt", b"a")], "n" * 99, "be decoded"),
}


def all_bad(pairs):
    """What the index does not use, and every sample that is replaced: list of (shard, key,
    reason)."""
    replaced = [pairs[sample, sample][3][:1] for sample in range(len(pairs))]
    return pairs.unused + sum(replaced, [])


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


def test_another_sample_replaces_a_bad_one_the_same_in_every_process(tmp_path, tokenizer):
    path = write_tar(tmp_path / "0.tar", [*good("a", 1), ("x.jpg", JPEG), ("y.jpg", JPEG)])
    pairs = Pairs([path], tokenizer, 16)
    _, ids, _, replaced = pairs[7, 1]
    assert tokenizer.decode(ids) == "a red dog 1"
    assert replaced and {*replaced} <= {(path, key, "no txt, or an empty one") for key in "xy"}
    assert pairs[7, 1][3] == replaced  # it depends on the visit alone


def test_a_json_that_holds_no_caption_is_named(tmp_path, tokenizer):
    contents = [b"{", b"[]", b'{"c": 3}', b'{"c": [null]}', b'{"c": []}', b'{"c": " "}', b"\xff"]
    contents += [b"[" * 99_999, b"{}", b'{"c": "a dog"}', b'{"c": "\\ud800 dog"}']
    members = [m for i, c in enumerate(contents) for m in ((f"{i}.jpg", JPEG), (f"{i}.json", c))]
    pairs = Pairs([write_tar(tmp_path / "0.tar", members)], tokenizer, 16, ["json.c"])
    assert [key for _, key, _ in all_bad(pairs)] == [str(i) for i in range(9)]


def test_a_sample_that_is_there_twice_is_named_and_the_first_is_used(tmp_path, tokenizer):
    path = write_tar(tmp_path / "0.tar", [*good("a", 1), *good("a", 2), *good("b", 3)])
    pairs = Pairs([path], tokenizer, 16)
    assert len(pairs) == 2 and pairs.texts(pairs.index[0].tolist(), "txt") == ["a red dog 1"]
    assert [key for _, key, _ in pairs.unused] == ["a"] and "twice" in pairs.unused[0][2]


def test_what_is_no_part_of_a_sample_is_counted_by_its_extension(tmp_path, tokenizer):
    others = [
        special("dir.jpg", tarfile.DIRTYPE),
        special("link.jpg", tarfile.SYMTYPE, "a.jpg"),
        special("hard.jpg", tarfile.LNKTYPE, "a.jpg"),
        special("pipe.txt", tarfile.FIFOTYPE),
        ("__MACOSX/._a.jpg", b"x"),
        ("a.mask.png", b"x"),  # a webdataset key of its own, not a second image of sample a
        ("README", b"x"),
        ("a.cls", b"3"),
        ("b.v2.jpg", JPEG),  # a key with a dot in it: not found, but not silently
        ("c.v2.jpg", JPEG),
    ]
    path = write_tar(tmp_path / "0.tar", [*good("a"), *others, *good("d/b.c/e", 1)])
    pairs = Pairs([path], tokenizer, 16)
    assert len(pairs) == 2
    counts = {key: reason.rpartition(": ")[2] for _, key, reason in pairs.unused}
    one = dict.fromkeys(("*._a.jpg", "*.mask.png", "*", "*.cls", "*.txt"), "1 files")
    assert counts == {**one, "*.v2.jpg": "2 files", "*.jpg": "2 files"}  # the last are links
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
    named = all_bad(Pairs([path], tokenizer, 16))
    assert {key for _, key, _ in named} == {"", "00002"}
    assert ("", "unexpected end of data; the rest is not read") in [entry[1:] for entry in named]


def test_a_shard_that_ends_inside_a_header(tmp_path, tokenizer):
    path = cut(tmp_path, lambda member: member.offset + 100)
    pairs = Pairs([path], tokenizer, 16)
    assert len(pairs) == 2 and len(all_bad(pairs)) == 1
    assert "the rest is not read" in pairs.unused[0][2]


def test_a_damaged_header_in_the_middle(tmp_path, tokenizer):
    path = Path(shard(tmp_path / "0.tar", 3))
    with tarfile.open(path) as tar:
        offset = tar.getmember("00001.jpg").offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 200] = b"?" * 200
    path.write_bytes(content)
    pairs = Pairs([str(path)], tokenizer, 16)
    assert len(pairs) == 1 and len(pairs.unused) == 1
    assert "damaged header" in pairs.unused[0][2] and str(offset) in pairs.unused[0][2]


def test_a_file_that_is_not_a_tar_does_not_stop_the_others(tmp_path, tokenizer):
    (tmp_path / "0.tar").write_bytes(b"")  # empty
    (tmp_path / "1.tar").write_bytes(b"<html>" * 500)
    write_tar(tmp_path / "2.tar", [])  # a tar of nothing
    with tarfile.open(tmp_path / "3.tar", "w:gz") as tar:  # compressed under a wrong name
        tar.addfile(tarfile.TarInfo("a.jpg"))
    shard(tmp_path / "4.tar", 2)
    pairs = Pairs(data.expand([tmp_path]), tokenizer, 16)
    assert len(pairs) == 2
    assert [Path(path).name for path, _, _ in pairs.unused] == ["0.tar", "1.tar", "3.tar"]
    with pytest.raises(InputError, match="no image-caption pairs in .*1.tar: .*not read"):
        Pairs([str(tmp_path / "1.tar")], tokenizer, 16)
    with pytest.raises(InputError, match="no image-caption pairs in .*2.tar"):
        Pairs([str(tmp_path / "2.tar")], tokenizer, 16)


def test_a_shard_that_changes_during_the_run(tmp_path, tokenizer):
    path = shard(tmp_path / "0.tar", 3)
    pairs = Pairs([path], tokenizer, 16)
    os.truncate(path, pairs.index[2, data.IMAGE].item() * data.BLOCK + 10)
    image, _, _, replaced = pairs[0, 2]
    assert image.shape == (3, 16, 16) and replaced == [(path, "00002", "the shard ends too early")]


def test_nothing_but_bad_samples_is_an_error_in_one_sentence(tmp_path, tokenizer, capsys):
    members = [m for i in range(120) for m in ((f"{i}.jpg", b"x"), (f"{i}.txt", b"a"))]
    pairs = Pairs([write_tar(tmp_path / "0.tar", members)], tokenizer, 16)
    for workers in (0, 1):
        with pytest.raises(SystemExit) as stop:
            cli(lambda _, workers=workers: load(pairs, 0, 1, workers))
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1
        assert message.startswith("error: a hundred bad samples in a row")
        # A worker that is left over would hold up the end of the program for half a minute.
        assert multiprocessing.active_children() == []


@pytest.fixture(scope="module")
def nasty_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nasty")
    for i, (members, _, _) in enumerate(NASTY.values()):
        write_tar(folder / f"{i:02d}.tar", [*good("a", i), *members, *good("b", i + 50)])
    path = Path(shard(folder / "90.tar", 3))
    path.write_bytes(path.read_bytes()[:-11_000])
    (folder / "91.tar").write_bytes(b"")
    (folder / "vocab.tiktoken").write_text(words_to_tiktoken(WORDS))
    return folder


TRAIN = "--model tiny --image_size 24 --batch_size 8 --device cpu --log_every 6 --workers 0"


def test_it_trains_through_all_of_it_and_names_each_once(nasty_shards, tmp_path, capsys):
    options = ["--train_data", str(nasty_shards), "--out_dir", str(tmp_path / "out")]
    train.main([*options, *TRAIN.split(), "--steps", "12"])  # two epochs
    printed = "".join(capsys.readouterr())
    for i, (_, key, reason) in enumerate(NASTY.values()):
        lines = [line for line in printed.splitlines() if reason in line and f" {key}" in line]
        if "no image" not in reason:  # those are not in the index, and never met
            assert sum(f"{i:02d}.tar" in line for line in lines) == 1, (i, key, reason, printed)


# -----------------------------------------------------------------------------
# Files


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "some file.json"
    data.write_file(path, lambda file: file.write(b"first"))

    def fails(file):
        file.write(b"second")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        data.write_file(path, fails)
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["some file.json"]
    data.write_file(path, lambda file: file.write(b"third"))
    assert path.read_bytes() == b"third" and os.listdir(tmp_path) == ["some file.json"]
