"""The tokenizer: its ids are open_clip's, text for text, and with a vocabulary of words every word
is one token."""

import functools
import importlib.util
import random
import sys
import unicodedata
from pathlib import Path

import pytest
import requests
import torch
from open_clip.tokenizer import SimpleTokenizer, default_bpe

import data
from cli import InputError
from data import Tokenizer, words_to_tiktoken
from superclip import PAD

CLIP = Tokenizer.from_file(default_bpe())
ORACLE = SimpleTokenizer()
ORACLE.clean_fn = functools.cache(ORACLE.clean_fn)  # slow, and called twice for most texts

# ---- CLIP's vocabulary

PIECES = """a the photo of Dog cat's running GREEN bus-stop can't I'd we'll they've you're o'clock
'tis don''t McDonald's U.S.A. e-mail http://example.com/a?b=c&d=e user@mail.com #hashtag @name C++
3D mp3 4k 12,345.67 1/2 100% $9.99 10:30 2nd IMG_0001.JPG (right) [left] ... !? AT&T R&B naïve
façade Zürich smörgåsbord piñata Ærøskøbing Œuvre straße příliš žluťoučký Łódź İstanbul
ağaç őrült cafe\u0301 A\u030angstro\u0308m собака Ελλάς את بيت नमस्ते สวัสดี 가방 あん カタカナ 一龥
აჰ աֆ ሀፐ ᎠᏴ Việt 𝐀𝔷 𐐀𐑏 😀 ❤️ 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☕ ♻️ 1️⃣ ✨ 🧑🏿‍🚀 ™ → ★ ½ Ⅷ ² ① € £ …
“curly” ‘single’ it’s „low“ «guillemets» ‚x‛ 5′10″ `tick` ´acute Ｆｕｌｌ１２３！ ﾊﾝｶｸ ＡＢＣ ＇ －
ﬁne oﬃce ﬂy dog😀😀 it&#8217;s &ldquo;hi&rdquo; R&amp;amp;B cat&hellip; (犬dog) don&amp;#39;t
5&quot; &quot;CAF&Eacute;&quot; ☕café 10&nbsp;km #1犬 wow!!!❤️ …and (R&amp;D), Ｎo.１""".split()
ENTITIES = "amp quot #39 #x27 nbsp eacute ldquo hellip #8217 #x1F600 copy frac12 Auml mdash".split()
PIECES += [f"&{name};" for name in ENTITIES]
PIECES += [f"&amp;{name};" for name in ENTITIES]  # escaped twice
SPACE = [" "] * 12 + ["\n", "\r\n", "\t", "  ", "\u00a0", "\u3000"]


def random_texts(n):
    """n texts of one to twelve pieces, glued with all kinds of white space."""
    rng = random.Random(0)
    texts = ["", " ", "\n\t", "\u3000"]
    while len(texts) < n:
        text = ""
        for piece in rng.choices(PIECES, k=rng.randint(1, 12)):
            if "&" not in piece:  # there is no entity &NBSP;
                piece = rng.choice([str, str.upper, str.title])(piece)
            if rng.random() < 0.003:
                piece *= 50
            text += piece + rng.choice(SPACE)
        texts.append(text)
    return texts


def test_ids_equal_open_clips():
    for text in random_texts(4000):
        assert CLIP.encode(text) == ORACLE.encode(text), ascii(text)


def test_ids_can_be_decoded():
    """Up to white space and case."""
    for text in random_texts(1000):
        ids = [CLIP.start, *CLIP.encode(text), CLIP.end, PAD, PAD]

        decoded = CLIP.decode(ids)

        assert "".join(decoded.split()) == "".join(ORACLE.clean_fn(text).split()), ascii(text)


def test_a_decoded_text_has_a_space_after_each_word():
    assert CLIP.decode(CLIP(["A  Dog's\n ball."])[0]) == "a dog 's ball ."


def assert_equal_ids(lines):
    """A hundred lines at a time, because open_clip's cleaning is slow to start."""
    for i in range(0, len(lines), 100):
        text = "\n".join(lines[i : i + 100])
        assert CLIP.encode(text) == ORACLE.encode(text), ascii(text)


