"""Check the functions that a student writes in lab.ipynb.

Each check calls a function with numbers that the notebook does not show. It prints that the result
is right, or raises Mistake with a sentence that says what is wrong.

The project's own function gives the right result. If the value is wrong, a check compares it with
the results of the usual mistakes.
"""

import torch
import torch.nn.functional as F

import superclip

# The embeddings of five images and of their captions, and a scale
U, V = F.normalize(torch.arange(30.0).sin().view(2, 5, 3), dim=2)
SCALE = 5.0
# The counts after ten captions, in a vocabulary of nine tokens. Token 0 is padding, tokens 7 and 8
# are start and end, and no caption had token 5 or 6.
COUNTS = torch.tensor([0, 9, 5, 2, 1, 0, 0, 0, 0])
WEIGHTS = superclip.idf(10, COUNTS)
TOKENS = torch.tensor([[7, 1, 3, 3, 4, 8], [7, 2, 4, 8, 0, 0], [7, 8, 0, 0, 0, 0]])
LOGITS = torch.arange(27.0).sin().view(3, 9)


class Mistake(AssertionError):
    """A sentence that tells the student what is wrong. Jupyter shows it without a trace."""

    def _render_traceback_(self):
        return [f"Not yet. {self}"]


def near(a, b):
    """Return whether two tensors are equal, up to rounding. A NaN is equal to nothing."""
    return (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-6


def compare(name, found, expected, mistakes, inputs=()):
    """Print that the result of a student's function is right, or raise Mistake.

    found: the student's result; expected: the project's result; mistakes: a dict of sentence -> the
    result that this mistake leads to; inputs: tensors for which both must have the same gradients.
    """
    if found is None:
        raise Mistake(f"Fill in {name} first.")
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        raise Mistake(f"{name} should return a tensor of shape {tuple(expected.shape)}.")
    if not near(found, expected):
        finite = dict(nan=0.0, posinf=0.0, neginf=0.0)  # so that a NaN hides no other mistake
        for sentence, result in mistakes.items():
            if near(found.nan_to_num(**finite), result.nan_to_num(**finite)):
                raise Mistake(f"{name}: {sentence}")
        raise Mistake(f"{name}: for other numbers it is\n{found}\nIt should be\n{expected}")
    for x in inputs:
        [right] = torch.autograd.grad(expected, x, retain_graph=True)
        gradient = None
        if found.requires_grad:
            [gradient] = torch.autograd.grad(found, x, retain_graph=True, allow_unused=True)
        if gradient is None or (gradient - right).norm() > 1e-3 * right.norm():
            text = f"{name} has the right value, but not the right gradient"
            raise Mistake(f"{text}. Look for detach() or no_grad() in it.")
    print(f"{name} is right")


def check_contrastive_loss(contrastive_loss):
    u, v, scale = (torch.as_tensor(x).clone().requires_grad_() for x in (U, V, SCALE))
    right = superclip.contrastive_loss(u, v, scale)
    rows = F.cross_entropy(scale * u @ v.T, torch.arange(len(u)))
    mistakes = {
        "your loss has the rows only. The captions must pick, too.": rows,
        "your loss is the sum of both cross-entropies. It should be their mean.": 2 * right,
        "the scale is missing. Multiply the cosines by it.": superclip.contrastive_loss(u, v, 1.0),
    }
    compare("contrastive_loss", contrastive_loss(u, v, scale), right, mistakes, (u, v, scale))


def check_idf(idf):
    mistakes = {
        "rare words weigh less. They should weigh more.": -WEIGHTS,
        "add 1 to N and to n.": superclip.idf(9, COUNTS - 1),
    }
    compare("idf", idf(10, COUNTS.clone()), WEIGHTS, mistakes)


def check_label(label):
    right = superclip.caption_label(TOKENS, WEIGHTS)
    words = superclip.multi_hot(TOKENS, 9)
    occurrences = F.one_hot(TOKENS, 9).sum(dim=1)
    twice = F.normalize(occurrences * words * WEIGHTS, p=1)
    all_tokens = F.normalize(occurrences.clamp(max=1) * WEIGHTS, p=1)
    mistakes = {
        "count a word once, even if it occurs twice.": twice,
        "start, end and padding are no words. Give them no share.": all_tokens,
        "divide the weights of a caption by their sum.": words * WEIGHTS,
    }
    compare("label", label(TOKENS.clone(), WEIGHTS.clone()), right, mistakes)


def check_classification_loss(classification_loss):
    logits = LOGITS.clone().requires_grad_()
    right = superclip.classification_loss(logits, TOKENS, WEIGHTS)
    twice = superclip.classification_loss(logits.softmax(dim=1), TOKENS, WEIGHTS)
    mistakes = {
        "take the sum over the vocabulary, and the mean over the captions only.": right / 9,
        "your loss is the sum over the captions. It should be their mean.": 3 * right,
        "cross_entropy takes logits. It computes the softmax itself.": twice,
    }
    loss = classification_loss(logits, TOKENS.clone(), WEIGHTS.clone())
    compare("classification_loss", loss, right, mistakes, (logits,))


def check_names(name, found, count):
    """Raise Mistake unless a student's forward has returned a dict with both losses. found: what it
    has returned; count: the number of losses that the dict should have."""
    if found is None:
        raise Mistake(f"Fill in {name} first.")
    losses = {"contrastive_loss", "classification_loss"}
    is_right = isinstance(found, dict) and found.keys() >= losses
    if not is_right or len(found) != count:
        text = f"{name} should return a dict of {count} losses"
        raise Mistake(f"{text}, contrastive_loss and classification_loss among them.")


def check_forward(forward, config, images, tokens):
    """Check `forward` on its second batch, because no captions come before the first one."""
    model = superclip.SuperCLIP(config).train()
    first, second = tokens[:64].split(32)  # the head should say the words of these
    texts = tokens[32:64].flip(0)
    forward(model, images[:32], texts, first)
    found = forward(model, images[32:64], texts, second)
    check_names("forward", found, 2)
    u = model.encode_image(images[32:64])
    v = model.encode_text(texts)
    logits = model.word_logits(images[32:64])

    def loss_after(*batches):
        """Return the classification loss of the second batch after these were counted."""
        counter = superclip.SuperCLIP(config)
        for batch in batches:
            counter.count_tokens(batch)
        weights = superclip.idf(counter.num_captions, counter.token_counts)
        return superclip.classification_loss(logits, second, weights)

    mistakes = {
        "count the captions. model.count_tokens does it.": loss_after(),
        "count the captions of a batch before you weigh its words.": loss_after(first),
        "count each batch once.": loss_after(first, first, second, second),
    }
    image_tower, text_tower = model.visual.conv1.weight, model.text.token_embedding.weight
    name = "classification_loss"
    compare(name, found[name], loss_after(first, second), mistakes, (image_tower,))
    logarithm = "model.logit_scale is a logarithm. The scale is its exp()."
    mistakes = {logarithm: superclip.contrastive_loss(u, v, model.logit_scale)}
    right = superclip.contrastive_loss(u, v, model.logit_scale.exp())
    parameters = image_tower, text_tower, model.logit_scale
    compare("contrastive_loss", found["contrastive_loss"], right, mistakes, parameters)


def check_my_forward(my_forward, config, images, tokens):
    model = superclip.SuperCLIP(config).train()
    losses = my_forward(model, images[:32], tokens[:32], tokens[:32])
    check_names("my_forward", losses, 3)
    for name, loss in losses.items():
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise Mistake(f"my_forward: {name} has no gradient, so it trains nothing.")
        if loss.ndim > 0:
            raise Mistake(f"my_forward: {name} should be a scalar. Take its mean or its sum.")
        print(f"{name} is {loss:.3f} before training")
