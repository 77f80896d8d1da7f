"""The tokenizer against open_clip's, id for id, and what a vocabulary file may be."""

import base64
import functools
import gzip
import importlib.util
import random
import sys
from pathlib import Path

import pytest
import requests
import torch
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from test_data import JPEG, write_tar

import data
from data import words_to_tiktoken
from scripts import vocab
from superclip import PAD, InputError

ORACLE = SimpleTokenizer()
ORACLE.clean_fn = functools.cache(ORACLE.clean_fn)  # slow, and called twice for most texts


@pytest.fixture(scope="module")
def clip():
    return data.Tokenizer.from_file(default_bpe())


# -----------------------------------------------------------------------------
# CLIP's own vocabulary

WORDS = """a the photo of Dog cat's running GREEN bus-stop can't I'd we'll they've you're o'clock
'tis don''t McDonald's U.S.A. e-mail http://example.com/a?b=c&d=e user@mail.com #hashtag @name C++
3D mp3 4k 12,345.67 1/2 100% $9.99 10:30 2nd IMG_0001.JPG (right) [left] ... !? AT&T R&B naïve
façade Zürich smörgåsbord piñata Ærøskøbing Œuvre straße příliš žluťoučký Łódź İstanbul
ağaç őrült cafe\u0301 A\u030angstro\u0308m""".split()
# First and last letter of Cyrillic, Greek, Hebrew, Arabic, Devanagari, Thai, Hangul, Kana, Han,
# Georgian, Armenian, Ethiopic, Cherokee, Vietnamese, mathematical Latin, Deseret.
SCRIPTS = "ая αω את بي कह กฮ 가힣 あん 一龥 აჰ աֆ ሀፐ ᎠᏴ Ạỹ 𝐀𝔷 𐐀𐑏".split()
EMOJI = "😀 ❤️ 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☕ ♻️ 1️⃣ ✨ 🧑🏿‍🚀 ™ → ★ ½ Ⅷ ² ① € £ …".split()
QUOTES = "“curly” ‘single’ it’s „low“ «guillemets» ‚x‛ 5′10″ `tick` ´acute".split()
WIDTH = "Ｆｕｌｌ１２３！ ﾊﾝｶｸ ＡＢＣ ＇ － ﬁne oﬃce ﬂy".split()
ENTITIES = "amp quot #39 #x27 nbsp eacute ldquo hellip #8217 #x1F600 copy frac12 Auml mdash".split()
ENTITIES = [f"&{'amp;' * twice}{name};" for name in ENTITIES for twice in (False, True)]
GLUED = """dog😀😀 it&#8217;s &ldquo;hi&rdquo; R&amp;amp;B cat&hellip; (犬dog) don&amp;#39;t 5&quot;
&quot;CAF&Eacute;&quot; ☕café 10&nbsp;km #1犬 wow!!!❤️ …and (R&amp;D), Ｎo.１""".split()
SPACE = [" "] * 12 + ["\n", "\r\n", "\t", "  ", "\u00a0", "\u3000"]


def texts(n, seed=0):
    """n texts of one to twelve pieces of every kind, glued with all kinds of white space."""
    rng = random.Random(seed)

    def letters():
        first, last = map(ord, rng.choice(SCRIPTS))
        word = "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 8)))
        return rng.choice([str, str.upper, str.title])(word)

    def word():
        return rng.choice([str, str, str.upper, str.title])(rng.choice(WORDS))

    kinds = [word, word, word, word, letters]
    kinds += [
        lambda ps=pieces: rng.choice(ps) for pieces in (EMOJI, QUOTES, WIDTH, ENTITIES, GLUED)
    ]
    yield from ["", " ", "\n\t", "\u3000"]
    for i in range(n - 4):
        pieces = [rng.choice(kinds)() for _ in range(rng.randint(1, 12))]
        pieces += [rng.choice(["a", "supercali", "?!", "9", "é", "犬"]) * 50] * (i % 50 == 0)
        yield "".join(piece + rng.choice(SPACE) for piece in pieces)


@pytest.fixture(scope="module")
def corpus():
    return list(texts(20_000))


@pytest.fixture(scope="module")
def corpus_ids(clip, corpus):
    return [clip.encode(text) for text in corpus]


def test_ids_equal_open_clips_on_20000_texts(corpus, corpus_ids):
    for text, ids in zip(corpus, corpus_ids):
        assert ids == ORACLE.encode(text), ascii(text)


def test_at_most_1_in_10000_captions_differs_from_open_clip(clip):
    """Captions that people wrote and that every machine has: the prompts of ImageNet's classes.

    (Of 34,847 distinct captions of Flickr8k none differs. Of 4,831 lines with letters beyond ASCII
    in the documentation of Linux and Python packages 12 do: examples of text in the wrong encoding,
    and ligatures of LEFT_OUT.)
    """
    prompts = [t(name) for name in IMAGENET_CLASSNAMES for t in OPENAI_IMAGENET_TEMPLATES[::8]]
    assert len(prompts) == 10_000
    assert sum(clip.encode(text) != ORACLE.encode(text) for text in prompts) <= 1


