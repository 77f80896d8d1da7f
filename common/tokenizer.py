"""Turn text into token ids, with CLIP's vocabulary or with one of whole words, and back.

scripts.vocab makes a vocabulary of whole words, which is a .tiktoken file, from your captions.
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

from common.cli import InputError
from superclip import PAD, SuperCLIPConfig

# -----------------------------------------------------------------------------
# Texts <-> ids


class Tokenizer:
    """Encode texts as ids by byte-pair encoding, and decode them. vocab: the text of a .tiktoken
    file; context_length: the number of tokens to which __call__ pads or cuts a text. CLIP's mark at
    the end of a word is a space byte here, so that CLIP's ids are tiktoken's ranks."""

    def __init__(self, vocab, context_length=SuperCLIPConfig.context_length):
        self.vocab = vocab
        self.context_length = context_length
        lines = [line for line in vocab.splitlines() if line.strip()]
        tokens = [base64.b64decode(line.partition(" ")[0]) for line in lines]
        if tokens[:512] != BYTE_TOKENS:
            raise ValueError("the vocabulary does not begin with the single bytes")
        self.ranks = {token: rank for rank, token in enumerate(tokens)}
        self.start = len(tokens)
        self.end = self.start + 1
        self.vocab_size = self.start + 2
        self.encoding = tiktoken.Encoding(
            "superclip",
            pat_str="[^ ]+ ",  # a word, with the space behind it
            mergeable_ranks=self.ranks,
            special_tokens={"<start_of_text>": self.start, "<end_of_text>": self.end},
        )
        # CLIP's vocabulary also has parts of words, from which tiktoken puts all words together.
        self.has_whole_words = all(token.endswith(b" ") for token in tokens[512:])
        self.word_pattern = WORD if self.has_whole_words else CLIP_WORD

    @classmethod
    def from_file(cls, path):
        """Return the tokenizer of a .tiktoken file, or for "clip" that of CLIP's vocabulary."""
        if path == "clip":
            return cls(clip_vocabulary())
        try:
            return cls(Path(path).read_text("utf-8"))
        except ValueError as error:  # UnicodeDecodeError and base64's errors are among them
            raise InputError(f"{path} is no vocabulary. Make one by scripts.vocab.") from error

    def encode(self, text):
        """Return the ids of a text as a list of any length, without start and end."""
        ids = []
        for word in self.word_pattern.findall(clean(text)):
            if self.lacks(word):
                # Spell it in bytes. If it ended in a known word, tiktoken would use the token of
                # that word: "pumpkin" would contain "in", and the head would learn to see "in".
                ids += [BYTES.index(byte) for byte in word.encode()]
                ids[-1] += 256  # the last byte, with the space
            else:
                ids += self.encoding.encode(word + " ", allowed_special="all")
        return ids

    def lacks(self, word):
        """Return whether a vocabulary of whole words lacks a word. CLIP's lacks none."""
        return self.has_whole_words and word.encode() + b" " not in self.ranks

    def unknown_words(self, texts):
        """Return a sorted list of the words in texts that the vocabulary lacks."""
        words = {word for text in texts for word in self.word_pattern.findall(clean(text))}
        return sorted(word for word in words if self.lacks(word) and has_letters(word))

    def decode(self, ids):
        """Return the text of these ids, without start, end and padding."""
        ids = takewhile(lambda i: i != self.end, map(int, ids))  # padding follows the end
        return self.encoding.decode([i for i in ids if i != self.start]).strip()

    def __call__(self, texts, context_length=None):
        """Return B texts as a LongTensor (B, context_length). One string is a batch of one."""
        if isinstance(texts, str):
            texts = [texts]
        return self.pad(map(self.encode, texts), context_length or self.context_length)

    def pad(self, captions, length):
        """Return B lists of ids as a LongTensor (B, length). Lists that are too long are cut."""
        rows = [[self.start, *ids[: length - 2], self.end] for ids in captions]
        rows = [row + [PAD] * (length - len(row)) for row in rows]
        return torch.tensor(rows)


