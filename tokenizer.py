"""Text -> token ids, with CLIP's vocabulary or with one of whole words, and back.

    caption --> clean --> words --> token ids

A vocabulary is a file: CLIP's own of byte pairs, or a .tiktoken file of tokens and their ranks,
such as scripts.vocab makes of the words of your captions. tiktoken does the work. The last section
tells which words a vocabulary lacks.
"""

import base64
import gzip
import html
import importlib.util
import unicodedata
from itertools import takewhile
from pathlib import Path

import regex
import tiktoken.load
import torch

from cli import InputError, check
from superclip import PAD

# -----------------------------------------------------------------------------
# Vocabularies

# CLIP's order of the 256 bytes: printable ones first. Their ids are 0-255, and 256-511 are the same
# bytes at the end of a word.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]
BYTE_TOKENS = [bytes([b]) for b in BYTES] + [bytes([b]) + b" " for b in BYTES]

CLIP_VOCAB_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
CLIP_VOCAB_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def tiktoken_text(tokens):
    """list of tokens as bytes -> the text of a .tiktoken file: base64 and rank on each line."""
    return "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))


def words_to_tiktoken(words):
    """list of words -> the text of a .tiktoken file: all bytes, then each word as one token."""
    words = [word.encode() + b" " for word in words]
    return tiktoken_text(dict.fromkeys(BYTE_TOKENS + words))


def merges_to_tiktoken(text):
    """CLIP's file of BPE merges -> the text of a .tiktoken file of the same vocabulary."""
    # The file writes a printable byte as itself, each other one as a character of its own from 256
    # on, and the end of a word as </w>.
    others = range(256, 256 + len(BYTES) - len(PRINTABLE))
    characters = map(chr, [*PRINTABLE, *others])
    byte_of = dict(zip(characters, BYTES)) | {" ": 32}
    lines = text.replace(" ", "").replace("</w>", " ").split("\n")
    merges = lines[1:48895]  # as many as fill up CLIP's vocabulary: 49,408 - 512 - 2
    return tiktoken_text(BYTE_TOKENS + [bytes(map(byte_of.get, merge)) for merge in merges])


def clip_vocabulary():
    """Returns the text of a .tiktoken file of CLIP's vocabulary: from an installed open_clip_torch,
    from tiktoken's cache, or by download. Raises InputError."""
    spec = importlib.util.find_spec("open_clip")  # finds the package without importing it
    try:
        if spec and spec.origin:
            content = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
        else:
            content = tiktoken.load.read_file_cached(CLIP_VOCAB_URL, CLIP_VOCAB_SHA256)
        return merges_to_tiktoken(gzip.decompress(content).decode())
    except Exception as error:  # whatever the disk and the network raise
        reason = "CLIP's vocabulary can neither be read nor downloaded"
        raise InputError(f"{reason}: install open_clip_torch, or give --vocab") from error


