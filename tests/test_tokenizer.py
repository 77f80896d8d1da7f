"""The tokenizer against open_clip's, id for id, and vocabularies of whole words."""

import functools
import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
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
PIECES += [f"&{'amp;' * twice}{name};" for name in ENTITIES for twice in (False, True)]
SPACE = [" "] * 12 + ["\n", "\r\n", "\t", "  ", "\u00a0", "\u3000"]


def texts(n):
    """n texts of one to twelve pieces, glued with all kinds of white space."""
    rng = random.Random(0)
    yield from ["", " ", "\n\t", "\u3000"]
    for _ in range(n - 4):
        text = ""
        for piece in rng.choices(PIECES, k=rng.randint(1, 12)):
            change = rng.choice([str, str.upper, str.title])
            piece = piece if "&" in piece else change(piece)  # there is no entity &NBSP;
            text += piece * (50 if rng.random() < 0.003 else 1) + rng.choice(SPACE)
        yield text


def test_ids_equal_open_clips_and_can_be_decoded():
    for text in texts(4000):
        ids = CLIP.encode(text)
        assert ids == ORACLE.encode(text), ascii(text)
        decoded = CLIP.decode([CLIP.start, *ids, CLIP.end, PAD, PAD])  # up to white space and case
        assert "".join(decoded.split()) == "".join(ORACLE.clean_fn(text).split())
    assert CLIP.decode(CLIP(["A  Dog's\n ball."])[0]) == "a dog 's ball ."


# Characters that ftfy, inside open_clip, treats in a way of its own.
LEFT_OUT = [
    *range(0x80, 0xA0),  # C1 controls: it takes them for Windows-1252
    *(0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4)),  # ĳ, ǆ, ǉ, ǌ, ǳ: two letters
    *(0x149, 0xFB05),  # ŉ and ſt: it spells them with ' and ſ
    *range(0x206A, 0x2070),  # deprecated controls of direction and shape: it drops them
    *range(0xFFF9, 0xFFFD),  # marks of annotations and of attached objects: it drops them
]


def test_ids_equal_open_clips_on_every_token_and_every_character_but_those_left_out():
    tokens = (CLIP.encoding.decode_single_token_bytes(id) for id in range(CLIP.start))
    lines = [token.decode(errors="ignore") for token in tokens]  # some are parts of characters
    # Of the large blocks of ideographs and syllables one in fifty
    large = [*range(0x3400, 0xD7A4), *range(0xE000, 0xF900), *range(0x12000, 0x1D000)]
    codes = np.setdiff1d(range(0x1FB00), [c for c in large if c % 50] + LEFT_OUT)
    lines += [f"B{chr(code)}" for code in codes]
    for i in range(0, len(lines), 100):  # a hundred at a time, because ftfy is slow to start
        text = "\n".join(lines[i : i + 100])
        assert CLIP.encode(text) == ORACLE.encode(text), ascii(text)
    for text in ["cafÃ©", "\x1b[31mred\x1b[0m", "a &amp b", "\ud800", *map(chr, LEFT_OUT)]:
        tokens = CLIP.encode(f"a {text} dog")  # those left out cost odd tokens, but no error
        assert tokens[0] == 320 and tokens[-1] == 1929, ascii(text)


def test_padded_tokens_equal_open_clips_also_where_they_are_cut():
    some = list(texts(1000))
    assert torch.equal(CLIP(some), ORACLE(some)) and torch.equal(CLIP("one"), ORACLE(["one"]))
    assert torch.equal(CLIP(some, 16), ORACLE(some, 16))
    assert (CLIP(some, 16)[:, -1] == CLIP.end).sum() > 500  # many were cut
    assert (CLIP.start, CLIP.end, CLIP.vocab_size) == (49406, 49407, 49408)
    assert CLIP.encode("<START_OF_TEXT> <end_of_text>") == [49406, 49407]  # as in open_clip


def test_in_a_word_vocabulary_a_known_word_is_one_token_and_others_are_bytes():
    known = ["red", "circle", "café", "собака", "t-shirt", "women's", "犬", "!!", "3d", "ไ", "カ"]
    tokenizer = Tokenizer(words_to_tiktoken(known))
    assert (tokenizer.start, tokenizer.end, tokenizer.vocab_size) == (523, 524, 525)
    for i, word in enumerate(known):
        assert tokenizer.encode(word.upper()) == [512 + i]
    assert tokenizer(["Women’s red T-Shirts!!"], 12)[0, :3].tolist() == [523, 517, 512]
    assert tokenizer.encode("犬犬カไไ !!") == [518, 518, 522, 521, 521, 519]  # without spaces
    assert len(tokenizer.encode("blue")) == 4
    for text in ("blue", "a red t-shirt", "犬 и собака", "!?", "reddish", "👩‍👩‍👧", "हिन्दी"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
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


def test_the_shards_vocabulary_lies_beside_them_unless_another_is_given(tmp_path):
    shards = [str(tmp_path / "0.tar")]
    (tmp_path / "vocab.tiktoken").write_text(words_to_tiktoken(["red"]))
    (tmp_path / "other.tiktoken").write_text(words_to_tiktoken(["red", "blue"]))

    assert data.tokenizer_for(shards).vocab_size == 515
    assert data.tokenizer_for(shards, tmp_path / "other.tiktoken").vocab_size == 516
    assert data.tokenizer_for(shards, "clip").vocab_size == 49408


def test_captions_are_trimmed_to_the_last_end():
    tokens = CLIP(["a dog", "a photo of a dog"])

    assert torch.equal(data.trim(tokens), tokens[:, :7])


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


def test_clips_vocabulary_comes_from_open_clip_or_a_cache_or_the_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    response, requested = requests.Response(), []
    response.status_code, response._content = 200, Path(default_bpe()).read_bytes()
    monkeypatch.setattr(requests, "get", lambda url: requested.append(url) or response)
    monkeypatch.delitem(sys.modules, "open_clip")
    assert data.tokenizer_for([tmp_path / "0.tar"]).encode("a photo") == [320, 1125]
    assert Tokenizer.from_file("clip").encode("a photo") == [320, 1125]
    assert not requested and "open_clip" not in sys.modules  # it is read, not imported
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # it is not installed
    for _ in range(2):  # the first one fills the cache
        assert Tokenizer.from_file("clip").encode("a photo") == [320, 1125]
    assert len(requested) == 1
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    response.status_code = 404
    with pytest.raises(InputError, match="--vocab"):
        Tokenizer.from_file("clip")
