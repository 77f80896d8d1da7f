"""The checks of lab.md. Each takes a function that a student has written, and tensors of the page.
It prints that all is right, or raises Mistake with a sentence that says what is not.

The project's own functions say what is right: first the value, then the gradients. If the value
differs, it is compared with those that the usual mistakes lead to. Then comes a second question,
which no answer passes that has numbers of the page in it. Functions get copies, so nothing that
they write changes the page.
"""

import math
from copy import deepcopy

import torch
import torch.nn.functional as F

import superclip

# The second question: three captions in a vocabulary of nine tokens, of which 7 and 8 are start and
# end. N captions have been counted, and in none of them are the words 5 and 6.
N = 10
COUNTS = torch.tensor([0, 9, 5, 2, 1, 0, 0, 10, 10])
WEIGHTS = superclip.idf(N, COUNTS)
TOKENS = torch.tensor([[7, 1, 3, 3, 4, 8], [7, 2, 4, 8, 0, 0], [7, 8, 0, 0, 0, 0]])
LOGITS = torch.arange(27.0).sin().view(3, 9)
SIZES = "There are not always 4 captions, or 8 tokens in the vocabulary."


class Mistake(AssertionError):
    """A sentence for the student, which Jupyter shows without a trace."""

    def _render_traceback_(self):
        return [f"Not yet. {self}"]


def near(a, b, tolerance=1e-5):
    """Are they equal, up to rounding? A NaN is equal to nothing."""
    return (a - b).abs().max() <= tolerance * b.abs().max() + 1e-6


def compare(name, found, expected, mistakes, inputs=()):
    """mistakes: a dict of sentence -> the result that this mistake leads to; inputs: tensors whose
    gradients are compared, too."""
    if found is None:
        raise Mistake(f"Fill in {name} first.")
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        raise Mistake(f"{name} should give a tensor of shape {tuple(expected.shape)}.")
    if not near(found, expected):
        finite = found.nan_to_num(0.0, 0.0, 0.0)  # a NaN must not hide another mistake
        sentences = [sentence for sentence, result in mistakes.items() if near(finite, result)]
        if not sentences:
            sentences = [f"it is\n{found}\nand should be\n{expected}"]
        raise Mistake(f"{name}: " + "\n".join(sentences))
    if inputs:
        if not found.requires_grad:
            raise Mistake(f"{name} has no gradient. Do you detach it, or compute it under no_grad?")
        options = dict(inputs=inputs, retain_graph=True, materialize_grads=True)
        try:
            gradients = torch.autograd.grad(found, **options)
        except RuntimeError:
            text = "cannot be differentiated. Do you change a tensor in place, as exp_ and += do?"
            raise Mistake(f"{name} {text}") from None
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, **options)):
            if not near(ours, theirs, tolerance=1e-3):
                text = "has the right value, but a wrong gradient. Do you detach something?"
                raise Mistake(f"{name} {text}")


def ask_again(name, function, ours, inputs, hint):
    """The second question, to a function that has answered the first one as ours does."""
    expected = ours(*inputs)
    try:
        compare(name, function(*deepcopy(inputs)), expected, {})
    except Exception:  # whatever a number of the page leads to
        raise Mistake(f"{name} is right here, but not for other numbers. {hint}") from None


def check_contrastive_loss(contrastive_loss, u, v, scale):
    u = u.clone().requires_grad_()
    v = v.clone().requires_grad_()
    rows = F.cross_entropy(scale * u @ v.T, torch.arange(len(u)))
    columns = F.cross_entropy(scale * v @ u.T, torch.arange(len(u)))
    expected = superclip.contrastive_loss(u, v, scale)
    mistakes = {
        "your loss is that of the rows alone. The captions must pick, too.": rows,
        "your loss is that of the columns alone. The images must pick, too.": columns,
        "your loss is the sum of both, and should be their mean.": rows + columns,
        "the scale is missing.": superclip.contrastive_loss(u, v, 1),
        "multiply by the scale. You divide by it.": superclip.contrastive_loss(u, v, 1 / scale),
    }
    loss = contrastive_loss(u.clone(), v.clone(), scale)
    compare("contrastive_loss", loss, expected, mistakes, [u, v])
    print("contrastive_loss is right")


