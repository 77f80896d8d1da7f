"""Test the way from pairs to batches: the order of pairs, what is drawn for a pair, and what
replaces a bad one. A batch does not depend on how it was loaded."""

import json
import random
import traceback
from collections import Counter

import pytest
import torch
from material import cases, encoded, photo, write_captions, write_shard

import data
from common import processes
from common.cli import InputError
from common.tokenizer import Tokenizer, words_to_tiktoken
from data import Pairs, Samples
from superclip import PAD

WORDS = "a red green blue dog cat runs sits on the grass".split()
TOKENIZER = Tokenizer(words_to_tiktoken(WORDS), context_length=32)
JPEG = encoded(photo())
# torch warns if there are more workers than cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

# ---- the order


def test_every_epoch_is_another_permutation(tmp_path):
    """In batches of 10, an epoch of 23 samples leaves out three."""
    captions = [f"number {i}" for i in range(23)]
    samples = Samples([write_captions(tmp_path / "0.tar", *captions)])
    pairs = Pairs(samples, TOKENIZER, 8, 10, seed=7)

    drawn = [TOKENIZER.decode(pairs[position][1]) for position in range(40)]

    first, second = drawn[:20], drawn[20:]
    assert len({*first}) == len({*second}) == 20
    assert first != second


# ---- what is drawn for a pair


@pytest.fixture
def captioned(tmp_path):
    """Return a shard with one picture, which has several captions."""
    fields = {"both": ["a red dog", "a blue cat"], "odd": "a \ud800 dog"}
    sample = {"jpg": JPEG, "json": json.dumps(fields).encode(), "txt": b"a dog"}
    return write_shard(tmp_path / "0.tar", [sample])


def test_captions_and_labels_are_drawn_from_their_sources(captioned):
    """A source that is named twice is drawn twice as often, within three standard deviations. Half
    of a surrogate pair becomes a question mark, because it cannot be written to a file."""
    samples = Samples([captioned], ["txt", "json.odd", "txt"])
    pairs = Pairs(samples, TOKENIZER, 8, 1, ["json.both"])

    _, captions, labels, *_ = zip(*(pairs[position] for position in range(400)))

    captions = Counter(map(TOKENIZER.decode, captions))
    labels = Counter(map(TOKENIZER.decode, labels))
    assert captions == pytest.approx({"a dog": 267, "a ? dog": 133}, abs=30)
    assert labels == pytest.approx({"a red dog": 200, "a blue cat": 200}, abs=30)


def test_label_captions_that_are_nowhere_are_refused_at_once(captioned):
    with pytest.raises(InputError, match="json.typo"):
        Pairs(Samples([captioned]), TOKENIZER, 8, 1, ["json.typo"])


def test_what_is_drawn_is_a_function_of_seed_and_position(captioned):
    """A caption is drawn, a crop, and the 12 of 16 patches that are kept."""

    def draws(seed):
        samples = Samples([captioned], ["json.both"])
        pairs = Pairs(samples, TOKENIZER, 8, 1, None, seed, 0.5, 16, 0.25)
        return [pairs[position] for position in range(20)]

    first = draws(seed=0)

    torch.testing.assert_close(draws(seed=0), first, rtol=0, atol=0)
    pixels, captions, labels, kept, *_ = zip(*first)
    _, _, _, kept_otherwise, *_ = zip(*draws(seed=1))
    assert kept_otherwise != kept
    assert labels == captions  # they have the same sources
    assert len(torch.stack(pixels).unique(dim=0)) > 15
    assert len({*map(tuple, captions)}) == 2
    assert {len({*keep}) for keep in kept} == {12}


@pytest.mark.parametrize("width, height, share", [(300, 200, 8 / 9), (1600, 900, 3 / 4)])
def test_a_long_picture_is_cropped_to_the_share_that_the_page_names(width, height, share):
    """Training sees 88.9 % of a picture of 3:2, and 75 % of one of 16:9."""
    x0, y0, x1, y1 = data.crop_box(width, height, 0.9, random.Random(0))

    assert (x1 - x0) * (y1 - y0) / (width * height) == pytest.approx(share, rel=0.01)


# ---- bad samples

