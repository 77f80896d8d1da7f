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

import data
from cli import make_parser, number, run_command
from eval import UNREADABLE, load
from scripts.pictures import contact_sheet, picture_file
from scripts.vocab import training_shards
from superclip import caption_label, idf
from tokenizer import WORD, clean, has_letters, token_text, tokenizer_for, unknown_words

SIDE = 240  # pixels of an image in the picture
fill = partial(textwrap.fill, width=100, initial_indent="  ", subsequent_indent="    ")


def read_samples(shards, numbers, unused, images=False):
    """Yield (number of a sample, list of all captions, image or None). What is bad goes to
    `unused`, a list of (name, reason)."""
    for i in numbers:
        try:
            texts = shards.captions(i)
            image = shards.image(i, SIDE) if images else None
        except UNREADABLE as error:
            unused.append((shards.name(i), str(error)))
            continue
        yield i, texts, image


def normal(text):
    """A caption in the form in which two of the same words are equal."""
    return " ".join(clean(text).split())


def count_tokens(shards, tokenizer, unused):
    """Read all captions. Returns (lengths: list of tokens in each; token_counts: in how many
    captions each token is, a tensor (V,); repeats: in how many samples a caption is)."""
    lengths = []
    document_counts = Counter()  # which counts ten times as fast as a tensor
    repeats = Counter()
    numbers = data.progress(range(len(shards)), "reading captions", unit="sample")
    for _, texts, _ in read_samples(shards, numbers, unused):
        for text in texts:
            ids = tokenizer.encode(text)
            lengths.append(len(ids))
            document_counts.update(set(ids))
        # Equal captions of one sample count once, because they are no false negatives.
        repeats.update({normal(text) for text in texts})
    token_counts = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
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
            print(f"{count:9,} x {textwrap.shorten(text, 90)}")


def report_words(tokenizer, repeats):
    """Print which share of the captions' words a vocabulary of words has. CLIP's has parts for any
    word. repeats: from count_tokens."""
    if not tokenizer.has_whole_words:
        return
    counts = Counter()
    for text, count in repeats.items():
        for word in filter(has_letters, WORD.findall(text)):
            counts[word] += count
    unknown = Counter({word: counts[word] for word in unknown_words(tokenizer, counts)})
    share = 1 - unknown.total() / max(1, counts.total())
    text = f"the vocabulary has {share:.1%} of the words"
    if unknown:
        examples = ", ".join(word for word, _ in unknown.most_common(3))
        text += f", and spells the others in bytes, such as {examples}"
    print(text)


def image_hashes(shards, numbers):
    """Yield a hash of the bytes of each image that can be read."""
    for i in data.progress(numbers, "comparing images", unit="image"):
        with suppress(*UNREADABLE):
            yield hashlib.sha256(shards.read(i, data.IMAGE)).digest()


def report_overlap(shards, validation, captions):
    """How much of the validation data is in training, too: captions, and images byte for byte.
    captions: those of training, in the form of `normal`."""
    n = len(validation)
    known = 0
    for _, texts, _ in read_samples(validation, range(n), []):
        if any(normal(text) in captions for text in texts):
            known += 1
    # Only files of equal size can be equal.
    sizes = {validation.place(i)[2] for i in range(n)}
    alike = [i for i in range(len(shards)) if shards.place(i)[2] in sizes]
    seen = set(image_hashes(shards, alike))
    equal = sum(content in seen for content in image_hashes(validation, range(n)))
    text = f"{equal:,} of {n:,} images and the captions of {known:,}"
    print(f"validation data that is in training, too: {text}")


def report_unused(unused):
    """unused: list of (name, reason). Prints their number by reason, with an example each."""
    print(f"not used: {len(unused):,}")
    counts = Counter()
    examples = {}
    for name, reason in unused:
        kind = reason.partition(":")[0]
        counts[kind] += 1
        examples.setdefault(kind, name)
    for kind, count in counts.most_common():
        print(f"{count:9,}  {kind}, such as {examples[kind]}")


def print_sample(name, texts, tokenizer, weights):
    """The captions of a sample, and what training makes of the first one: its tokens, and its
    label. weights (V,): from idf."""
    print(f"\n{name}")
    for text in texts:
        print(fill(text))
    ids = tokenizer.encode(texts[0])
    shortened = textwrap.shorten(" ".join(map(str, ids)), 80)
    print(f"  {len(ids)} tokens of the first caption: {shortened}")
    [label] = caption_label(torch.tensor([ids]), weights)
    shares = Counter()
    for i in ids:
        shares[i] = label[i].item()
    words = []
    for token, share in shares.most_common(20):
        words.append(f"{token_text(tokenizer, token)} {share:.2f}")
    print(fill("label: " + "  ".join(words)))


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
    paths = training_shards(args.shards)
    if args.checkpoint is None:
        tokenizer = tokenizer_for(paths, args.vocab)
    else:
        _, tokenizer, _ = load(args.checkpoint)
    shards = data.Shards(paths, args.captions)
    unused = list(shards.unused)
    lengths, token_counts, repeats = count_tokens(shards, tokenizer, unused)

    order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(0))
    numbers = order[: args.n + 1000].tolist()  # a thousand bad images are enough
    readable = read_samples(shards, numbers, unused, images=True)
    samples = list(itertools.islice(readable, args.n))

    counts = f"{len(shards):,} samples in {len(paths):,} shards, {len(lengths):,} captions"
    print(f"{counts} ({', '.join(args.captions)})")
    if lengths:
        report_captions(lengths, repeats, tokenizer.context_length)
        report_words(tokenizer, repeats)
    if args.val_data:
        validation = data.Shards(data.expand(args.val_data), args.captions)
        report_overlap(shards, validation, repeats)
    report_unused(list(dict.fromkeys(unused)))  # a bad caption may have been read twice
    weights = idf(torch.tensor(len(lengths)), token_counts)
    for i, texts, _ in samples:
        print_sample(shards.name(i), texts, tokenizer, weights)
    if args.picture and samples:
        images = [image for _, _, image in samples]
        captions = [texts[0] for _, texts, _ in samples]
        contact_sheet(images, captions, args.picture)
        print(f"\n{args.picture}: {len(samples)} images with their captions")


if __name__ == "__main__":
    run_command(main)
