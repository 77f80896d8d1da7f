"""Test that the authors' code and this code compute the same outputs, losses and gradients from the
same weights.

official_tiny.pt holds what the code of the paper's authors computes. It has the weights of a small
model. For each of three training steps it has the batch, the features, the logits and the losses.
For the first step it also has the norm of each parameter's gradient. The file was made from the
authors' repository at commit fb59c6d. `git show b568bd9:tests/make_official.py` prints the script
that made it.
"""

from pathlib import Path

import pytest
import torch
from oracle import assert_near

from superclip import SuperCLIP, SuperCLIPConfig

OFFICIAL = torch.load(Path(__file__).with_name("official_tiny.pt"), weights_only=True)
CONFIG = SuperCLIPConfig(
    image_size=32,
    patch_size=8,
    vision_width=128,
    vision_layers=2,
    text_width=64,
    text_layers=2,
    embed_dim=24,
    context_length=16,
    vocab_size=300,
)


def our_name(name):
    """Return the name of a tensor in our model. name: that in the authors' model."""
    name = name.replace("text_decoder.ln_mlp", "head.ln")
    return name.replace("text_decoder.text_projection", "head.linear")


def test_three_training_steps_equal_the_authors():
    """The authors' classification loss also counts padding. Their loss without it is stored as
    class_loss_masked. The three steps do not change the weights, but each step counts the tokens of
    its captions. In the first step their loss counts no padding, so the norms of its gradients are
    compared, too."""
    weights = {our_name(name): x for name, x in OFFICIAL["state_dict"].items()}
    for name in ("cap_fq", "num_samples"):  # the authors' counters, which are 0
        assert not weights.pop(name).any()
    model = SuperCLIP(CONFIG)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["token_counts", "num_captions"], [])

    for step in OFFICIAL["steps"]:
        out = model(step["image"], step["text"])
        if step is OFFICIAL["steps"][0]:
            out["loss"].backward()
            theirs = {our_name(name): float(norm) for name, norm in step["grad_norms"].items()}
            norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
            assert norms == pytest.approx(theirs, rel=1e-5)

        assert_near(model.encode_image(step["image"]), step["image_features"])
        assert_near(model.encode_text(step["text"]), step["text_features"])
        assert_near(out["contrastive_loss"], step["contrastive_loss"])
        assert_near(out["classification_loss"], step["class_loss_masked"])
        assert_near(model.word_logits(step["image"]), step["class_logits"])

    assert model.num_captions.item() == 18
