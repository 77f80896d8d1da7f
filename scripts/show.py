"""Look at shards before training on them:

    python -m scripts.show SHARDS --picture grid.png

The command counts samples, tokens in captions, and captions that occur more than once. It names
what cannot be used, and why. Then it prints some samples, each with its label: the shares of words
that the word head should predict. The IDF of a word comes from the captions of these shards.
"""

from collections import Counter

import torch

import data
from common.cli import check, make_parser, progress, run_command
from common.tokenizer import clean, token_text, tokenizer_for
from eval import UNREADABLE
from scripts.pictures import contact_sheet, picture_file
from scripts.vocab import training_shards
from superclip import caption_label, idf

SAMPLES = 8  # to print and draw
SIDE = 240  # pixels of an image in the picture


def report(lengths, repeats, unused, context_length):
    """Print statistics of the captions, and what is not used and why. lengths: the number of tokens
    in each caption; repeats: a Counter of the samples that have each caption; unused: list of
    (name, reason); context_length: tokens that the text tower reads."""
    lengths = sorted(lengths)
    too_long = sum(length + 2 > context_length for length in lengths)  # with start and end
    print(f"tokens per caption: {lengths[len(lengths) // 2]} (median), {lengths[-1]} at most")
    print(f"longer than {context_length} tokens: {too_long:,} (labels use the whole caption)")
    # Count captions that other samples have, too. The contrastive loss pushes an image away from
    # the same caption of another image, although that caption fits as well.
    twins = sum(count for count in repeats.values() if count > 1)
    print(f"repeated captions: {twins:,} ({twins / repeats.total():.1%})")
    print(f"not used: {len(unused):,}")
    names = {}  # reason -> list of names
    for name, reason in unused:
        names.setdefault(reason.partition(":")[0], []).append(name)
    for reason, alike in names.items():
        print(f"{len(alike):9,}  {reason}, such as {alike[0]}")


def print_sample(name, texts, tokenizer, weights):
    """Print the captions of a sample, and the label of the first one. name: of the sample; texts:
    its captions; weights (V,): the IDF of every token."""
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
    args = parser.parse_args(argv)
    shards = training_shards(args.shards)
    tokenizer = tokenizer_for(shards)
    samples = data.Samples(shards, args.captions)

    unused = list(samples.unused)
    lengths = []
    token_counts = Counter()  # It counts ten times as fast as a tensor.
    repeats = Counter()
    shown = []
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    chosen = {*chosen.tolist()}
    for i in progress(range(len(samples)), "reading captions", unit="sample"):
        try:
            texts = samples.captions(i)
            for text in texts:
                ids = tokenizer.encode(text)
                lengths.append(len(ids))
                token_counts.update(set(ids))
            # Count equal captions of one sample once, because they belong to the same image.
            repeats.update({clean(text) for text in texts})
            if i in chosen:
                shown.append((samples.name(i), texts, samples.image(i, SIDE)))
        except UNREADABLE as error:
            unused.append((samples.name(i), str(error)))
    check(lengths, f"no sample has a caption in each of: {' '.join(args.captions)}")

    print(f"{len(samples):,} samples in {len(shards):,} shards, {len(lengths):,} captions")
    report(lengths, repeats, unused, tokenizer.context_length)
    counts = torch.tensor([token_counts[i] for i in range(tokenizer.vocab_size)])
    weights = idf(len(lengths), counts)
    for name, texts, _ in shown:
        print_sample(name, texts, tokenizer, weights)
    if args.picture and shown:
        _, texts, images = zip(*shown)
        contact_sheet(images, [captions[0] for captions in texts], args.picture)
        print(f"\n{args.picture}: {len(shown)} images with their captions")


if __name__ == "__main__":
    run_command(main)
