"""The word head reads the class token, from which the image's feature is made, too, instead of the
mean of the patches:

    python -m study.class_token [options of train.py]
"""

import superclip
import train
from cli import run_command


def read_class_token(self, image_tokens):
    """What WordHead.forward returns, from the first token."""
    class_token = image_tokens[:, 0]  # (B, D)
    return self.linear(self.ln(class_token))  # (B, V)


def main(argv):
    superclip.WordHead.forward = read_class_token
    return train.main(argv)


if __name__ == "__main__":
    run_command(main)
