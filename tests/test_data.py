"""From pairs to batches: the order, what is drawn of a pair, what replaces a bad one, and that a
batch is the same however it was loaded."""

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from material import encoded, good_sample, photo, write_good_shard, write_tar
from PIL import Image

import data
from data import Pairs, Tokenizer, batch_indices, rng_of_visit, words_to_tiktoken

CPU = torch.device("cpu")
WORDS = "a red green blue dog cat runs sits on the grass".split()
TOKENIZER = Tokenizer(words_to_tiktoken(WORDS), context_length=32)
JPEG = encoded(photo())

# ---- the order


def test_the_order_is_a_pure_function_of_the_step():
    forwards = [batch_indices(103, 10, 7, step) for step in range(20)]

    backwards = [batch_indices(103, 10, 7, step) for step in reversed(range(20))]

    assert forwards == backwards[::-1]


def test_every_epoch_is_another_permutation():
    """Of 103 samples in batches of 10, three are left out of an epoch."""
    visits = []
    samples = []
    for step in range(20):
        for visit, sample in batch_indices(103, 10, 7, step):
            visits.append(visit)
            samples.append(sample)

    first, second = samples[:100], samples[100:]
    assert visits == [*range(200)]
    assert len({*first}) == len({*second}) == 100
    assert {*samples} <= {*range(103)}
    assert first != second


def test_another_seed_is_another_order():
    assert batch_indices(103, 10, 7, 0) != batch_indices(103, 10, 8, 0)


@pytest.mark.parametrize("n, distance", [(200, 100), (100_000, 100), (250_000, 250)])
def test_every_hundredth_pair_is_held_out_but_a_thousand_at_most(tmp_path, n, distance):
    shard = write_good_shard(tmp_path / "0.tar", 1)
    pairs = Pairs([shard], TOKENIZER, 8)
    val_pairs = Pairs([shard], TOKENIZER, 8)
    pairs.index = val_pairs.index = torch.arange(n)

    data.hold_out(pairs, val_pairs)

    assert val_pairs.index.tolist() == [*range(0, n, distance)]
    assert len(pairs) + len(val_pairs) == n
    assert not {*pairs.index.tolist()} & {*val_pairs.index.tolist()}


def test_the_fingerprint_changes_with_shards_sources_and_captions(tmp_path):
    def fingerprint(content, captions=("txt",)):
        path.write_bytes(content)
        data.open_shard.cache_clear()
        return Pairs([str(path)], TOKENIZER, 8, captions).fingerprint

    path = tmp_path / "0.tar"
    write_good_shard(path, 150)
    content = path.read_bytes()
    prints = [
        fingerprint(content),
        fingerprint(content, ["txt", "json.long"]),
        fingerprint(content.replace(b"a red dog", b"a red cat")),
        fingerprint(Path(write_good_shard(tmp_path / "1.tar", 151)).read_bytes()),
    ]

    assert fingerprint(content) == prints[0]
    assert len({*prints}) == 4


# ---- what is drawn of a pair


@pytest.fixture
def captioned(tmp_path):
    """A shard with one picture, which has several captions."""
    fields = {"both": ["a red dog", "a blue cat"], "long": "the green grass", "odd": "a \ud800 dog"}
    members = [("0.jpg", JPEG), ("0.json", json.dumps(fields).encode()), ("0.txt", b"a dog")]
    return write_tar(tmp_path / "0.tar", members)


def drawn_from(pairs, n=400):
    """Captions and labels of so many visits to the first sample, two lists of texts."""
    items = [pairs[visit, 0] for visit in range(n)]
    captions = [TOKENIZER.decode(ids) for _, ids, _, _ in items]
    return captions, [TOKENIZER.decode(label_ids) for _, _, label_ids, _ in items]


# Sources, and how often each caption is drawn from them in 400 visits. Half of a surrogate pair
# becomes a question mark, or it could not be written to a file.
SOURCES = {
    "a list": (["json.both"], {"a red dog": 200, "a blue cat": 200}),
    "one twice": (["txt", "json.odd", "txt"], {"a dog": 267, "a ? dog": 133}),
}


