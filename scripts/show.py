"""Look at shards before training on them:

    python data.py show SHARDS [--n 8] [--picture grid.png]

Prints counts, caption lengths, what is dropped and why, and samples with their tokens and label
weights: what the word head is asked to predict. The weights are the IDF over the captions of these
shards.
"""

import argparse
import math
import textwrap
from collections import Counter

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from superclip import PAD, InputError

CELL, GAP = 240, 16  # pixels of the picture: side of an image, and what lies between


def examine(pairs):
    """All captions of the shards, as one pass: dict of counts. Images are not decoded here."""
    lengths, document_counts, seen, bad = [], Counter(), Counter(), []
    for row in tqdm(
        pairs.index.tolist(),
        desc="reading captions",
        unit="sample",
        delay=1,
        leave=False,
        disable=None,
    ):
        try:
            texts = pairs.texts(row, pairs.captions)
        except (data.BadSample, OSError) as error:
            bad.append((pairs.shards[row[0]], pairs.key(row), str(error)))
            continue
        for text in texts:
            ids = pairs.tokenizer.encode(text)
            lengths.append(len(ids))
            document_counts.update(set(ids))
            seen[" ".join(data.clean(text).split())] += 1
    return dict(lengths=lengths, document_counts=document_counts, seen=seen, bad=bad)


def label(ids, document_counts, n):
    """ids of a caption -> list of (id, share of the label): the set of tokens, by IDF, normalised
    to sum 1."""
    weights = {
        i: math.log((n + 1) / (document_counts[i] + 1)) for i in dict.fromkeys(ids) if i != PAD
    }
    total = sum(weights.values()) or 1.0
    return [(i, weight / total) for i, weight in weights.items()]


