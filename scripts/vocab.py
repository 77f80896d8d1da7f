"""Find a vocabulary, or make one of words from the captions of shards:

    python data.py vocab SHARDS --out FOLDER/vocab.tiktoken

Each word is one token, and all 256 bytes are tokens, too, so that any other word can be spelled.
A file vocab.tiktoken beside the shards is found by itself. For a small or special domain it makes
a smaller head than CLIP's vocabulary of 49,408 subwords, and labels that are whole words.
"""

import argparse
import gzip
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import tiktoken.load

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from superclip import InputError, check, cli, number  # noqa: E402

CLIP_VOCAB_URL = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
CLIP_VOCAB_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def find_tokenizer(vocab, shards=(), context_length=77, checkpoint=None):
    """The tokenizer of a checkpoint (a dict), or else the one that --vocab names: a file or "clip".
    None means vocab.tiktoken beside the shards if it is there, else clip. Raises InputError."""
    if checkpoint:
        return data.Tokenizer(checkpoint["vocab"], context_length)
    if vocab is None:
        beside = [Path(shard).parent / "vocab.tiktoken" for shard in shards[:1]]
        vocab = beside[0] if beside and beside[0].is_file() else "clip"
    spec = importlib.util.find_spec("open_clip")  # finds the package without importing it
    if vocab == "clip" and spec:
        vocab = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    if vocab != "clip":
        return data.Tokenizer.from_file(vocab, context_length)
    try:  # tiktoken's cache, else the download
        merges = tiktoken.load.read_file_cached(CLIP_VOCAB_URL, CLIP_VOCAB_SHA256)
    except Exception:  # whatever the network raises
        raise InputError(
            f"cannot download {CLIP_VOCAB_URL}: pip install open_clip_torch brings it along, "
            "--vocab names a copy, and python data.py vocab makes a vocabulary of your captions"
        ) from None
    return data.Tokenizer(data.merges_to_tiktoken(gzip.decompress(merges).decode()), context_length)


def vocabulary_from_words(words):
    """list of words -> the text of a .tiktoken file: all bytes, then the words."""
    words = [word.encode() + b" " for word in words]
    return data.tiktoken_text(dict.fromkeys(data.BYTE_TOKENS + words))


def make_vocabulary(shards, size, captions):
    """The most frequent words of the shards' captions -> the text of a .tiktoken file with `size`
    entries, of which 514 are bytes and special tokens."""
    pairs, counts = data.Pairs(shards, None, 0, captions), Counter()
    for row in data.progress(pairs.index.tolist(), "counting words", unit="sample"):
        for source in dict.fromkeys(captions):
            try:
                for text in pairs.texts(row, source):
                    counts.update(data.WORD.findall(data.clean(text)))
            except data.BadSample:  # training will name it
                pass
    check(counts, f"there are no words in {', '.join(captions)} of these shards")
    # Words of one byte are in every vocabulary.
    words = [word for word, _ in counts.most_common() if len(word.encode()) > 1]
    return vocabulary_from_words(words[: size - 514])


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("shards", nargs="+", help="tar shards: paths, folders, globs or braces")
    add("--size", type=number(int, 515), default=10_000, help="entries (default 10,000)")
    add("--captions", nargs="+", default=["txt"], help="txt or json.FIELD (default txt)")
    add("--out", default="vocab.tiktoken", help="file to write (default vocab.tiktoken)")
    args = parser.parse_args(argv)
    check(args.out.endswith(".tiktoken"), f"--out {args.out} must end in .tiktoken")
    text = make_vocabulary(data.expand(args.shards), args.size, args.captions)
    data.write_file(args.out, lambda file: file.write(text.encode()))
    print(f"{args.out}: {len(text.splitlines()) + 2:,} entries")


if __name__ == "__main__":
    cli(main)
