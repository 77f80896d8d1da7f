"""Look at shards before training on them:

    python -m scripts.show SHARDS --val_data SHARDS --picture grid.png

Prints counts, caption lengths, repeated captions, what is not used and why, and some samples with
their tokens and label weights: what the word head is asked to predict. The weights are the IDF over
the captions of these shards. With --val_data it counts what validation shares with training.

If the vocabulary is one of words, as scripts.vocab makes them, it also says which share of the
words it has. Before fine-tuning, ask it of the model's own vocabulary: --checkpoint FILE.
"""

import hashlib
import itertools
import textwrap
from collections import Counter
from contextlib import suppress
from functools import partial

import torch
import torch.nn.functional as F

import data
from cli import make_parser, number, printable, run_command
from eval import has_letters, load, unknown_words
from scripts.pictures import contact_sheet, picture_file
from scripts.vocab import training_shards
from superclip import idf

SIDE = 240  # pixels of an image in the picture
fill = partial(textwrap.fill, width=100, initial_indent="  ", subsequent_indent="    ")


def read_samples(pairs, rows, unused, images=False):
    """Yield (row, list of all captions, image or None). What is bad goes to `unused`, a list of
    (shard, key, reason)."""
    for row in rows:
        try:
            texts = pairs.all_texts(row, pairs.captions)
            image = None
            if images:
                image = data.load_image(pairs.read(row, data.IMAGE), SIDE)
        except (data.BadSample, OSError) as error:
            unused.append((pairs.shards[row[0]], pairs.key(row), str(error)))
            continue
        yield row, texts, image


def normal(text):
    """A caption in the form in which two of the same words are equal."""
    return " ".join(data.clean(text).split())


def count_tokens(pairs, unused):
    """Read all captions. Returns (lengths: list of tokens in each; token_counts: in how many
    captions each token is, a tensor (V,); repeats: in how many samples a caption is)."""
    lengths = []
    document_counts = Counter()  # which counts ten times as fast as a tensor
    repeats = Counter()
    rows = data.progress(pairs.index.tolist(), "reading captions", unit="sample")
    for _, texts, _ in read_samples(pairs, rows, unused):
        for text in texts:
            ids = pairs.tokenizer.encode(text)
            lengths.append(len(ids))
            document_counts.update(set(ids))
        # Equal captions of one sample count once, because they are no false negatives.
        repeats.update({normal(text) for text in texts})
    token_counts = torch.zeros(pairs.tokenizer.vocab_size, dtype=torch.int64)
    for token, count in document_counts.items():
        token_counts[token] = count
    return lengths, token_counts, repeats


def report_captions(lengths, repeats, context_length):
    """Print how long captions are and how many repeat. lengths, repeats: from count_tokens."""
    n = len(lengths)
    lengths = sorted(lengths)
    parts = [f"{q} % have at most {lengths[q * n // 100]}" for q in (1, 25, 50, 75, 99)]
    print(f"tokens per caption: {', '.join(parts)}, the longest {lengths[-1]}")
    too_long = sum(length + 2 > context_length for length in lengths)  # with start and end
    share = too_long / n
    print(f"longer than {context_length} tokens: {too_long:,} ({share:.1%}); labels use all of it")
    # The contrastive loss pushes an image away from its caption's twin, though both fit as well.
    twins = sum(count for count in repeats.values() if count > 1)
    print(f"captions with a twin: {twins:,} ({twins / repeats.total():.1%})")
    for text, count in repeats.most_common(3):
        if count > 1:
            print(f"{count:9,} x {printable(textwrap.shorten(text, 90))}")


def report_words(tokenizer, repeats):
    """Print which share of the captions' words a vocabulary of words has. CLIP's has parts for any
    word. repeats: from count_tokens."""
    if tokenizer.pattern is not data.WORD:
        return
    counts = Counter()
    for text, count in repeats.items():
        for word in filter(has_letters, data.WORD.findall(text)):
            counts[word] += count
    unknown = Counter({word: counts[word] for word in unknown_words(tokenizer, counts)})
    share = 1 - unknown.total() / max(1, counts.total())
    text = f"the vocabulary has {share:.1%} of the words"
    if unknown:
        examples = ", ".join(word for word, _ in unknown.most_common(3))
        text += f", and spells the others in bytes, such as {examples}"
    print(printable(text))


def image_hashes(pairs, rows):
    """Yield a hash of the bytes of each image that can be read."""
    for row in data.progress(rows, "comparing images", unit="image"):
        with suppress(data.BadSample, OSError):
            yield hashlib.sha256(pairs.read(row, data.IMAGE)).digest()


