"""Look at shards before training on them:

    python -m scripts.show SHARDS --picture grid.png

Prints counts, caption lengths, repeated captions, what is not used and why, and some samples with
their label: the shares that the word head is asked to predict, by the IDF over the captions of
these shards.
"""

from collections import Counter

import torch

import data
from cli import make_parser, run_command
from eval import UNREADABLE
from scripts.pictures import contact_sheet, picture_file
from scripts.vocab import training_shards
from superclip import caption_label, idf
from tokenizer import clean, token_text, tokenizer_for

SAMPLES = 8  # to print and draw
SIDE = 240  # pixels of an image in the picture


def report(lengths, repeats, unused, context_length):
    """lengths: list of tokens in each caption; repeats: in how many samples each caption is;
    unused: list of (name, reason)."""
    lengths = sorted(lengths)
    too_long = sum(length + 2 > context_length for length in lengths)  # with start and end
    print(f"tokens per caption: {lengths[len(lengths) // 2]} in the middle, {lengths[-1]} most")
    print(f"longer than {context_length} tokens: {too_long:,}; labels use all of it")
    # The contrastive loss pushes an image away from its caption's twin, which fits as well.
    twins = sum(count for count in repeats.values() if count > 1)
    print(f"captions with a twin: {twins:,} ({twins / repeats.total():.1%})")
    print(f"not used: {len(unused):,}")
    names = {}  # reason -> list of names
    for name, reason in unused:
        names.setdefault(reason.partition(":")[0], []).append(name)
    for reason, alike in names.items():
        print(f"{len(alike):9,}  {reason}, such as {alike[0]}")


def print_sample(name, texts, tokenizer, weights):
    """The captions of a sample, and the label of the first one. weights (V,): from idf."""
    print("\n  ".join([f"\n{name}", *texts]))
    ids = tokenizer.encode(texts[0])
    [label] = caption_label(torch.tensor([ids]), weights)
    shares = Counter({i: label[i].item() for i in ids})
    words = [f"{token_text(tokenizer, i)} {share:.2f}" for i, share in shares.most_common(20)]
    print("  label: " + "  ".join(words))


def main(argv):
    parser = make_parser(__doc__, "captions")
    add = parser.add_argument
    add("shards", nargs="+", help="tar shards: paths, folders, globs or braces")
    add("--picture", type=picture_file, help="file to draw the samples into, such as grid.png")
    text = "vocabulary file, or clip (default: vocab.tiktoken beside the shards, else clip)"
    add("--vocab", metavar="FILE", help=text)
    args = parser.parse_args(argv)
    paths = training_shards(args.shards)
    tokenizer = tokenizer_for(paths, args.vocab)
    shards = data.Shards(paths, args.captions)

    unused = list(shards.unused)
    lengths = []
    token_counts = Counter()  # which counts ten times as fast as a tensor
    repeats = Counter()
    for i in data.progress(range(len(shards)), "reading captions", unit="sample"):
        try:
            texts = shards.captions(i)
        except UNREADABLE as error:
            unused.append((shards.name(i), str(error)))
            continue
        for text in texts:
            ids = tokenizer.encode(text)
            lengths.append(len(ids))
            token_counts.update(set(ids))
        # Equal captions of one sample count once, because they are no false negatives.
        repeats.update({clean(text) for text in texts})

    samples = []
    order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(0)).tolist()
    for i in order[:SAMPLES]:
        try:
            samples.append((shards.name(i), shards.captions(i), shards.image(i, SIDE)))
        except UNREADABLE as error:
            unused.append((shards.name(i), str(error)))
    print(f"{len(shards):,} samples in {len(paths):,} shards, {len(lengths):,} captions")
    unused = list(dict.fromkeys(unused))  # a bad caption may have been read twice
    report(lengths, repeats, unused, tokenizer.context_length)
    counts = torch.tensor([token_counts[i] for i in range(tokenizer.vocab_size)])
    weights = idf(len(lengths), counts)
    for name, texts, _ in samples:
        print_sample(name, texts, tokenizer, weights)
    if args.picture and samples:
        _, texts, images = zip(*samples)
        contact_sheet(images, [captions[0] for captions in texts], args.picture)
        print(f"\n{args.picture}: {len(samples)} images with their captions")


if __name__ == "__main__":
    run_command(main)