def read_ranks(vocab):
    """The text of a .tiktoken file -> dict of token (bytes) -> rank. Raises InputError."""
    lines = [line.split() for line in vocab.splitlines() if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    # tiktoken checks neither.
    check(sorted(ranks.values()) == [*range(len(ranks))], "tokens do not have ranks from 0 up")
    check(ranks.keys() >= {*BYTE_TOKENS[:256]}, "tokens do not include each single byte")
    return ranks


# -----------------------------------------------------------------------------
# Captions -> words

START, END = "<start_of_text>", "<end_of_text>"  # the last two ids of every vocabulary
# CLIP splits a caption into English suffixes, letters, single digits, and runs of anything else.
OTHER = r"[^\s\p{L}\p{N}]+"
CLIP_WORD = regex.compile(rf"(?i){START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|{OTHER}")
# In a vocabulary of whole words, a word is letters and digits with inner hyphens and apostrophes,
# as in "t-shirt" and "women's". Scripts without spaces have one word per character.
ALONE = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]"
PART = rf"(?:(?!{ALONE})[\p{{L}}\p{{M}}\p{{N}}])+"
WORD = regex.compile(rf"{ALONE}\p{{M}}*|{PART}(?:[-']{PART})*|{OTHER}")
QUOTES = str.maketrans("‘’‚‛ʼ“”„‟", "'''''\"\"\"\"")
CONTROL = regex.compile("[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
# Letters of full and half width, and ligatures
WIDE = "[\u0132\u0133\u01c4-\u01cc\u01f1-\u01f3\u3000\ufb00-\ufb04\ufb06\uff01-\uffef]+"


def clean(text):
    """Returns a caption as CLIP's tokenizer sees it: HTML entities decoded, quotes straightened,
    letters composed (NFC), of normal width and in lower case.

    This is what open_clip's cleaning does to the captions people write. The library ftfy, which
    open_clip uses, also repairs text that was decoded with the wrong encoding ("cafÃ©"). We leave
    that out, because such a caption costs only a few odd tokens.
    """
    text = html.unescape(html.unescape(text))  # captions off the web are often escaped twice
    if not text.isascii():
        text = text.translate(QUOTES)
        text = regex.sub(WIDE, lambda wide: unicodedata.normalize("NFKC", wide[0]), text)
        text = unicodedata.normalize("NFC", text)
    return CONTROL.sub("", text).lower()


# -----------------------------------------------------------------------------
# Words -> ids


class Tokenizer:
    """Byte-pair encoding on tiktoken. With CLIP's vocabulary its ids are open_clip's.

    The trick is to write CLIP's end-of-word mark as a trailing space byte. Then CLIP's ids are
    tiktoken's ranks, and a word that the vocabulary has as a whole becomes one token. A vocabulary
    of whole words is one in which every token of several bytes ends in that space, and every byte
    has a token with it. It spells an unknown word in bytes.
    """

    def __init__(self, vocab, context_length=77):
        """vocab: the text of a .tiktoken file; context_length: tokens of a caption in __call__."""
        self.vocab = vocab
        self.context_length = context_length
        self.ranks = read_ranks(vocab)
        self.start = len(self.ranks)
        self.end = self.start + 1
        self.vocab_size = self.start + 2
        self.encoding = tiktoken.Encoding(
            "superclip",
            pat_str="[^ ]+ ",
            mergeable_ranks=self.ranks,
            special_tokens={START: self.start, END: self.end},
        )
        parts = [token for token in self.ranks if len(token) > 1 and not token.endswith(b" ")]
        has_all_bytes = self.ranks.keys() >= {*BYTE_TOKENS}
        self.has_whole_words = has_all_bytes and not parts

    @classmethod
    def from_file(cls, path, context_length=77):
        """path: a .tiktoken file, CLIP's bpe_simple_vocab_16e6.txt.gz, or "clip" to find the latter
        (clip_vocabulary). Raises InputError."""
        if path == "clip":
            return cls(clip_vocabulary(), context_length)
        content = Path(path).read_bytes()
        try:
            if content.startswith(b"\x1f\x8b"):
                content = gzip.decompress(content)
            text = content.decode()
            if text.startswith('"bpe_simple_vocab'):
                text = merges_to_tiktoken(text)
            return cls(text, context_length)
        except Exception as error:  # gzip, zlib, UTF-8, merges and base64 have errors of their own
            raise InputError(f"{path} is neither a .tiktoken file nor CLIP's: {error}") from error

    def encode(self, text):
        """str -> list of ids of any length, without start and end."""
        if not self.has_whole_words:
            words = CLIP_WORD.findall(clean(text))
            return self.encoding.encode(" ".join(words) + " ", allowed_special={START, END})
        # tiktoken would merge an unknown word where it ends in a known one: "pumpkin" would have
        # the token of "in", and the head would learn to see "in". Here it is spelled in bytes.
        ids = []
        for word in WORD.findall(clean(text)):
            token = word.encode() + b" "
            if token in self.ranks:
                ids.append(self.ranks[token])
            else:
                ids += [self.ranks[bytes([byte])] for byte in token[:-2]]
                ids.append(self.ranks[token[-2:]])  # the last byte has the space
        return ids

    def decode(self, ids):
        """ids -> str in lower case with a space after each word, without start, end and padding."""
        ids = takewhile(lambda i: i != self.end, map(int, ids))  # padding follows the end
        return self.encoding.decode([i for i in ids if i != self.start]).strip()

    def __call__(self, texts, context_length=None):
        """list of B strings -> LongTensor (B, context_length): start, tokens, end, padding. A text
        that is too long is cut, and still ends with the end token."""
        if isinstance(texts, str):
            texts = [texts]
        return self.pad(map(self.encode, texts), context_length or self.context_length)

    def pad(self, captions, length):
        """B lists of ids -> LongTensor (B, length): start, ids, end, padding."""
        rows = [[self.start, *ids[: length - 2], self.end] for ids in captions]
        rows = [row + [PAD] * (length - len(row)) for row in rows]
        return torch.tensor(rows)


def tokenizer_for(shards, vocab=None):
    """Returns the tokenizer of --vocab, a file or "clip", and prints which it is. By default it is
    vocab.tiktoken beside the shards if that is there, else CLIP's."""
    default = Path(shards[0]).with_name("vocab.tiktoken")
    if vocab is None:
        vocab = default if default.is_file() else "clip"
    tokenizer = Tokenizer.from_file(vocab)
    print(f"vocabulary: {vocab}, {tokenizer.vocab_size:,} entries")
    return tokenizer


def trim(tokens):
    """(B, T) -> the columns up to the last end token, which has the largest id. Tokens that follow
    it change nothing, because attention is causal."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1]


# -----------------------------------------------------------------------------
# Which words does a vocabulary have?


def token_text(tokenizer, i):
    """Returns a token as a word. One that does not end a word is written "skate-"."""
    text = tokenizer.decode([i])
    ends_a_word = tokenizer.encoding.decode_single_token_bytes(i).endswith(b" ")
    return text if ends_a_word else text + "-"


def has_letters(word):
    """Does it have a letter or a digit?"""
    return any(character.isalnum() for character in word)


def unknown_words(tokenizer, texts):
    """Returns the words of some texts that are not in the vocabulary, so that it spells them in
    bytes. CLIP's vocabulary has parts for any word, so there are none."""
    if not tokenizer.has_whole_words:
        return []
    words = dict.fromkeys(WORD.findall(clean("\n".join(texts))))
    return [word for word in words if has_letters(word) and len(tokenizer.encode(word)) > 1]


def usable_templates(tokenizer, templates):
    """Returns the list of templates whose words are all in the vocabulary, because a word spelled
    in bytes would be most of what the text tower sees of a prompt. (A word of the vocabulary is one
    token, whether training has shown it or not.) If none is left, "{}" is the only one: the name
    alone."""
    usable = [template for template in templates if not unknown_words(tokenizer, [template])]
    return usable or ["{}"]