def report_overlap(pairs, val_pairs, captions):
    """How much of the validation data is in training, too: captions, and images byte for byte.
    captions: those of training, in the form of `normal`."""
    val_rows = val_pairs.index.tolist()
    known = 0
    for _, texts, _ in read_samples(val_pairs, val_rows, []):
        if any(normal(text) in captions for text in texts):
            known += 1
    # Only files of equal size can be equal.
    sizes = {row[data.IMAGE + 1] for row in val_rows}
    rows = [row for row in pairs.index.tolist() if row[data.IMAGE + 1] in sizes]
    seen = set(image_hashes(pairs, rows))
    equal = sum(content in seen for content in image_hashes(val_pairs, val_rows))
    text = f"{equal:,} of {len(val_rows):,} images and the captions of {known:,}"
    print(f"validation data that is in training, too: {text}")


def report_unused(unused):
    """unused: list of (shard, key, reason). Prints their number by reason, with an example each."""
    print(f"not used: {len(unused):,}")
    counts = Counter()
    examples = {}
    for shard, key, reason in unused:
        kind = reason.partition(":")[0]
        counts[kind] += 1
        examples.setdefault(kind, f"{shard} {key}")
    for kind, count in counts.most_common():
        print(f"{count:9,}  {printable(f'{kind}, such as {examples[kind]}')}")


def label_of(ids, weights):
    """The label of a caption, as classification_loss has it: a dict of token -> share, with each
    token once. ids: the caption's tokens; weights (V,): from idf."""
    ids = list(dict.fromkeys(ids))  # in the order of the caption
    shares = F.normalize(weights[ids], p=1, dim=0)
    return dict(zip(ids, shares.tolist()))


def print_sample(pairs, row, texts, weights):
    """The captions of a sample, and what training makes of the first one."""
    name = f"{pairs.shards[row[0]]} {pairs.key(row)}"
    print(f"\n{printable(name)}")
    for text in texts:
        print(fill(printable(text)))
    ids = pairs.tokenizer.encode(texts[0])
    shortened = textwrap.shorten(" ".join(map(str, ids)), 80)
    print(f"  {len(ids)} tokens of the first caption: {shortened}")
    words = []
    for token, share in Counter(label_of(ids, weights)).most_common(20):
        words.append(f"{pairs.tokenizer.decode([token])} {share:.2f}")
    print(fill(printable("label: " + "  ".join(words))))


def main(argv):
    parser = make_parser(__doc__, "captions")
    add = parser.add_argument
    add("shards", nargs="+", help="tar shards: paths, folders, globs or braces")
    add("--val_data", nargs="+", help="shards that must not share much with these")
    add("--n", type=number(int, 1), default=8, help="samples to print and draw (default 8)")
    add("--picture", type=picture_file, help="file to draw the samples into, such as grid.png")
    add_one = parser.add_mutually_exclusive_group().add_argument
    text = "vocabulary file, or clip (default: vocab.tiktoken beside the shards, else clip)"
    add_one("--vocab", metavar="FILE", help=text)
    text = "model whose vocabulary to use instead, such as that of train.py --init_from"
    add_one("--checkpoint", metavar="FILE", help=text)
    args = parser.parse_args(argv)
    shards = training_shards(args.shards)
    if args.checkpoint is None:
        tokenizer = data.tokenizer_for(shards, args.vocab)
    else:
        _, tokenizer, _ = load(args.checkpoint)
    pairs = data.Pairs(shards, tokenizer, SIDE, args.captions)
    unused = list(pairs.unused)
    lengths, token_counts, repeats = count_tokens(pairs, unused)

    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    rows = pairs.index[order[: args.n + 1000]].tolist()  # a thousand bad images are enough
    readable = read_samples(pairs, rows, unused, images=True)
    samples = list(itertools.islice(readable, args.n))

    counts = f"{len(pairs):,} samples in {len(shards):,} shards, {len(lengths):,} captions"
    print(f"{counts} ({', '.join(args.captions)})")
    if lengths:
        report_captions(lengths, repeats, tokenizer.context_length)
        report_words(tokenizer, repeats)
    if args.val_data:
        val_pairs = data.Pairs(data.expand(args.val_data), tokenizer, SIDE, args.captions)
        report_overlap(pairs, val_pairs, repeats)
    report_unused(list(dict.fromkeys(unused)))  # a bad caption may have been read twice
    weights = idf(torch.tensor(len(lengths)), token_counts)
    for row, texts, _ in samples:
        print_sample(pairs, row, texts, weights)
    if args.picture and samples:
        images = [image for _, _, image in samples]
        captions = [texts[0] for _, texts, _ in samples]
        contact_sheet(images, captions, args.picture)
        print(f"\n{args.picture}: {len(samples)} images with their captions")


if __name__ == "__main__":
    run_command(main)
