"""Look at shards before training on them:

    python -m scripts.show SHARDS --picture grid.png

Prints counts, caption lengths, repeated captions, what is not used and why, and some samples with
their tokens and label weights: what the word head is asked to predict. The weights are the IDF over
the captions of these shards.
"""

import argparse
import math
import textwrap
from collections import Counter
from functools import partial

import torch

import data
from scripts.pictures import contact_sheet, picture_format
from superclip import PAD, cli, number

SIDE = 240  # pixels of an image in the picture
fill = partial(textwrap.fill, width=100, initial_indent="  ", subsequent_indent="    ")


def texts_of(pairs, row):
    """All captions of a sample. Raises BadSample."""
    return [text for source in dict.fromkeys(pairs.captions) for text in pairs.texts(row, source)]


def examine(pairs):
    """Read all captions -> (lengths: list of tokens in each; document_counts: in how many captions
    a token is; repeats: how many samples have a caption; bad: list of (shard, key, reason)). Images
    are not decoded."""
    lengths, document_counts, repeats, bad = [], Counter(), Counter(), []
    for row in data.progress(pairs.index.tolist(), "reading captions", unit="sample"):
        try:
            texts = texts_of(pairs, row)
        except (data.BadSample, OSError) as error:
            bad.append((pairs.shards[row[0]], pairs.key(row), str(error)))
            continue
        for text in texts:
            ids = pairs.tokenizer.encode(text)
            lengths.append(len(ids))
            document_counts.update(set(ids))
        # Within one sample, twins do no harm: they count once.
        repeats.update({" ".join(data.clean(text).split()) for text in texts})
    return lengths, document_counts, repeats, bad


def choose(pairs, n, seed):
    """n samples at random -> (list of (row, image, captions), bad as in examine: images that cannot
    be decoded)."""
    chosen, bad = [], []
    for i in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist():
        row = pairs.index[i].tolist()
        try:
            texts = texts_of(pairs, row)
            chosen.append((row, data.load_image(pairs.read(row, data.IMAGE), SIDE), texts))
        except (data.BadSample, OSError) as error:
            bad.append((pairs.shards[row[0]], pairs.key(row), str(error)))
        if len(chosen) == n or len(bad) == 1000:
            break
    return chosen, bad


def report_captions(lengths, repeats, context_length):
    n, lengths = len(lengths), sorted(lengths)
    parts = [f"{q} % have at most {lengths[q * n // 100]}" for q in (1, 25, 50, 75, 99)]
    print(f"tokens per caption: {', '.join(parts)}, the longest {lengths[-1]}")
    # Start and end need a place, too.
    long = sum(length + 2 > context_length for length in lengths)
    print(f"longer than {context_length} tokens: {long:,} ({long / n:.1%}); labels use all of it")
    # The contrastive loss treats the image of a caption's twin as wrong, though it fits as well.
    twins = sum(count for count in repeats.values() if count > 1)
    print(f"captions with a twin: {twins:,} ({twins / n:.1%}); in one batch, false negatives")
    for text, count in repeats.most_common(3):
        if count > 1:
            print(f"{count:9,} x {textwrap.shorten(text, 90)}")


def report_unused(unused):
    """unused: list of (shard, key, reason). Prints their number by reason, with three examples."""
    print(f"not used: {len(unused):,}")
    kinds = Counter(reason.partition(":")[0] for _, _, reason in unused)
    for kind, count in kinds.most_common():
        print(f"{count:9,}  {kind}")
        examples = [entry for entry in unused if entry[2].partition(":")[0] == kind][:3]
        for shard, key, reason in examples:
            # tarfile turns a name that is not UTF-8 into one that cannot be printed.
            example = f"{'':11}{shard} {key}: {textwrap.shorten(reason, 90)}"
            print(example.encode(errors="replace").decode())


def label(ids, document_counts, n):
    """ids of one of n captions -> its label as a list of (id, weight), the largest weight first:
    the set of its tokens, weighted by IDF and normalised, as classification_loss has it."""
    idf = {i: math.log((n + 1) / (document_counts[i] + 1)) for i in ids if i != PAD}
    total = sum(idf.values()) or 1.0
    return sorted(((i, value / total) for i, value in idf.items()), key=lambda pair: -pair[1])


def print_sample(pairs, row, texts, document_counts, n):
    """The captions of a sample, and what training makes of the first one."""
    print(f"\n{pairs.shards[row[0]]} {pairs.key(row)}")
    for text in texts:
        print(fill(text))
    ids = pairs.tokenizer.encode(texts[0])
    shortened = textwrap.shorten(" ".join(map(str, ids)), 80)
    print(f"  {len(ids)} tokens of the first caption: {shortened}")
    weights = label(ids, document_counts, n)[:20]
    words = [f"{pairs.tokenizer.decode([i])} {weight:.2f}" for i, weight in weights]
    print(fill("label: " + "  ".join(words)))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("shards", nargs="+", help="tar shards: paths, folders, globs or braces")
    add("--n", type=number(int, 1), default=8, help="samples to print and draw (default 8)")
    add("--picture", help="file to draw the samples into, such as grid.png")
    add("--captions", nargs="+", default=["txt"], help="txt or json.FIELD (default txt)")
    add("--vocab", help="file, or clip (default: vocab.tiktoken beside the shards, else clip)")
    add("--context_length", type=number(int, 3), default=77, help="in tokens (default 77)")
    add("--seed", type=number(int, 0), default=0, help="of the choice of samples (default 0)")
    args = parser.parse_args(argv)
    if args.picture:
        picture_format(args.picture)  # a mistake is told before the work
    shards = data.expand(args.shards)
    tokenizer = data.Tokenizer.from_file(args.vocab or data.vocabulary_beside(shards))
    pairs = data.Pairs(shards, tokenizer, SIDE, args.captions)
    lengths, document_counts, repeats, bad = examine(pairs)
    chosen, bad_images = choose(pairs, args.n, args.seed)
    sources = ", ".join(args.captions)
    print(
        f"{len(pairs):,} samples in {len(shards):,} shards, {len(lengths):,} captions ({sources})"
    )
    if lengths:
        report_captions(lengths, repeats, args.context_length)
    report_unused(list(dict.fromkeys([*pairs.unused, *bad, *bad_images])))
    for row, _, texts in chosen:
        print_sample(pairs, row, texts, document_counts, len(lengths))
    if args.picture and chosen:
        images, captions = zip(*[(image, texts[0]) for _, image, texts in chosen])
        contact_sheet(images, captions, args.picture)
        print(f"\n{args.picture}: {len(chosen)} images with their captions")


if __name__ == "__main__":
    cli(main)
