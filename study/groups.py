"""Each image is compared with the captions of its own group of the batch only, as if the batch were
smaller, at equal steps and samples:

    python -m study.groups --group 4 --batch_size 64 [options of train.py]

A pattern for an idea of your own: replace a function of superclip.py, and let train.py do the rest.
"""

import argparse

import torch

import superclip
import train
from cli import run_command

compare_all = superclip.contrastive_loss


def main(argv):
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--group", type=int, required=True)
    args, rest = parser.parse_known_args(argv)

    def compare_groups(images, texts, scale, local=slice(None)):
        groups = zip(images[local].split(args.group), texts[local].split(args.group))
        return torch.stack([compare_all(*group, scale) for group in groups]).mean()

    superclip.contrastive_loss = compare_groups
    return train.main(rest)


if __name__ == "__main__":
    run_command(main)
