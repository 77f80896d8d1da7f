"""Test the tokenizer. Its ids equal open_clip's for each text. With a vocabulary of words, each
known word is one token."""

import functools
import random

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from common.cli import InputError
from common.tokenizer import BYTES, Tokenizer, tiktoken_text, words_to_tiktoken

CLIP = Tokenizer.from_file("clip")
ORACLE = SimpleTokenizer()
ORACLE.clean_fn = functools.cache(ORACLE.clean_fn)  # it is slow, and most texts are cleaned twice

# ---- CLIP's vocabulary

PIECES = """a the photo of Dog cat's running GREEN bus-stop can't I'd we'll they've you're o'clock
'tis don''t McDonald's U.S.A. e-mail http://example.com/a?b=c&d=e user@mail.com #hashtag @name C++
3D mp3 4k 12,345.67 1/2 100% $9.99 10:30 2nd IMG_0001.JPG (right) [left] ... !? AT&T R&B naïve
façade Zürich smörgåsbord piñata Ærøskøbing Œuvre straße příliš žluťoučký Łódź İstanbul
ağaç őrült cafe\u0301 A\u030angstro\u0308m собака Ελλάς את بيت नमस्ते สวัสดี 가방 あん カタカナ 一龥
აჰ աֆ ሀፐ ᎠᏴ Việt 𝐀𝔷 𐐀𐑏 😀 ❤️ 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☕ ♻️ 1️⃣ ✨ 🧑🏿‍🚀 ™ → ★ ½ Ⅷ ² ① € £ …
“curly” ‘single’ it’s „low“ «guillemets» ‚x‛ 5′10″ `tick` ´acute Ｆｕｌｌ１２３！ ﾊﾝｶｸ ＡＢＣ ＇ －
ﬁne oﬃce ﬂy dog😀😀 it&#8217;s &ldquo;hi&rdquo; R&amp;amp;B cat&hellip; (犬dog) don&amp;#39;t
5&quot; &quot;CAF&Eacute;&quot; ☕café 10&nbsp;km &#x1F600; &frac12; &amp;eacute; #1犬
wow!!!❤️ …and (R&amp;D), Ｎo.１""".split()
SPACE = [" "] * 12 + ["\n", "\r\n", "\t", "  ", "\u00a0", "\u3000"]


def random_texts(n):
    """Return n texts of one to twelve pieces, with all kinds of white space between them."""
    rng = random.Random(0)
    texts = []
    for _ in range(n):
        text = ""
        for piece in rng.choices(PIECES, k=rng.randint(1, 12)):
            if "&" not in piece:  # there is no entity &NBSP;
                piece = rng.choice([str, str.upper, str.title])(piece)
            text += piece + rng.choice(SPACE)
        texts.append(text)
    return texts


def test_ids_equal_open_clips():
    for text in random_texts(2000):
        assert CLIP.encode(text) == ORACLE.encode(text), ascii(text)


def test_texts_are_padded_or_cut_as_by_open_clip():
    texts = ["a dog", "a cat, a dog and a bird"]

    assert torch.equal(CLIP(texts, 6), ORACLE(texts, 6))
    assert torch.equal(CLIP("a dog"), ORACLE("a dog"))  # one text is a batch of one


def test_a_decoded_text_has_a_space_after_each_word():
    assert CLIP.decode(CLIP(["A  Dog's\n CAFÉ 😀"])[0]) == "a dog 's café 😀"


def test_start_and_end_are_the_last_ids_and_can_be_written():
    assert (CLIP.start, CLIP.end, CLIP.vocab_size) == (49406, 49407, 49408)
    assert CLIP.encode("<START_OF_TEXT> <end_of_text>") == [49406, 49407]  # as in open_clip


# ---- a vocabulary of words

KNOWN = ["red", "café", "собака", "t-shirt", "women's", "犬", "!!", "3d", "カ", "in", "ed", "и"]
WORDS = Tokenizer(words_to_tiktoken(KNOWN))


def test_a_known_word_is_one_token():
    """Upper and lower case do not matter. In the vocabulary, bytes come first, without and with a
    space. Start and end come last."""
    ids = WORDS.encode("Women’s RED T-Shirt 犬カ犬 !!")

    assert ids == [512 + i for i in (4, 0, 3, 5, 8, 5, 6)]  # their places in KNOWN
    assert (WORDS.start, WORDS.end, WORDS.vocab_size) == (524, 525, 526)


# Some of these words end in a word that the vocabulary knows, or in some of its bytes.
@pytest.mark.parametrize("word", ["pumpkin", "bred", "собаки", "q", "é", "in-on", "👧"])
def test_an_unknown_word_is_spelled_in_bytes(word):
    ids = WORDS.encode(f"red {word} in")

    spelled = [BYTES.index(byte) for byte in word.encode()]
    spelled[-1] += 256  # the last byte has the space
    assert ids == [*WORDS.encode("red"), *spelled, *WORDS.encode("in")]
    assert WORDS.decode(ids) == f"red {word} in"


def test_blank_lines_of_a_vocabulary_mean_nothing():
    """An editor may have left some."""
    lines = WORDS.vocab.splitlines()

    tokenizer = Tokenizer("\n\n".join(lines) + "\n \n")

    assert tokenizer.ranks == WORDS.ranks
    assert tokenizer.has_whole_words


def test_a_file_without_the_single_bytes_is_refused(tmp_path):
    """Such a vocabulary could spell no other word. Other projects have files of this kind, too."""
    path = tmp_path / "v.tiktoken"
    path.write_text(tiktoken_text([b"dog ", b"cat "]))

    with pytest.raises(InputError, match="v.tiktoken"):
        Tokenizer.from_file(path)
