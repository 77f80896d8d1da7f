"""The checks of lab.md. Each takes a function that a student has written, and tensors of the page.
It prints that all is right, or raises Mistake with a sentence that says what is not.

The project's own functions say what is right. If a result differs, it is compared with those that
the usual mistakes lead to. These are numbers, which hold for the tensors of the page.
"""

import copy
import math

import torch

import superclip


class Mistake(AssertionError):
    """A sentence for the student, which Jupyter shows without a trace."""

    def _render_traceback_(self):
        return [f"Not yet. {self}"]


def near(a, b):
    return (a - b).abs().max() < 1e-3  # false if there is a NaN


def compare(name, found, expected, mistakes):
    """found: what the student's function has returned; mistakes: a dict of sentence -> the result
    that this mistake leads to."""
    if found is None:
        raise Mistake(f"Fill in {name} first.")
    found = torch.as_tensor(found)
    if found.shape != expected.shape:
        raise Mistake(f"{name} should have the shape {expected.shape}, not {found.shape}.")
    if expected.requires_grad and not found.requires_grad:
        raise Mistake(f"{name} has no gradient. Compute with tensors alone.")
    if near(found, expected):
        print(f"{name} is right")
        return
    if not found.isfinite().all():
        raise Mistake(f"{name} is not finite. Do you divide by 0?\n{found}")
    for sentence, result in mistakes.items():
        if near(found, result):
            raise Mistake(f"{name}: {sentence}")
    raise Mistake(f"{name} is\n{found}\nand should be\n{expected}")


def check_contrastive_loss(contrastive_loss, u, v, scale):
    expected = superclip.contrastive_loss(u, v, scale)
    mistakes = {
        "your loss is that of the rows alone. The captions must pick, too.": 0.036,
        "your loss is that of the columns alone. The images must pick, too.": 1.311,
        "your loss is the sum of both, and should be their mean.": 1.347,
        "the scale is missing.": 0.794,
    }
    compare("contrastive_loss", contrastive_loss(u, v, scale), expected, mistakes)


def check_idf(idf, num_captions, token_counts):
    expected = superclip.idf(num_captions, token_counts)
    padding_counts = expected.clone()
    padding_counts[0] = math.log(num_captions + 1)
    mistakes = {
        "padding is no word, and should weigh 0.": padding_counts,
        "rare words should weigh more, not less.": -expected,
    }
    compare("idf", idf(num_captions, token_counts), expected, mistakes)


def check_label(label, tokens, weights):
    expected = superclip.caption_label(tokens, weights)
    every_occurrence = expected.clone()
    every_occurrence[1] = torch.tensor([0, 0, 2, 0, 1, 3, 0, 0]) / 6
    mistakes = {
        "a word that occurs twice counts once.": every_occurrence,
        "the shares of a caption should have the sum 1.": (expected > 0) * weights,
    }
    compare("label", label(tokens, weights), expected, mistakes)


def check_classification_loss(classification_loss, logits, tokens, weights):
    expected = superclip.classification_loss(logits, tokens, weights)
    mistakes = {
        "sum over the vocabulary, and take the mean over the captions alone.": 0.252,
        "your loss is the sum over the captions, and should be their mean.": 8.079,
        "a caption without weight counts in the mean, too.": 2.693,
        "the words of a caption count by their shares, not all the same.": 2.067,
        "the logits need a softmax.": 0.044,
        "the probabilities need a logarithm.": -0.059,
        "the tokens are classes of one softmax, not many questions of yes or no.": 6.882,
        "the sign is wrong.": -expected,
    }
    loss = classification_loss(logits, tokens, weights)
    compare("classification_loss", loss, expected, mistakes)


def check_forward(forward, config, images, tokens):
    """Gives `forward` two batches, because only the second has captions before it."""
    model = superclip.SuperCLIP(config).train()
    ours, forgetful = copy.deepcopy(model), copy.deepcopy(model)
    first = images[:32], tokens[:32]
    second = images[32:64], tokens[32:64]
    forward(model, *first)
    ours(*first)
    found = forward(model, *second)
    if found is None:
        raise Mistake("Fill in forward first.")
    expected = ours(*second)
    compare("contrastive_loss", found["contrastive_loss"], expected["contrastive_loss"], {})
    this_batch_alone = forgetful(*second)["classification_loss"]
    mistakes = {
        "count the captions first.": 0.0,
        "weigh the words by all captions so far, not by this batch alone.": this_batch_alone,
    }
    compare("word_loss", found["word_loss"], expected["classification_loss"], mistakes)


def check_my_forward(my_forward, config, images, tokens):
    losses = my_forward(superclip.SuperCLIP(config).train(), images[:32], tokens[:32])
    if losses is None:
        raise Mistake("Fill in my_forward first.")
    new = [loss for name, loss in losses.items() if name not in ("contrastive_loss", "word_loss")]
    if len(new) != 1 or new[0].ndim > 0 or not new[0].requires_grad:
        raise Mistake("my_forward should return one more loss, a scalar that has a gradient.")
    print(f"The new loss is {new[0]:.3f} before training")
