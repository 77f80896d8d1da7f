"""Look at shards before training on them:

    python -m scripts.show SHARDS --val_data SHARDS --picture grid.png

Prints counts, caption lengths, repeated captions, what is not used and why, and some samples with
their tokens and label weights: what the word head is asked to predict. The weights are the IDF over
the captions of these shards. With --val_data it counts what validation shares with training.
"""

import argparse
import hashlib
import itertools
import math
import textwrap
from collections import Counter
from contextlib import suppress
from functools import partial

import torch

import data
from cli import number, printable, run_command
from scripts.pictures import contact_sheet, picture_file
from superclip import PAD

SIDE = 240  # pixels of an image in the picture
fill = partial(textwrap.fill, width=100, initial_indent="  ", subsequent_indent="    ")


def read_samples(pairs, rows, unused, images=False):
    """Yield (row, list of all captions, image or None). What is bad goes to `unused`, a list of
    (shard, key, reason)."""
    for row in rows:
        try:
            sources = dict.fromkeys(pairs.captions)
            texts = [text for source in sources for text in pairs.texts(row, source)]
            image = data.load_image(pairs.read(row, data.IMAGE), SIDE) if images else None
            yield row, texts, image
        except (data.BadSample, OSError) as error:
            unused.append((pairs.shards[row[0]], pairs.key(row), str(error)))


def normal(text):
    """A caption in the form in which two of the same words are equal."""
    return " ".join(data.clean(text).split())


def count_tokens(pairs, unused):
    """Read all captions -> (lengths: list of tokens in each; document_counts: in how many captions
    a token is; repeats: in how many samples a caption is)."""
    lengths, document_counts, repeats = [], Counter(), Counter()
    rows = data.progress(pairs.index.tolist(), "reading captions", unit="sample")
    for _, texts, _ in read_samples(pairs, rows, unused):
        for text in texts:
            ids = pairs.tokenizer.encode(text)
            lengths.append(len(ids))
            document_counts.update(set(ids))
        # Equal captions of one sample count once, because they are no false negatives.
        repeats.update({*map(normal, texts)})
    return lengths, document_counts, repeats


def share_with_twin(repeats, batch_size):
    """The share of pairs that meet a twin, a pair with the same caption, in a random batch.

    repeats: Counter of captions. If c of n pairs have a caption, each of them has n - c that do not
    share it. It meets no twin if the B - 1 others of its batch, drawn without replacement, are all
    among these: in C(n - c, B - 1) of C(n - 1, B - 1) cases.
    """
    n = repeats.total()
    others = min(batch_size, n) - 1
    counts = Counter(repeats.values())
    alone = sum(c * captions * math.comb(n - c, others) for c, captions in counts.items())
    return 1 - alone / (n * math.comb(n - 1, others))


def report_captions(lengths, repeats, context_length):
    """Print how long captions are and how many repeat. lengths, repeats: from count_tokens."""
    n, lengths = len(lengths), sorted(lengths)
    parts = [f"{q} % have at most {lengths[q * n // 100]}" for q in (1, 25, 50, 75, 99)]
    print(f"tokens per caption: {', '.join(parts)}, the longest {lengths[-1]}")
    long = sum(length + 2 > context_length for length in lengths)  # with start and end
    print(f"longer than {context_length} tokens: {long:,} ({long / n:.1%}); labels use all of it")
    # The contrastive loss pushes an image away from its caption's twin, though both fit as well.
    twins = sum(count for count in repeats.values() if count > 1)
    print(f"captions with a twin: {twins:,} ({twins / repeats.total():.1%})")
    small, large = (share_with_twin(repeats, batch_size) for batch_size in (32, 256))
    print(f"false negatives: {small:.2%} of pairs meet a twin in a batch of 32, {large:.2%} of 256")
    for text, count in repeats.most_common(3):
        if count > 1:
            print(f"{count:9,} x {printable(textwrap.shorten(text, 90))}")


