"""Each image is compared with the captions of its own group of the batch only, as if the batch were
smaller, at equal steps and samples:

    python -m study.groups --group 4 --batch_size 64 [options of train.py]

A model for an idea of your own: replace a function of superclip.py, and let train.py do the rest.
"""

import argparse

import torch

import superclip
import train
from cli import check, run_command

compare_all = superclip.contrastive_loss


def compare_groups(images, texts, scale, local, group):
    """The mean of contrastive_loss over groups of so many pairs."""
    check(len(images) % group == 0, "--group must divide the number of pairs that are compared")
    pairs = zip(images[local].split(group), texts[local].split(group))
    return torch.stack([compare_all(*pair, scale) for pair in pairs]).mean()


def main(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--group", type=int, required=True)
    args, rest = parser.parse_known_args(argv)

    def contrastive_loss(images, texts, scale, local=slice(None)):
        return compare_groups(images, texts, scale, local, args.group)

    superclip.contrastive_loss = contrastive_loss
    return train.main(rest)


if __name__ == "__main__":
    run_command(main)