def test_ids_equal_open_clips_on_every_token_of_the_vocabulary(clip):
    """Also proves the ranks: a token's text, when it is one, comes back as that very token."""
    whole = 0
    for id in range(clip.start):
        try:
            text = clip.encoding.decode_single_token_bytes(id).decode()
        except UnicodeDecodeError:  # a part of a character
            continue
        ids = clip.encode(text)
        assert ids == ORACLE.encode(text), ascii(text)
        whole += ids == [id]
    assert whole > 34_000


# Characters that ftfy, inside open_clip, treats in a way of its own.
LEFT_OUT = [
    *range(0x80, 0xA0),  # C1 controls: it takes them for Windows-1252
    *(0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4)),  # ĳ, ǆ, ǉ, ǌ, ǳ: two letters
    *(0x149, 0xFB05),  # ŉ and ſt: it spells them with ' and ſ
    *range(0x206A, 0x2070),  # deprecated controls of direction and shape: it drops them
    *range(0xFFF9, 0xFFFD),  # marks of annotations and of attached objects: it drops them
]


def test_ids_equal_open_clips_on_every_character_but_those_left_out(clip):
    """One after another: a letter or not, its lower case, composed, full width, a ligature, ...
    Of the large blocks of ideographs and syllables one in fifty."""
    large = [range(0x3400, 0xD7A4), range(0xE000, 0xF900), range(0x12000, 0x1D000)]
    for code in range(0x1FB00):
        if code in LEFT_OUT or code % 50 and any(code in block for block in large):
            continue
        text = f"B{chr(code)}"
        assert clip.encode(text) == ORACLE.encode(text), hex(code)


def test_what_is_left_out_costs_odd_tokens_but_no_error(clip):
    for text in ["cafÃ©", "\x1b[31mred\x1b[0m", "a &amp b", "\ud800", *map(chr, LEFT_OUT)]:
        tokens = clip.encode(f"a {text} dog")
        assert tokens[0] == 320 and tokens[-1] == 1929, ascii(text)


def test_rows_equal_open_clips_also_where_they_are_cut(clip, corpus):
    some = corpus[:1000]
    assert torch.equal(clip(some), ORACLE(some))
    assert torch.equal(clip(some, 16), ORACLE(some, 16))
    assert torch.equal(clip("one text"), ORACLE(["one text"]))
    assert (clip(some, 16)[:, -1] == clip.end).sum() > 500  # many were cut


def test_decode_inverts_encode_up_to_case_and_white_space(clip, corpus, corpus_ids):
    def bare(text):
        return "".join(text.split())

    for text, ids in zip(corpus, corpus_ids):
        expected = bare(ORACLE.clean_fn(text))
        assert bare(clip.decode(ids)) == expected
        row = [clip.start, *ids, clip.end, PAD, PAD]
        assert bare(clip.decode(row)) == expected, "start, end or padding shows"
    assert clip.decode(clip(["A  Dog's\n ball."])[0]) == "a dog 's ball ."


def test_composed_and_decomposed_letters_are_the_same_token(clip):
    assert clip.encode("cafe\u0301") == clip.encode("caf\u00e9") == clip.encode("CAF&Eacute;")


def test_start_and_end_are_the_last_two_ids(clip):
    assert (clip.start, clip.end, clip.vocab_size) == (49406, 49407, 49408)
    # literal text becomes the special token, as in open_clip
    assert clip.encode("<START_OF_TEXT> <end_of_text>") == [clip.start, clip.end]
    words = data.Tokenizer(words_to_tiktoken(["dog"]))
    assert (words.start, words.end, words.vocab_size) == (513, 514, 515)
    assert words(["dog"], 5).tolist() == [[513, 512, 514, PAD, PAD]]


# -----------------------------------------------------------------------------
# Other vocabularies


def test_in_a_word_vocabulary_a_known_word_is_one_token_and_others_are_bytes():
    known = ["red", "circle", "café", "собака", "ed", "!!"]
    tokenizer = data.Tokenizer(words_to_tiktoken(known))
    assert tokenizer.vocab_size == 512 + len(known) + 2
    for i, word in enumerate(known):
        assert tokenizer.encode(word.upper()) == [512 + i]
    assert tokenizer.encode("red circle !!") == [512, 513, 517]
    assert len(tokenizer.encode("blue")) == 4
    assert len(tokenizer.encode("犬")) == 3
    for text in ("blue", "a red dog", "犬 и собака", "!?", "!", "reddish", "👩‍👩‍👧"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    again = data.Tokenizer(tokenizer.vocab)  # the text travels in checkpoints
    assert again.encode("a red dog") == tokenizer.encode("a red dog")


def vocabulary_lines(tokens):
    return "".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)).encode()