@pytest.mark.parametrize("sources, expected", SOURCES.values(), ids=SOURCES)
def test_captions_are_drawn_from_their_sources(captioned, sources, expected):
    """Within three standard deviations. The caption is also the label."""
    captions, labels = drawn_from(Pairs([captioned], TOKENIZER, 8, sources))

    assert Counter(captions) == pytest.approx(expected, abs=30)
    assert labels == captions


def test_labels_may_have_sources_of_their_own(captioned):
    captions, labels = drawn_from(Pairs([captioned], TOKENIZER, 8, ["txt"], ["json.long"]), n=5)

    assert captions == 5 * ["a dog"]
    assert labels == 5 * ["the green grass"]


def test_what_is_drawn_is_a_function_of_seed_and_visit(captioned):
    pairs = Pairs([captioned], TOKENIZER, 8, ["json.both"])
    again = pickle.loads(pickle.dumps(pairs))  # as another process has it
    other = Pairs([captioned], TOKENIZER, 8, ["json.both"], seed=1)

    assert drawn_from(pairs, 50) == drawn_from(again, 50)
    assert drawn_from(pairs, 50) != drawn_from(other, 50)


def test_the_crop_is_that_of_the_visit(captioned):
    """Drawn after the source, and the caption in it."""
    pairs = Pairs([captioned], TOKENIZER, 8, crop_area=0.5)

    images = [pairs[visit, 0][0] for visit in (0, 1, 0)]

    rng = rng_of_visit(0, 1)
    rng.choice(["txt"])
    rng.choice(["a dog"])
    assert torch.equal(images[1], data.load_image(JPEG, 8, rng, 0.5))
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])


def test_a_caption_that_is_also_the_label_is_tokenised_once(tmp_path, monkeypatch):
    encoded = []
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encoded.append(text) or [1])
    pairs = Pairs([write_good_shard(tmp_path / "0.tar", 1)], TOKENIZER, 8)

    _, ids, label_ids, _ = pairs[0, 0]

    assert ids == label_ids == [1]
    assert encoded == ["a red dog 0"]


# ---- bad samples

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
BAD_CAPTIONS = {
    "empty caption": b"",
    "white space": b" \n\t ",
    "Latin-1": b"caf\xe9",
    "too long": b"a " * 20_000,
}
BAD_JSON = {
    "half of a JSON": b"{",
    "a JSON of a list": b"[]",
    "a number for a caption": b'{"c": 3}',
    "null for a caption": b'{"c": [null]}',
    "no caption in the list": b'{"c": []}',
    "a space for a caption": b'{"c": " "}',
    "no UTF-8": b"\xff",
    "a deep JSON": b"[" * 99_999,
    "an empty JSON": b"{}",
    "another field": b'{"d": "a dog"}',
}
# case -> (members that make one bad sample named x, source of its captions)
BAD = {
    "no caption": ([("x.jpg", JPEG)], "txt"),
    "no image": ([("x.txt", b"a dog")], "txt"),
    **{case: ([("x.jpg", image), ("x.txt", b"a")], "txt") for case, image in BAD_IMAGES.items()},
    **{case: ([("x.jpg", JPEG), ("x.txt", text)], "txt") for case, text in BAD_CAPTIONS.items()},
    **{case: ([("x.jpg", JPEG), ("x.json", text)], "json.c") for case, text in BAD_JSON.items()},
}


@pytest.mark.parametrize("members, source", BAD.values(), ids=BAD)
def test_a_bad_sample_is_named_and_another_one_replaces_it(tmp_path, members, source):
    """It is named by the index or, if its members are there, when it is drawn."""
    good = [("a.jpg", JPEG), ("a.json", b'{"c": "a red dog"}'), ("a.txt", b"a red dog")]
    path = write_tar(tmp_path / "0.tar", [*members, *good])
    pairs = Pairs([path], TOKENIZER, 16, [source])

    image, ids, _, replaced = pairs[7, 0]

    assert image.shape == (3, 16, 16)
    assert TOKENIZER.decode(ids) == "a red dog"
    named = replaced or [f"{shard} {key}: {reason}" for shard, key, reason in pairs.unused]
    assert named
    assert all(text.startswith(f"{path} x: ") for text in named)
    assert not any("0x" in text for text in named)  # no address in memory


