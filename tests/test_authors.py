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

from scripts.convert import our_name, read_weights
from superclip import SuperCLIP, SuperCLIPConfig

OFFICIAL = torch.load(Path(__file__).with_name("official_tiny.pt"), weights_only=True)


def load(path, state):
    """Return a model with weights in the authors' layout, which are written to a file and read. The
    model has 300 tokens, too few for a vocabulary of this project, so it has no vocabulary."""
    torch.save({"epoch": 1, "state_dict": state}, path)
    weights, config, _ = read_weights(path)
    model = SuperCLIP(SuperCLIPConfig(**config))
    model.load_state_dict(weights)
    return model


def test_three_training_steps_equal_the_authors(tmp_path):
    """The authors' classification loss also counts padding. Their loss without it is stored as
    class_loss_masked. The three steps do not change the weights, but each step counts the tokens of
    its captions. In the first step their loss counts no padding, so the norms of its gradients are
    compared, too. In their files torch's DistributedDataParallel has put "module." before each
    name."""
    state = {f"module.{name}": x for name, x in OFFICIAL["state_dict"].items()}
    model = load(tmp_path / "official.pt", state)

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


def test_the_authors_counters_become_integer_counts(tmp_path):
    """The authors add up shares of captions over steps of 16,384 captions. In this test there are
    two steps. Token 7 is in 75 % of the captions of each step, and token 8 is in 33 captions."""
    state = dict(OFFICIAL["state_dict"])
    state["num_samples"] = torch.full((1, 1), 2.0, dtype=torch.float64)
    state["cap_fq"] = torch.zeros(1, 300, dtype=torch.float64)
    state["cap_fq"][0, 7] = 1.5
    state["cap_fq"][0, 8] = 33 / 16384 - 1e-9

    model = load(tmp_path / "official.pt", state)

    assert model.num_captions.item() == 2 * 16384
    assert model.token_counts[[7, 8]].tolist() == [24576, 33]