def report(pairs, found, context_length):
    n, lengths = len(found["lengths"]), sorted(found["lengths"])
    print(
        f"{len(pairs):,} samples in {len(pairs.shards):,} shards, "
        f"{n:,} captions from {pairs.captions}"
    )
    if n:
        at = {q: lengths[min(n - 1, q * n // 100)] for q in (1, 25, 50, 75, 99)}
        print(
            "tokens a caption: "
            + ", ".join(f"{q} % {length}" for q, length in at.items())
            + f", longest {lengths[-1]}"
        )
        # start and end need a place, too
        long = sum(length + 2 > context_length for length in lengths)
        print(
            f"longer than {context_length} tokens with start and end: {long:,} ({long / n:.1%}); "
            "labels use all of it"
        )
        repeated = sum(count - 1 for count in found["seen"].values())
        print(f"captions that another caption repeats: {repeated:,} ({repeated / n:.1%})")
        for text, count in found["seen"].most_common(3):
            if count > 1:
                print(f"{count:9,} x {textwrap.shorten(text, 90)}")


def report_bad(bad):
    print(f"dropped or doubtful: {len(bad):,}")
    kinds = Counter(kind(reason) for _, _, reason in bad)
    for name, count in kinds.most_common():
        print(f"{count:9,}  {name}")
        for shard, key, reason in [entry for entry in bad if kind(entry[2]) == name and entry[0]][
            :3
        ]:
            print(f"{'':11}{shard} {key}: {textwrap.shorten(reason, 100)}")


def kind(reason):
    """A reason without what belongs to one sample: numbers, and names of files."""
    head = reason.partition(":")[0]
    return " ".join(word for word in head.split() if not any(c.isdigit() or c == "/" for c in word))


def choose(pairs, n, seed=0):
    """n samples of which image and captions can be used, drawn at random: list of (row, image
    tensor, captions), and what was bad on the way."""
    chosen, bad = [], []
    for i in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(chosen) == n or len(bad) > 1000:
            break
        row = pairs.index[i].tolist()
        try:
            texts = pairs.texts(row, pairs.captions)
            chosen.append((row, data.load_image(pairs.read(row, data.IMAGE), CELL), texts))
        except (data.BadSample, OSError) as error:
            bad.append((pairs.shards[row[0]], pairs.key(row), str(error)))
    return chosen, bad


def print_samples(pairs, chosen, found):
    n = len(found["lengths"])
    for row, _, texts in chosen:
        print(f"\n{pairs.shards[row[0]]} {pairs.key(row)}")
        for text in texts:
            print(
                textwrap.fill(
                    " ".join(text.split()), 100, initial_indent="  ", subsequent_indent="    "
                )
            )
        ids = pairs.tokenizer.encode(texts[0])
        shares = sorted(label(ids, found["document_counts"], n), key=lambda entry: -entry[1])
        words = "  ".join(f"{pairs.tokenizer.decode([i])} {share:.2f}" for i, share in shares[:20])
        print(
            f"  {len(ids)} tokens of the first caption: "
            + textwrap.shorten(" ".join(map(str, ids)), 80)
        )
        print(textwrap.fill(f"label: {words}", 100, initial_indent="  ", subsequent_indent="    "))


def draw(chosen, path):
    """The images as the model sees them, their first captions below, as a picture of at most four
    columns."""
    font = ImageFont.load_default(size=15)
    columns = min(4, len(chosen))
    captions = [wrap(" ".join(texts[0].split()), font, lines=4) for _, _, texts in chosen]
    line = 19  # pixels
    height = CELL + 6 + line * max(len(lines) for lines in captions)
    rows = math.ceil(len(chosen) / columns)
    picture = Image.new("RGB", (GAP + columns * (CELL + GAP), GAP + rows * (height + GAP)), "white")
    pen = ImageDraw.Draw(picture)
    for i, ((_, image, _), lines) in enumerate(zip(chosen, captions, strict=True)):
        x, y = GAP + i % columns * (CELL + GAP), GAP + i // columns * (height + GAP)
        picture.paste(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), (x, y))
        for j, text in enumerate(lines):
            pen.text((x, y + CELL + 4 + j * line), text, fill="black", font=font)
    try:
        picture.save(path)
    except (OSError, ValueError) as error:  # ValueError: an extension that Pillow does not know
        raise InputError(f"cannot write the picture {path}: {error}") from None


def wrap(text, font, lines):
    """text -> list of at most `lines` lines that fit below an image; the last ends in dots if there
    is more."""
    out, words = [""], text.split()
    for word in words:
        while font.getlength(word) > CELL:  # a word without end, such as an address
            word = word[:-1]
        if font.getlength(f"{out[-1]} {word}") > CELL and out[-1]:
            out.append("")
        out[-1] = f"{out[-1]} {word}".strip()
    if len(out) > lines:
        last = out[lines - 1]
        while font.getlength(last + "...") > CELL:
            last = last[:-1]
        out = [*out[: lines - 1], last.rstrip() + "..."]
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="data.py show",
        description="Look at shards before training on them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("shards", nargs="+", help="tar files, folders, globs or braces")
    add("--n", type=int, default=8, metavar="N", help="samples to print and draw (default 8)")
    add(
        "--picture",
        metavar="FILE",
        help="draw the samples with their captions into this file, such as grid.png",
    )
    add("--captions", default="txt", metavar="SOURCE", help="txt, or json.FIELD (default txt)")
    add(
        "--vocab",
        metavar="FILE",
        help="clip or a file (default: vocab.tiktoken beside the shards, else clip)",
    )
    add(
        "--context_length",
        type=int,
        default=77,
        metavar="TOKENS",
        help="of the text tower (default 77)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the choice of samples (default 0)")
    args = parser.parse_args(argv)
    shards = data.expand(args.shards)
    pairs = data.Pairs(shards, data.find_tokenizer(args.vocab, shards), CELL, args.captions)
    found = examine(pairs)
    chosen, bad_images = choose(pairs, args.n, args.seed)
    report(pairs, found, args.context_length)
    # a sample may turn up in both passes; it is named once
    report_bad(list(dict.fromkeys([*pairs.bad, *found["bad"], *bad_images])))
    print_samples(pairs, chosen, found)
    if args.picture and chosen:
        draw(chosen, args.picture)
        print(f"\n{args.picture}: {len(chosen)} images with their captions")
