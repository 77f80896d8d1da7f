"""Train the control, whose head must predict the words of another pair:

    python -m study.shuffled [options of train.py]

The head can learn which words are frequent, but nothing about the picture. So if the control gains
over CLIP, the right words are not the reason. The other pair is the next one of the micro-batch,
so a micro-batch needs at least two pairs.
"""

import superclip
import train
from common.cli import run_command

own_words = superclip.classification_loss


def words_of_the_next(logits, label_tokens, token_weights):
    return own_words(logits, label_tokens.roll(-1, dims=0), token_weights)


def main(argv):
    superclip.classification_loss = words_of_the_next
    return train.main(argv)


if __name__ == "__main__":
    run_command(main)
