"""The learning rate rises to its peak in three times as many steps:

    python -m study.warmup [options of train.py]

Does a rate that is too high for CLIP only come too soon?
"""

import train
from cli import run_command

usual_lengths = train.lengths


def longer_warmup(args, n):
    """What train.lengths returns, with three times the warm-up."""
    steps, warmup_steps, eval_every = usual_lengths(args, n)
    return steps, 3 * warmup_steps, eval_every


def main(argv):
    train.lengths = longer_warmup
    return train.main(argv)


if __name__ == "__main__":
    run_command(main)