def report_overlap(pairs, val_pairs, repeats):
    """How much of the validation data is in training, too: captions, and images byte for byte.
    repeats: Counter of the training captions, as count_tokens has it."""
    rows, val_rows = pairs.index.tolist(), val_pairs.index.tolist()
    samples = read_samples(val_pairs, val_rows, [])
    known = sum(any(normal(text) in repeats for text in texts) for _, texts, _ in samples)

    def hashes(pairs, rows):
        for row in data.progress(rows, "comparing images", unit="image"):
            with suppress(data.BadSample, OSError):
                yield hashlib.sha256(pairs.read(row, data.IMAGE)).digest()

    # Only files of equal size can be equal.
    sizes = {row[data.IMAGE + 1] for row in val_rows}
    seen = {*hashes(pairs, [row for row in rows if row[data.IMAGE + 1] in sizes])}
    equal = sum(content in seen for content in hashes(val_pairs, val_rows))
    text = f"{equal:,} of {len(val_rows):,} images and the captions of {known:,}"
    print(f"validation data that is in training, too: {text}")


def report_unused(unused):
    """unused: list of (shard, key, reason). Prints their number by reason, with three examples."""
    print(f"not used: {len(unused):,}")
    kinds = Counter(reason.partition(":")[0] for _, _, reason in unused)
    for kind, count in kinds.most_common():
        print(f"{count:9,}  {kind}")
        examples = [entry for entry in unused if entry[2].partition(":")[0] == kind][:3]
        for shard, key, reason in examples:
            example = f"{shard} {key}: {textwrap.shorten(reason, 90)}"
            print(f"{'':11}{printable(example)}")


def label(ids, document_counts, n):
    """ids of one of n captions -> its label as a list of (id, weight), the largest weight first:
    the set of its tokens, weighted by IDF and normalised, as classification_loss has it."""
    idf = {i: math.log((n + 1) / (document_counts[i] + 1)) for i in ids if i != PAD}
    total = sum(idf.values()) or 1.0
    return sorted(((i, value / total) for i, value in idf.items()), key=lambda item: -item[1])


def print_sample(pairs, row, texts, document_counts, n):
    """The captions of a sample, and what training makes of the first one. n: of all captions."""
    print(f"\n{printable(f'{pairs.shards[row[0]]} {pairs.key(row)}')}")
    for text in texts:
        print(fill(printable(text)))
    ids = pairs.tokenizer.encode(texts[0])
    shortened = textwrap.shorten(" ".join(map(str, ids)), 80)
    print(f"  {len(ids)} tokens of the first caption: {shortened}")
    weights = label(ids, document_counts, n)[:20]
    words = [f"{pairs.tokenizer.decode([i])} {weight:.2f}" for i, weight in weights]
    print(fill("label: " + "  ".join(words)))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0], allow_abbrev=False)
    add = parser.add_argument
    add("shards", nargs="+", help="tar shards: paths, folders, globs or braces")
    add("--val_data", nargs="+", help="shards that must not share much with these")
    add("--n", type=number(int, 1), default=8, help="samples to print and draw (default 8)")
    add("--picture", type=picture_file, help="file to draw the samples into, such as grid.png")
    add("--captions", nargs="+", default=["txt"], help="txt or json.FIELD (default txt)")
    add("--vocab", help="file, or clip (default: vocab.tiktoken beside the shards, else clip)")
    add("--context_length", type=number(int, 3), default=77, help="in tokens (default 77)")
    add("--seed", type=number(int, 0), default=0, help="of the choice of samples (default 0)")
    args = parser.parse_args(argv)
    shards = data.expand(args.shards)
    tokenizer = data.tokenizer_for(shards, args.vocab)
    pairs = data.Pairs(shards, tokenizer, SIDE, args.captions)
    unused = list(pairs.unused)
    lengths, document_counts, repeats = count_tokens(pairs, unused)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(args.seed))
    rows = pairs.index[order[: args.n + 1000]].tolist()  # a thousand bad images are enough
    samples = [*itertools.islice(read_samples(pairs, rows, unused, images=True), args.n)]
    captions = f"{len(lengths):,} captions ({', '.join(args.captions)})"
    print(f"{len(pairs):,} samples in {len(shards):,} shards, {captions}")
    if lengths:
        report_captions(lengths, repeats, args.context_length)
    if args.val_data:
        val_pairs = data.Pairs(data.expand(args.val_data), tokenizer, SIDE, args.captions)
        report_overlap(pairs, val_pairs, repeats)
    report_unused(list(dict.fromkeys(unused)))  # a bad caption may have been read twice
    for row, texts, _ in samples:
        print_sample(pairs, row, texts, document_counts, len(lengths))
    if args.picture and samples:
        images, captions = zip(*[(image, texts[0]) for _, texts, image in samples])
        contact_sheet(images, captions, args.picture)
        print(f"\n{args.picture}: {len(samples)} images with their captions")


if __name__ == "__main__":
    run_command(main)