def test_ids_equal_open_clips_on_every_token():
    """Some are parts of characters, of which nothing is left."""
    tokens = [CLIP.encoding.decode_single_token_bytes(i) for i in range(CLIP.start)]

    assert_equal_ids([token.decode(errors="ignore") for token in tokens])


# Characters that ftfy, inside open_clip, treats in a way of its own.
LEFT_OUT = [
    *range(0x80, 0xA0),  # C1 controls: it takes them for Windows-1252
    *(0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4)),  # ĳ, ǆ, ǉ, ǌ, ǳ: two letters
    *(0x149, 0xFB05),  # ŉ and ſt: it spells them with ' and ſ
    *range(0x206A, 0x2070),  # deprecated controls of direction and shape: it drops them
    *range(0xFFF9, 0xFFFD),  # marks of annotations and of attached objects: it drops them
]
EMOJI = range(0x1F300, 0x1F5FB)
LARGE_BLOCKS = [*range(0x3400, 0x4DB6), *range(0x4E00, 0x9FA6), *range(0xAC00, 0xD7A4)]


def characters():
    """The characters of Unicode 3.2, whose table is the same in every version of Python, and emoji.
    Of the large blocks of ideographs and syllables, one in fifty."""
    codes = {code for code in range(0x1D800) if is_assigned(code)} | {*EMOJI}
    codes -= {code for code in LARGE_BLOCKS if code % 50 > 0}
    return sorted(codes - {*LEFT_OUT})


def is_assigned(code):
    """Was it a character in Unicode 3.2? Private and surrogate codes are none."""
    return unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Co", "Cs")


def test_ids_equal_open_clips_on_every_character_but_those_left_out():
    assert_equal_ids([f"B{chr(code)}" for code in characters()])


@pytest.mark.parametrize("text", ["cafÃ©", "\x1b[31mred\x1b[0m", "a &amp b", "\ud800"], ids=ascii)
def test_an_odd_text_costs_odd_tokens_but_no_error(text):
    """Nor do the words beside it change."""
    ids = CLIP.encode(f"a {text} dog")

    assert ids[0] == CLIP.encode("a")[0]
    assert ids[-1] == CLIP.encode("dog")[0]


def test_characters_left_out_cost_odd_tokens_but_no_error():
    for code in LEFT_OUT:
        ids = CLIP.encode(f"a {chr(code)} dog")

        assert [ids[0], ids[-1]] == CLIP.encode("a dog"), hex(code)


@pytest.mark.parametrize("context_length", [None, 16], ids=["CLIP's context", "cut to 16"])
def test_padded_tokens_equal_open_clips(context_length):
    texts = random_texts(1000)

    tokens = CLIP(texts, context_length)

    assert torch.equal(tokens, ORACLE(texts, context_length))
    assert (tokens[:, -1] == CLIP.end).sum() > (500 if context_length == 16 else 0)  # were cut


def test_one_text_is_a_batch_of_one():
    assert torch.equal(CLIP("one"), ORACLE(["one"]))


def test_start_and_end_are_the_last_ids_and_can_be_written():
    assert (CLIP.start, CLIP.end, CLIP.vocab_size) == (49406, 49407, 49408)
    assert CLIP.encode("<START_OF_TEXT> <end_of_text>") == [49406, 49407]  # as in open_clip


def test_captions_are_trimmed_to_the_last_end():
    tokens = CLIP(["a dog", "a photo of a dog"])

    assert torch.equal(data.trim(tokens), tokens[:, :7])


# ---- a vocabulary of words

KNOWN = ["red", "circle", "café", "собака", "t-shirt", "women's", "犬", "!!", "3d", "ไ", "カ"]
WORDS = Tokenizer(words_to_tiktoken(KNOWN))


@pytest.mark.parametrize("word", KNOWN)
def test_a_known_word_is_one_token(word):
    """Whatever its case. Bytes come first, alone and with a space."""
    assert WORDS.encode(word.upper()) == [512 + KNOWN.index(word)]


def test_start_and_end_follow_the_words():
    assert (WORDS.start, WORDS.end, WORDS.vocab_size) == (523, 524, 525)


