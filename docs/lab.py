"""The checks of lab.md. Each takes a function that a student has written, and tensors of the page.
It prints that all is right, or raises Mistake with a sentence that says what is not.

The project's own functions say what is right: first the value, then the gradients. If the value
differs, it is compared with those that the usual mistakes lead to. The numbers among these hold for
the tensors of the page. Functions get copies, so nothing that they write changes the page.
"""

import math

import torch
import torch.nn.functional as F

import superclip

LOSSES = ("contrastive_loss", "word_loss")  # what `forward` returns


class Mistake(AssertionError):
    """A sentence for the student, which Jupyter shows without a trace."""

    def _render_traceback_(self):
        return [f"Not yet. {self}"]


# -----------------------------------------------------------------------------
# Comparisons


def near(a, b, tolerance=1e-5):
    """Are they equal, up to rounding? A NaN is equal to nothing."""
    b = torch.as_tensor(b)
    return (a - b).abs().max() <= tolerance * b.abs().max() + 1e-6


def check_type(name, found, kind):
    if found is None:
        raise Mistake(f"Fill in {name} first.")
    if not isinstance(found, kind):
        raise Mistake(f"{name} should give a {kind.__name__}, not a {type(found).__name__}.")


def check_tensor(name, found, expected):
    """Has the result of a student the shape that is expected, and a gradient if it needs one?"""
    check_type(name, found, torch.Tensor)
    if found.shape != expected.shape:
        raise Mistake(f"{name} should have the shape {expected.shape}, not {found.shape}.")
    if expected.requires_grad and not found.requires_grad:
        raise Mistake(f"{name} has no gradient. Do you detach it, or compute it under no_grad?")


def check_losses(name, found, count):
    """Has a student's forward returned a dict with both losses, and so many in all?"""
    check_type(name, found, dict)
    if len(found) != count or not found.keys() >= {*LOSSES}:
        text = f"{name} should return {count} losses, contrastive_loss and word_loss among them"
        raise Mistake(f"{text}. Yours are {', '.join(found)}.")


def compare(name, found, expected, mistakes, inputs=None):
    """mistakes: a dict of sentence -> the result that this mistake leads to; inputs: a dict of the
    tensors whose gradients are compared, too."""
    check_tensor(name, found, expected)
    if not near(found, expected):
        finite = found.nan_to_num(0.0, 0.0, 0.0)  # a NaN must not hide another mistake
        sentences = [sentence for sentence, result in mistakes.items() if near(finite, result)]
        if not found.isfinite().all():
            sentences.append("it is not finite. Do you divide by 0, or take the logarithm of 0?")
        if not sentences:
            sentences.append(f"it is\n{found}\nand should be\n{expected}")
        raise Mistake(f"{name}: " + "\n".join(sentences))
    if inputs:
        options = dict(inputs=[*inputs.values()], retain_graph=True, materialize_grads=True)
        gradients = torch.autograd.grad(found, **options)
        right = torch.autograd.grad(expected, **options)
        for input, ours, theirs in zip(inputs, right, gradients):
            if not near(theirs, ours, tolerance=1e-3):
                raise Mistake(
                    f"{name} has the right value, but a wrong gradient with respect to {input}. Do "
                    "you detach something, turn it into a number, or compute it under no_grad?"
                )


# -----------------------------------------------------------------------------
# The parts of the page


def check_contrastive_loss(contrastive_loss, u, v, scale):
    u = u.clone().requires_grad_()
    v = v.clone().requires_grad_()
    expected = superclip.contrastive_loss(u, v, scale)
    mistakes = {
        "your loss is that of the rows alone. The captions must pick, too.": 0.036104,
        "your loss is that of the columns alone. The images must pick, too.": 1.311242,
        "your loss is the sum of both, and should be their mean.": 2 * expected,
        "the scale is missing.": 0.793735,
        "multiply by the scale. You divide by it.": 1.330843,
        "cross_entropy takes logits, and has a softmax of its own.": 0.881157,
        "the sign is wrong.": -expected,
    }
    loss = contrastive_loss(u.clone(), v.clone(), scale)
    compare("contrastive_loss", loss, expected, mistakes, {"u": u, "v": v})
    expected = superclip.contrastive_loss(u[:3], v[:3], scale)
    try:
        compare("it", contrastive_loss(u[:3].clone(), v[:3].clone(), scale), expected, {})
    except Exception as error:
        text = "contrastive_loss is right for four pairs, and not for three: count them by len(u)"
        raise Mistake(text) from error
    print("contrastive_loss is right")


