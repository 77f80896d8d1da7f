"""Make a vocabulary of words from the captions of shards:

    python -m scripts.vocab SHARDS --out FOLDER/vocab.tiktoken

Each word is one token, and so is each of the 256 bytes, which spell all other words. train.py and
show find a file vocab.tiktoken beside the shards by themselves. For a small or special domain, such
a vocabulary makes a smaller head than CLIP's 49,408 subwords, and labels that are whole words.
"""

from collections import Counter
from contextlib import suppress

import data
from cli import check, make_parser, number, output_file, printable, run_command, write_file


def make_vocabulary(shards, size, captions):
    """Returns the text of a .tiktoken file with `size` entries: 514 bytes and special tokens, and
    the most frequent words of the shards' captions."""
    data.check_sources(captions)
    samples = data.Shards(shards)
    counts = Counter()
    for row in data.progress(samples.index.tolist(), "counting words", unit="sample"):
        with suppress(data.BadSample):  # training will name it
            for text in samples.all_texts(row, captions):
                counts.update(data.WORD.findall(data.clean(text)))
    check(counts, f"there are no words in {', '.join(captions)} of these shards")
    # Words of one byte are in every vocabulary.
    words = [word for word, _ in counts.most_common() if len(word.encode()) > 1]
    return data.words_to_tiktoken(words[: size - 514])


def main(argv):
    parser = make_parser(__doc__, "captions")
    add = parser.add_argument
    add("shards", nargs="+", help="tar shards: paths, folders, globs or braces")
    add("--size", type=number(int, 515), default=10_000, help="entries (default 10,000)")
    out = {"type": output_file(".tiktoken"), "default": "vocab.tiktoken"}
    add("--out", **out, help="file to write (default vocab.tiktoken)")
    args = parser.parse_args(argv)
    shards, validation = data.split_sides(data.expand(args.shards))
    if validation:
        print(printable(f"validation shards are left out: {' '.join(validation)}"))
    text = make_vocabulary(shards, args.size, args.captions)
    write_file(args.out, lambda file: file.write(text.encode()))
    print(f"{args.out}: {len(text.splitlines()) + 2:,} entries")


if __name__ == "__main__":
    run_command(main)
