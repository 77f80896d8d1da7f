"""A head that hears colours alone, or shapes: python -m study.some_words --hears colours [options]

The two heads are alike in everything but the words. So if one model names colours better and the
other one shapes, it is the words that decide. A caption without any of the words adds no loss.
"""

import torch

import scenes
import superclip
import train
from cli import make_parser, run_command
from tokenizer import Tokenizer

WORDS = {"colours": scenes.COLOURS, "shapes": scenes.SHAPES}
all_words = superclip.classification_loss


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("--hears", choices=WORDS, required=True, help="kind of words")
    args, options = parser.parse_known_args(argv)
    tokenizer = Tokenizer(scenes.vocabulary())
    heard = torch.zeros(tokenizer.vocab_size)
    heard[tokenizer.encode(" ".join(WORDS[args.hears]))] = 1.0

    def some_words(logits, label_tokens, token_weights):
        return all_words(logits, label_tokens, token_weights * heard.to(token_weights.device))

    superclip.classification_loss = some_words
    return train.main(options)


if __name__ == "__main__":
    run_command(main)