WRONG = {
    "a JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(range(256)),
    "empty": b"",
    "JSON": b'{"a": 1,\n "b": 2}\n',
    "prose": b"a dog\non a sofa\n" * 300,
    "a hole in the ranks": words_to_tiktoken(["a"]).replace(" 300\n", " 600\n").encode(),
    "a rank twice": words_to_tiktoken(["a"]).replace(" 300\n", " 301\n").encode(),
    "no single bytes": vocabulary_lines([f"word{i} ".encode() for i in range(600)]),
    "a cut gzip": Path(default_bpe()).read_bytes()[:5000],
    "a damaged gzip": gzip.compress(b"x" * 999)[:12] + b"\xff" * 40,
    "a gzip of something else": gzip.compress(b"a b c"),
    "cut merges": gzip.compress(b'"bpe_simple_vocab_16e6.txt#version: 0.2\ni n\nt h\n'),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_no_vocabulary_is_an_input_error_that_names_it(kind, tmp_path):
    path = tmp_path / "some.vocab"
    path.write_bytes(WRONG[kind])
    with pytest.raises(InputError, match="some.vocab"):
        data.Tokenizer.from_file(path)


def test_a_path_without_a_file_is_an_input_error(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match="there is no vocabulary file"):
            data.Tokenizer.from_file(path)


def test_the_vocabulary_beside_the_shards_is_found(tmp_path):
    mine, shards = tmp_path / "mine.tiktoken", [str(tmp_path / "a" / "0.tar")]
    mine.write_text(words_to_tiktoken(["x", "yy", "zz"]))
    assert data.Tokenizer.from_file(mine, 9)(["yy"]).shape == (1, 9)
    assert (
        data.Tokenizer.from_file(data.vocabulary_beside(shards)).vocab_size == 49408
    )  # nothing beside: clip
    beside = tmp_path / "a" / "vocab.tiktoken"
    beside.parent.mkdir()
    beside.write_text(words_to_tiktoken(["yy"]))
    assert data.Tokenizer.from_file(data.vocabulary_beside(shards)).vocab_size == 515
    assert data.Tokenizer.from_file("clip").vocab_size == 49408  # when asked for


def test_from_file_reads_open_clips_copy_without_importing_open_clip(monkeypatch):
    monkeypatch.delitem(sys.modules, "open_clip")
    monkeypatch.setattr(requests, "get", lambda url: pytest.fail("asked the network"))
    assert data.Tokenizer.from_file("clip").encode("a photo") == [320, 1125]
    assert "open_clip" not in sys.modules


def hide_open_clip(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find_spec(name) if name != "open_clip" else None
    )


def test_without_any_copy_the_error_says_what_to_get(monkeypatch, tmp_path):
    def offline(url):
        raise ConnectionError

    hide_open_clip(monkeypatch)
    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(
        InputError, match="cannot download .*bpe_simple_vocab_16e6.txt.gz.* --vocab"
    ):
        data.Tokenizer.from_file("clip")


def test_with_the_file_in_tiktokens_cache_nothing_is_downloaded(monkeypatch, tmp_path):
    hide_open_clip(monkeypatch)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    response = requests.Response()
    response.status_code, response._content = 200, Path(default_bpe()).read_bytes()
    monkeypatch.setattr(requests, "get", lambda url: response)
    data.Tokenizer.from_file("clip")  # the download, which fills the cache
    monkeypatch.setattr(requests, "get", lambda url: pytest.fail("asked the network"))
    assert data.Tokenizer.from_file("clip").encode("a photo") == [320, 1125]


# -----------------------------------------------------------------------------
# A vocabulary of the shards' own words


def test_vocab_takes_the_most_frequent_words(tmp_path, capsys):
    captions = ["A red dog", "a Red dog!!", "the dog's red ball", "a dog"]
    members = [(f"{i}.txt", text.encode()) for i, text in enumerate(captions)]
    members += [("9.txt", b"\xff"), ("9.jpg", JPEG), *((f"{i}.jpg", JPEG) for i in range(4))]
    path = write_tar(tmp_path / "0.tar", members)
    out = tmp_path / "vocab.tiktoken"
    vocab.main([path, "--size", "517", "--out", str(out)])
    assert "517 entries" in capsys.readouterr().out
    tokenizer = data.Tokenizer.from_file(data.vocabulary_beside([path]))
    assert tokenizer.vocab_size == 517
    assert [tokenizer.decode([i]) for i in (512, 513)] == ["dog", "red"]
    assert tokenizer.encode("a Red dog")[1:] == [513, 512]
    vocab.main([path, "--out", str(out)])  # no more words than there are
    assert data.Tokenizer.from_file(out).vocab_size == 514 + len(
        ["dog", "red", "!!", "the", "'s", "ball"]
    )


def test_vocab_says_what_is_wrong(tmp_path, capsys):
    path = write_tar(tmp_path / "0.tar", [("0.jpg", JPEG)])
    with pytest.raises(InputError, match="no words in txt"):
        vocab.main([path, "--out", str(tmp_path / "v.tiktoken")])
    with pytest.raises(InputError, match="must end in .tiktoken"):
        vocab.main([path, "--out", path])
    with pytest.raises(SystemExit):  # no room for a single word
        vocab.main([path, "--size", "514"])
    assert "514 is not between 515" in capsys.readouterr().err