BAD = {  # case -> image, caption, JSON with the caption
    "white space": (JPEG, b" \n\t ", b""),
    "Latin-1": (JPEG, b"caf\xe9", b""),
    "too long": (JPEG, b"a " * 20_000, b""),
    "half of a JSON": (JPEG, b"", b"{"),
    "a number in the JSON": (JPEG, b"", b'{"c": 3}'),
    "JSON nested too deeply": (JPEG, b"", b"[" * 100_000),
    "truncated JPEG": (JPEG[:-200], b"a", b""),
    "no format of the web": (encoded(photo(), "PPM"), b"a", b""),
}


@cases("image, caption, fields", BAD)
def test_a_bad_sample_is_named_once_and_replaced(tmp_path, capsys, image, caption, fields):
    """Each batch counts the pairs that replace one."""
    bad = {"jpg": image, "txt": caption, "json": fields}
    good = {"jpg": JPEG, "txt": b"a red dog", "json": b'{"c": "a red dog"}'}
    path = write_shard(tmp_path / "0.tar", [good, bad])
    pairs = Pairs(Samples([path], ["json.c" if fields else "txt"]), TOKENIZER, 16, 2)

    items = [pairs[position] for position in range(10)]

    _, num_replaced = pairs.collate(items)
    assert [TOKENIZER.decode(ids) for _, ids, *_ in items] == 10 * ["a red dog"]
    assert num_replaced == 5
    assert capsys.readouterr().err.count(f"{path}:0001: ") == 1


MISTAKES = [
    ("data.Samples.read_source", 0),
    ("data.crop_box", 1),
    ("common.images.decode_smaller", 0),
    ("common.images.upright_rgb", 1),
]


@pytest.mark.parametrize("function, workers", MISTAKES)
def test_a_mistake_in_the_code_is_no_bad_sample(captioned, monkeypatch, function, workers):
    """A fork that changes one of these functions sees the trace, and loses no samples."""

    def fails(*_, **options):
        raise KeyError

    monkeypatch.setattr(function, fails)
    pairs = Pairs(Samples([captioned]), TOKENIZER, 8, 1)

    with pytest.raises(KeyError) as raised:
        next(data.load_batches(pairs, 0, 1, workers))

    traceback.clear_frames(raised.tb)  # frees the loader, which ends its process


# ---- batches

LONG = "a dog sits on the red grass " * 6 + "a dog runs on the"  # 47 tokens


@pytest.fixture
def odd_pairs(tmp_path):
    """Return fourteen pairs, of which one is bad and another has a long caption."""
    odd = [{"jpg": JPEG, "txt": LONG.encode()}, {"jpg": b"bad", "txt": b"a"}]
    first = write_shard(tmp_path / "0.tar", odd)
    second = write_captions(tmp_path / "1.tar", *"abcdefghijkl")
    random = dict(seed=5, crop_area=0.9, num_patches=9, patch_dropout=0.5)
    return Pairs(Samples([first, second]), TOKENIZER, 24, 12, **random)


@pytest.mark.parametrize("workers, start", [(0, 0), (1, 2), (3, 0)])
def test_a_batch_is_the_collated_pairs_of_its_step(odd_pairs, monkeypatch, workers, start):
    """This holds for any number of workers, and for a run that begins at any step. Here the last
    of three processes loads the last 4 pairs of each batch of 12."""
    monkeypatch.setattr(processes, "WORLD", 3)
    monkeypatch.setattr(processes, "RANK", 2)

    loaded = [*data.load_batches(odd_pairs, start, 6, workers)]

    expected = []
    for step in range(start, 6):
        items = [odd_pairs[12 * step + row] for row in range(8, 12)]
        expected.append(odd_pairs.collate(items))
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_images_are_bytes_captions_are_cut_to_the_context_and_labels_are_not(odd_pairs):
    """A caption of 47 tokens is cut to 32, with start and end, but its label keeps all of them.
    Lengths are multiples of 16, so that few different lengths are compiled."""
    ids = TOKENIZER.encode(LONG)
    items = [odd_pairs[position] for position in range(12)]
    long_item = next(item for item in items if item[1] == ids)
    short_item = next(item for item in items if item[1] != ids)

    batch, _ = odd_pairs.collate([long_item, short_item])
    short, _ = odd_pairs.collate([short_item])

    assert batch["images"].shape == (2, 3, 24, 24)
    assert batch["images"].dtype == torch.uint8
    assert batch["tokens"][0].tolist() == [TOKENIZER.start, *ids[:30], TOKENIZER.end]
    assert batch["label_tokens"][0].tolist() == [TOKENIZER.start, *ids, TOKENIZER.end, *15 * [PAD]]
    assert short["tokens"].shape == (1, 16)
