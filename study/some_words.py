"""Train the word head on colour words only, or on shape words only:

    python -m study.some_words --hears colours [options of train.py]

The two heads differ only in their words. So if one model is better at colours and the other one at
shapes, the words have decided that. A caption without any of the words adds 0 to the loss.
"""

import torch

import superclip
import train
from common import scenes
from common.cli import check, run_command
from common.tokenizer import Tokenizer

WORDS = {"colours": scenes.COLOURS, "shapes": scenes.SHAPES}
all_words = superclip.classification_loss


def main(argv):
    # An option of train.py stands in the log, and a run that goes on still has it.
    train.OPTIONS["hears"] = (None, {"choices": WORDS}, "kind of words")
    options, _ = train.parse(argv)
    check(options["hears"], "give --hears colours or --hears shapes")
    tokenizer = Tokenizer(scenes.vocabulary())
    heard = torch.zeros(tokenizer.vocab_size)
    heard[tokenizer.encode(" ".join(WORDS[options["hears"]]))] = 1.0

    def some_words(logits, label_tokens, token_weights):
        return all_words(logits, label_tokens, token_weights * heard.to(token_weights.device))

    superclip.classification_loss = some_words
    return train.main(argv)


if __name__ == "__main__":
    run_command(main)
