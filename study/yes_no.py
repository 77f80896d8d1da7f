"""Let the word head answer yes or no for each word: python -m study.yes_no [options of train.py]

SuperCLIP's loss is one softmax over the vocabulary, so words compete. Here each word has a binary
cross-entropy, as in classification with several labels.
"""

import torch.nn.functional as F

import superclip
import train
from common.cli import run_command


def yes_or_no(logits, label_tokens, token_weights):
    """Return the binary cross-entropy, summed over the words and averaged over the pairs. logits
    (B, V); label_tokens (B, T'): the whole captions; token_weights (V,) are not used, because this
    loss has no IDF."""
    is_said = superclip.multi_hot(label_tokens, logits.shape[1])  # (B, V)
    losses = F.binary_cross_entropy_with_logits(logits.float(), is_said, reduction="none")
    return losses[:, superclip.PAD + 1 : -2].sum(dim=1).mean()  # without padding, start and end


def main(argv):
    superclip.classification_loss = yes_or_no
    return train.main(argv)


if __name__ == "__main__":
    run_command(main)