def check_idf(idf, num_captions, token_counts):
    expected = superclip.idf(num_captions, token_counts)
    mistakes = {
        "padding is no word, and should weigh 0.": (5 / (token_counts + 1)).log(),
        "rare words should weigh more, not less.": -expected,
        "add 1 to N, and to n.": superclip.idf(num_captions - 1, token_counts - 1),
        "take the natural logarithm.": expected / math.log(10),
    }
    compare("idf", idf(num_captions, token_counts.clone()), expected, mistakes)
    hint = "N is not always 4, and a word that nobody has said yet weighs the most."
    ask_again("idf", idf, superclip.idf, (N, COUNTS), hint)
    print("idf is right")


def check_label(label, tokens, weights):
    expected = superclip.caption_label(tokens, weights)
    words = superclip.multi_hot(tokens, 8) * weights
    every_occurrence = F.one_hot(tokens, 8).sum(dim=1) * weights
    mistakes = {
        "a word that occurs twice counts once.": F.normalize(every_occurrence, p=1),
        "divide the weights of a caption by their sum.": words,
        "the shares should have the sum 1, and not the length 1.": F.normalize(words),
    }
    compare("label", label(tokens.clone(), weights.clone()), expected, mistakes)
    ask_again("label", label, superclip.caption_label, (TOKENS, WEIGHTS), SIZES)
    print("label is right")


def check_classification_loss(classification_loss, logits, tokens, weights):
    logits = logits.clone().requires_grad_()
    expected = superclip.classification_loss(logits, tokens, weights)
    softmax_twice = superclip.classification_loss(logits.softmax(dim=1), tokens, weights)
    mistakes = {
        "sum over the vocabulary, and take the mean over the captions alone.": expected / 8,
        "your loss is the sum over the captions, and should be their mean.": 4 * expected,
        "a caption without weight counts in the mean, too.": 4 / 3 * expected,
        "cross_entropy takes logits, and has a softmax of its own.": softmax_twice,
        "the sign is wrong.": -expected,
    }
    loss = classification_loss(logits.clone(), tokens.clone(), weights.clone())
    compare("classification_loss", loss, expected, mistakes, [logits])
    ours = superclip.classification_loss
    ask_again("classification_loss", classification_loss, ours, (LOGITS, TOKENS, WEIGHTS), SIZES)
    print("classification_loss is right")


def check_names(name, found, count):
    """Has a student's forward returned a dict with both losses, and so many in all?"""
    if found is None:
        raise Mistake(f"Fill in {name} first.")
    is_right = isinstance(found, dict) and found.keys() >= {"contrastive_loss", "word_loss"}
    if not is_right or len(found) != count:
        text = f"{name} should return a dict of {count} losses"
        raise Mistake(f"{text}, contrastive_loss and word_loss among them.")


def check_forward(forward, config, images, tokens):
    """Gives `forward` two batches, because only the second has captions before it."""
    model = superclip.SuperCLIP(config).train()
    first, second = tokens[:64].split(32)  # whose words the head should say
    texts = tokens[32:64].flip(0)
    forward(model, images[:32], texts.clone(), first.clone())
    images = images[32:64]
    found = forward(model, images, texts.clone(), second.clone())
    check_names("forward", found, 2)
    u = model.encode_image(images)
    v = model.encode_text(texts)
    logits = model.head(model.visual(images))

    def word_loss(*batches):
        """The word loss of the second batch if these have been counted."""
        counter = superclip.SuperCLIP(config)
        for batch in batches:
            counter.count_tokens(batch)
        return superclip.classification_loss(logits, second, counter.token_weights())

    scale = model.logit_scale
    mistakes = {
        "model.logit_scale is a logarithm. The scale is its exp().": superclip.contrastive_loss(
            u, v, scale
        ),
        "count the captions.": word_loss(),
        "count the captions of a batch before you weigh its words.": word_loss(first),
        "weigh the words by all captions so far, not by this batch alone.": word_loss(second),
        "count each batch once.": word_loss(first, first, second, second),
    }
    expected = {
        "contrastive_loss": superclip.contrastive_loss(u, v, scale.exp()),
        "word_loss": word_loss(first, second),
    }
    for name, loss in expected.items():
        compare(name, found[name], loss, mistakes, [*model.parameters()])
    print("forward is right")


def check_my_forward(my_forward, config, images, tokens):
    model = superclip.SuperCLIP(config).train()
    losses = my_forward(model, images[:32], tokens[:32].clone(), tokens[:32].clone())
    check_names("my_forward", losses, 3)
    for name, loss in losses.items():
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise Mistake(f"my_forward: {name} has no gradient, so it trains nothing.")
        if not loss.isfinite().all():
            raise Mistake(f"my_forward: {name} is {loss}, which would spoil all weights.")
        print(f"{name} is {loss:.3f} before training")