def test_the_same_sample_replaces_a_bad_one_in_every_process(tmp_path):
    members = [("x.jpg", b"bad"), ("x.txt", b"a")]
    for i in range(9):
        members += good_sample(str(i), i)
    pairs = Pairs([write_tar(tmp_path / "0.tar", members)], TOKENIZER, 16)

    first = [pairs[visit, 0] for visit in range(20)]
    again = [pickle.loads(pickle.dumps(pairs))[visit, 0] for visit in range(20)]

    assert [ids for _, ids, _, _ in first] == [ids for _, ids, _, _ in again]
    assert len({tuple(ids) for _, ids, _, _ in first}) > 5  # it is another one at each visit


# ---- batches

LONG = "a dog sits on the red grass " * 8  # 56 tokens


@pytest.fixture
def odd_pairs(tmp_path, monkeypatch):
    """Fourteen pairs: one is bad, and one has a long caption. A process loads three at a time, so
    that a micro-batch of four has to be joined."""
    monkeypatch.setattr(data, "SMALL", 3)
    odd = [("long.jpg", JPEG), ("long.txt", LONG.encode()), ("x.jpg", b"bad"), ("x.txt", b"a")]
    shards = [write_tar(tmp_path / "0.tar", odd), write_good_shard(tmp_path / "1.tar", 12)]
    return Pairs(shards, TOKENIZER, 24, seed=5)


def load(pairs, workers=0, start=0, stop=6):
    """What a process loads: the last 8 pairs of each batch of 12, four at a time."""
    return list(data.load_batches(pairs, 12, slice(4, 12), 4, start, stop, workers, CPU))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers, start", [(0, 0), (1, 2), (3, 0)])
def test_joined_batches_equal_the_collated_whole(odd_pairs, workers, start):
    """Whatever the workers, and wherever a run begins."""
    loaded = load(odd_pairs, workers, start)

    whole = []
    for step in range(start, 6):
        local = batch_indices(len(odd_pairs), 12, 5, step)[4:12]
        whole += [
            odd_pairs.collate([odd_pairs[i] for i in part]) for part in (local[:4], local[4:])
        ]
    assert len(loaded) == len(whole)
    for (batch, bad), expected in zip(loaded, whole):
        assert bad == len(expected.pop("replaced"))
        torch.testing.assert_close(batch, expected, rtol=0, atol=0)


def test_images_of_a_batch_are_bytes_in_channels_last(odd_pairs):
    for batch, _ in load(odd_pairs):
        assert batch["images"].shape == (4, 3, 24, 24)
        assert batch["images"].dtype == torch.uint8
        assert batch["images"].is_contiguous(memory_format=torch.channels_last)


def test_captions_are_cut_to_the_context_and_labels_are_not(odd_pairs):
    """Of a caption of 56 tokens, 32 with start and end are left, and 58 for the label. Lengths are
    multiples of 16, so that few of them are compiled."""
    batches = [batch for batch, _ in load(odd_pairs)]

    assert {batch["tokens"].shape[1] for batch in batches} == {16, 32}
    assert {batch["label_tokens"].shape[1] for batch in batches} == {16, 64}
    ids = TOKENIZER.encode(LONG)
    for batch in batches:
        if batch["label_tokens"].shape[1] == 64:
            cut = [TOKENIZER.start, *ids[:30], TOKENIZER.end]
            assert cut in batch["tokens"].tolist()
            assert [TOKENIZER.start, *ids, TOKENIZER.end] in batch["label_tokens"][:, :58].tolist()


@pytest.mark.parametrize("longest, length", [(0, 16), (14, 16), (15, 32), (30, 32), (31, 48)])
def test_with_start_and_end_a_length_is_a_multiple_of_16(longest, length):
    assert data.round_up([[7], [7] * longest]) == length


def test_a_bad_sample_is_named_once_and_counted_each_time(odd_pairs, capsys):
    counts = [bad for _, bad in load(odd_pairs)]

    assert sum(counts) > 1
    assert capsys.readouterr().err.count("0.tar x: ") == 1