def trim(tokens):
    """Return tokens (B, T) without the columns after the last end token. Its id is the largest."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1]


def has_letters(word):
    return any(character.isalnum() for character in word)


# -----------------------------------------------------------------------------
# Captions -> words

# CLIP splits a caption into endings such as 's, runs of letters, single digits, and other runs.
OTHER = r"[^\s\p{L}\p{N}]+"
ENDING = "'s|'t|'re|'ve|'m|'ll|'d"
CLIP_WORD = regex.compile(rf"(?i)<start_of_text>|<end_of_text>|{ENDING}|\p{{L}}+|\p{{N}}|{OTHER}")
# With a vocabulary of whole words, a word consists of letters and digits, with hyphens and
# apostrophes between them, as in "women's". In scripts without spaces each character is a word.
ALONE = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]"
PART = rf"(?:(?!{ALONE})[\p{{L}}\p{{M}}\p{{N}}])+"
WORD = regex.compile(rf"{ALONE}\p{{M}}*|{PART}(?:[-']{PART})*|{OTHER}")
QUOTES = str.maketrans("‘’‚‛ʼ“”„‟", "'''''\"\"\"\"")
CONTROL = regex.compile("[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
# WIDE finds ligatures, and letters of full and half width.
WIDE = "[\u0132\u0133\u01c4-\u01cc\u01f1-\u01f3\u3000\ufb00-\ufb04\ufb06\uff01-\uffef]+"


def clean(text):
    """Return a caption as CLIP's tokenizer sees it. HTML entities are decoded, and quotes are
    straight. Letters are composed (NFC), of normal width and in lower case."""
    text = html.unescape(html.unescape(text))  # captions from the web are often escaped twice
    if not text.isascii():
        text = text.translate(QUOTES)
        text = regex.sub(WIDE, lambda wide: unicodedata.normalize("NFKC", wide[0]), text)
        text = unicodedata.normalize("NFC", text)
    return CONTROL.sub("", text).lower()


# -----------------------------------------------------------------------------
# Vocabularies, which are .tiktoken files

# Every vocabulary begins with the 256 bytes, in CLIP's order: printable ones first. Then come the
# same bytes at the end of a word, which CLIP's file marks by </w>, and ours by a space.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTES = PRINTABLE + OTHERS
BYTE_TOKENS = [bytes([b]) for b in BYTES] + [bytes([b]) + b" " for b in BYTES]

CLIP_VOCAB_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
CLIP_VOCAB_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def tiktoken_text(tokens):
    """Return the text of a .tiktoken file, which has a token in base64 and its rank on a line."""
    return "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))


def words_to_tiktoken(words):
    """Return the text of a .tiktoken file: first all single bytes, then each word as one token."""
    words = [word.encode() + b" " for word in words]
    return tiktoken_text(dict.fromkeys(BYTE_TOKENS + words))


def clip_vocabulary():
    """Return CLIP's vocabulary as the text of a .tiktoken file. tiktoken has a cache for it."""
    spec = importlib.util.find_spec("open_clip")  # finds the package without importing it
    try:
        if spec and spec.origin:
            content = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
        else:
            content = tiktoken.load.read_file_cached(CLIP_VOCAB_URL, CLIP_VOCAB_SHA256)
    except Exception as error:  # the disk and the network raise many kinds
        raise InputError("CLIP's vocabulary is missing. Install open_clip_torch.") from error
    # A line of CLIP's file is a merge, such as "th e</w>" for the token "the ". A printable byte is
    # written as itself. The others are the characters from number 256 on.
    text = gzip.decompress(content).decode().replace(" ", "").replace("</w>", " ")
    merges = text.split("\n")[1:48895]  # CLIP uses only these: 49,408 - 512 - 2 merges
    byte_of = dict(enumerate(OTHERS, start=256))
    tokens = [merge.translate(byte_of).encode("latin-1") for merge in merges]
    return tiktoken_text(BYTE_TOKENS + tokens)


def tokenizer_for(shards, vocab=None):
    """Return the tokenizer of --vocab, by default of the file beside these shards, or CLIP's."""
    default = Path(shards[0]).with_name("vocab.tiktoken")
    if vocab is None:
        vocab = default if default.is_file() else "clip"
    tokenizer = Tokenizer.from_file(vocab)
    print(f"vocabulary: {vocab}, {tokenizer.vocab_size:,} entries")
    return tokenizer