def check_idf(idf, num_captions, token_counts):
    expected = superclip.idf(num_captions, token_counts)
    mistakes = {
        "padding is no word, and should weigh 0.": (5 / (token_counts + 1)).log(),
        "rare words should weigh more, not less.": -expected,
        "add 1 to N, and to n.": superclip.idf(num_captions - 1, token_counts - 1),
        "take the natural logarithm.": expected / math.log(10),
    }
    counts = token_counts.clone()
    compare("idf", idf(num_captions, counts), expected, mistakes)
    if not counts.equal(token_counts):
        raise Mistake("idf changes token_counts, which belongs to the model. Change the weights.")
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
    if not near(label(tokens.clone(), weights / 8), expected):
        raise Mistake("label is wrong if the weights of a caption have a sum below 1.")
    print("label is right")


def check_classification_loss(classification_loss, logits, tokens, weights):
    logits = logits.clone().requires_grad_()
    expected = superclip.classification_loss(logits, tokens, weights)
    mistakes = {
        "sum over the vocabulary, and take the mean over the captions alone.": expected / 8,
        "your loss is the sum over the captions, and should be their mean.": 4 * expected,
        "a caption without weight counts in the mean, too.": 4 / 3 * expected,
        "the words of a caption count by their shares, not all the same.": 1.393925,
        "a word that occurs twice counts once.": 1.339238,
        "the shares of a caption should have the sum 1.": 4.394921,
        "the logits need a softmax.": -0.466061,
        "the probabilities need a logarithm.": -0.142268,
        "cross_entropy takes logits, and has a softmax of its own.": 1.516027,
        "the softmax is over the vocabulary, not over the captions.": 1.019484,
        "the tokens are classes of one softmax, not many questions of yes or no.": 6.038510,
        "the sign is wrong.": -expected,
    }
    loss = classification_loss(logits.clone(), tokens.clone(), weights.clone())
    compare("classification_loss", loss, expected, mistakes, {"the logits": logits})
    print("classification_loss is right")


def check_forward(forward, config, images, tokens):
    """Gives `forward` two batches, because only the second has captions before it."""
    model = superclip.SuperCLIP(config).train()
    first, second = tokens[:64].split(32)
    forward(model, images[:32], first.clone())
    images = images[32:64]
    found = forward(model, images, second.clone())
    check_losses("forward", found, 2)
    u = model.encode_image(images)
    v = model.encode_text(second)
    image_tokens = model.visual(images)
    logits = model.head(image_tokens)

    def word_loss(*batches, logits=logits):
        """The word loss of the second batch if these have been counted."""
        counter = superclip.SuperCLIP(config)
        for batch in batches:
            counter.count_tokens(batch)
        return superclip.classification_loss(logits, second, counter.token_weights())

    contrastive_loss = superclip.contrastive_loss(u, v, model.logit_scale.exp())
    without_exp = superclip.contrastive_loss(u, v, model.logit_scale)
    mistakes = {
        "model.logit_scale is a logarithm. The scale is its exp().": without_exp,
        "count the captions.": word_loss(),
        "count the captions of a batch before you weigh its words.": word_loss(first),
        "weigh the words by all captions so far, not by this batch alone.": word_loss(second),
        "count each batch once.": word_loss(first, first, second, second),
        "give the head all tokens of the image. It leaves out the class token itself.": word_loss(
            first, second, logits=model.head(image_tokens[:, 1:])
        ),
    }
    inputs = dict(model.named_parameters())
    for name, expected in zip(LOSSES, (contrastive_loss, word_loss(first, second))):
        compare(name, found[name], expected, mistakes, inputs)
    print("forward is right")


def check_my_forward(my_forward, config, images, tokens):
    model = superclip.SuperCLIP(config).train()
    losses = my_forward(model, images[:32], tokens[:32].clone())
    check_losses("my_forward", losses, 3)
    for name, loss in losses.items():
        check_tensor(name, loss, torch.zeros((), requires_grad=True))
        print(f"{name} is {loss:.3f} before training")
