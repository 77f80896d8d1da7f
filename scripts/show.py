"""Look at shards before training on them:

    python -m scripts.show shards/ --out pairs.png

The command counts samples, and captions that occur more than once. Then it draws eight pictures
with their captions, so that you can see whether they belong together.
"""

from collections import Counter

import torch

import data
from common.cli import check, make_parser, output_file, progress, run_command
from common.images import BadSample, load_image
from common.shards import find_shards
from common.tokenizer import clean
from scripts.pictures import SIDE, contact_sheet

SHOWN = 8  # samples


def main(argv):
    parser = make_parser(__doc__, "captions")
    add = parser.add_argument
    add("shards", nargs="+", help="tar shards: paths, folders, globs or braces")
    add("--out", type=output_file(".png"), required=True, help="picture to draw, such as pairs.png")
    args = parser.parse_args(argv)
    samples = data.open_samples(find_shards(args.shards), args.captions)
    counts = Counter()  # caption -> number of samples that have it
    bad = []  # names of samples whose captions or picture cannot be read
    shown = []  # (picture, its first caption)
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:SHOWN]
    chosen = {*chosen.tolist()}
    for i in progress(range(len(samples)), "reading captions", unit="sample"):
        try:
            captions = samples.captions(i)
            counts.update({clean(caption) for caption in captions})
            if i in chosen:
                image = load_image(samples.image(i), SIDE)
                shown.append((image, captions[0]))
        except BadSample as error:
            bad.append(f"{samples.name(i)}: {error}")
    print(f"{len(samples):,} samples")
    if bad:
        print(f"{len(bad):,} of them cannot be used, such as {bad[0]}")
    check(counts, f"no sample has a caption in each of: {' '.join(args.captions)}")
    # The contrastive loss pushes a picture away from the same caption of another picture, although
    # that caption fits as well.
    repeated = sum(count for count in counts.values() if count > 1)
    print(f"{repeated / counts.total():.1%} of the captions occur with several pictures")
    check(shown, "none of the chosen samples can be drawn")
    images, captions = zip(*shown)
    contact_sheet(images, captions, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
