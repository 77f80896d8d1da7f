"""The head is asked for the words of another pair, the next one of the batch:

    python -m study.shuffled [options of train.py]

What it can learn is which words are frequent, and nothing of the picture. So a gain that remains is
not due to the words. Captions are counted, and their words weighted, as always. With
--micro_batch_size the next pair is that of the same micro-batch, which needs two pairs or more.
"""

import superclip
import train
from cli import run_command

own_words = superclip.classification_loss


def words_of_the_next(logits, label_tokens, token_weights):
    """What superclip.classification_loss returns, but each pair has the caption of the next."""
    return own_words(logits, label_tokens.roll(-1, dims=0), token_weights)


def main(argv):
    superclip.classification_loss = words_of_the_next
    return train.main(argv)


if __name__ == "__main__":
    run_command(main)