@pytest.mark.parametrize(
    "text, words",
    [
        ("Women’s red T-Shirts!!", ["women's", "red"]),
        ("犬犬カไไ !!", ["犬", "犬", "カ", "ไ", "ไ", "!!"]),  # scripts without spaces
    ],
)
def test_a_text_begins_with_the_tokens_of_its_words(text, words):
    ids = [512 + KNOWN.index(word) for word in words]

    assert WORDS.encode(text)[: len(ids)] == ids


@pytest.mark.parametrize(
    "text",
    ["blue", "a red t-shirt", "犬 и собака", "!?", "reddish", "👩‍👩‍👧", "हिन्दी"],
    ids=ascii,
)
def test_any_text_can_be_decoded(text):
    assert WORDS.decode(WORDS.encode(text)) == text


def test_words_have_inner_hyphens_and_apostrophes():
    words = data.WORD.findall(data.clean("Rock-'n'-roll, x--y -z- can''t 12,5"))

    assert words == "rock -' n '- roll , x -- y - z - can '' t 12 , 5".split()


# Words that end in a word which the vocabulary knows, or in its bytes
@pytest.mark.parametrize("word", ["pumpkin", "bred", "lion", "nedà", "собаки", "q", "é", "in-on"])
def test_an_unknown_word_is_spelled_in_bytes(word):
    tokenizer = Tokenizer(words_to_tiktoken(["in", "on", "red", "ed", "à", "и"]))

    ids = tokenizer.encode(f"red {word} in")

    spelled = [data.BYTES.index(byte) for byte in word.encode()]
    spelled[-1] += 256  # the last byte has the space
    assert ids == [tokenizer.encode("red")[0], *spelled, tokenizer.encode("in")[0]]
    assert tokenizer.decode(ids) == f"red {word} in"


# ---- where the vocabulary comes from


def test_the_shards_vocabulary_lies_beside_them_unless_another_is_given(tmp_path):
    shards = [str(tmp_path / "0.tar")]
    (tmp_path / "vocab.tiktoken").write_text(words_to_tiktoken(["red"]))
    (tmp_path / "other.tiktoken").write_text(words_to_tiktoken(["red", "blue"]))

    assert data.tokenizer_for(shards).vocab_size == 515
    assert data.tokenizer_for(shards, tmp_path / "other.tiktoken").vocab_size == 516
    assert data.tokenizer_for(shards, "clip").vocab_size == 49408


def test_without_one_beside_the_shards_it_is_clips(tmp_path):
    assert data.tokenizer_for([tmp_path / "0.tar"]).encode("a photo") == [320, 1125]


VOCABULARIES = {
    "no base64": "red 0",
    "no rank": "cmVk",
    "a gap in the ranks": words_to_tiktoken(["red"]) + "cmVkIHJlZA== 514\n",
    "bytes are missing": "cmVkIA== 0\n",
}


@pytest.mark.parametrize("text", VOCABULARIES.values(), ids=VOCABULARIES)
def test_a_vocabulary_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "x.tiktoken"
    path.write_text(text)

    with pytest.raises(InputError, match="x.tiktoken"):
        Tokenizer.from_file(path)


@pytest.fixture
def network(monkeypatch, tmp_path):
    """A network in which CLIP's vocabulary is all there is: what was requested, and the response,
    which a test may change. tiktoken's cache is empty."""
    response = requests.Response()
    response.status_code = 200
    response._content = Path(default_bpe()).read_bytes()
    requested = []
    monkeypatch.setattr(requests, "get", lambda url: requested.append(url) or response)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return requested, response


@pytest.fixture
def without_open_clip(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_clips_vocabulary_is_that_of_an_installed_open_clip(monkeypatch, network):
    """It is read, not imported, which would take seconds."""
    requested, _ = network
    monkeypatch.delitem(sys.modules, "open_clip")

    assert Tokenizer.from_file("clip").encode("a photo") == [320, 1125]

    assert requested == []
    assert "open_clip" not in sys.modules


def test_without_open_clip_it_is_downloaded_once(network, without_open_clip):
    requested, _ = network

    for _ in range(2):
        assert Tokenizer.from_file("clip").encode("a photo") == [320, 1125]

    assert len(requested) == 1


def test_without_a_network_another_vocabulary_is_asked_for(network, without_open_clip):
    _, response = network
    response.status_code = 404

    with pytest.raises(InputError, match="--vocab"):
        Tokenizer.from_file("clip")
