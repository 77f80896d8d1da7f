"""A model that learns its training pairs by heart: what validation measures, and when a run says
so."""

import math

import pytest
import torch
import torch.nn.functional as F
from material import make_model
from runs import validations_of

import data
import eval as evaluation

# ---- the loss among validation pairs


def features(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, 8, generator=generator), dim=1)


def test_one_group_of_all_has_clips_loss():
    """Cross-entropy of each image among all texts, and of each text among all images."""
    model = make_model()
    images = features(6, seed=1)
    texts = features(6, seed=2)

    loss = evaluation.loss_in_groups(model, images, texts, torch.arange(6), 6)

    similarity = model.logit_scale.exp().item() * images @ texts.T
    per_image = -similarity.log_softmax(dim=1).diagonal().mean()
    per_text = -similarity.log_softmax(dim=0).diagonal().mean()
    assert loss == pytest.approx(float(per_image + per_text) / 2)


def test_equal_features_have_the_loss_of_a_guess_in_a_group():
    """Seven pairs make two groups of three, and one is left out."""
    same = features(1, seed=1).expand(7, -1)

    loss = evaluation.loss_in_groups(make_model(), same, same, torch.arange(7), 3)

    assert loss == pytest.approx(math.log(3))


def test_an_image_is_paired_with_its_first_caption():
    """The second caption of each image is that of its neighbour."""
    images = torch.eye(8)[:4]
    texts = torch.stack([images, images.roll(1, dims=0)], dim=1).flatten(0, 1)
    owner = torch.arange(4).repeat_interleave(2)

    loss = evaluation.loss_in_groups(make_model(), images, texts, owner, 4)

    first_alone = evaluation.loss_in_groups(make_model(), images, images, torch.arange(4), 4)
    assert loss == first_alone


def test_a_validation_logs_it_in_groups_of_the_batch(shards, whole_run):
    """Batches of 16, and 20 validation pairs."""
    row = validations_of(whole_run)[-1]

    model, tokenizer, _ = evaluation.load(whole_run / "last.pt")
    pairs = data.Pairs([shards / "val-0.tar"], tokenizer, model.config.image_size)
    loss = evaluation.loss_in_groups(model, *evaluation.encode_shards(model, pairs), 16)
    assert row["val_group"] == 16
    assert row["val_contrastive_loss"] == pytest.approx(loss)


# ---- when a run says so


def rows_of(training, validation):
    """Rows of a log: before each validation, in groups of 32, one of training."""
    rows = []
    for loss, val_loss in zip(training, validation):
        rows.append({"loss": loss, "contrastive_loss": loss})
        rows.append({"val_contrastive_loss": val_loss, "val_group": 32})
    return rows


# A guess has ln 32 = 3.47.
LOGS = {
    "nothing is validated": ([], [], False),
    "worse than a guess": ([3.0, 0.1], [3.3, 3.6], True),
    "worse than a guess for a while": ([3.0, 0.1], [3.6, 3.3], False),
    "nothing is learned yet": ([3.5], [3.6], False),
    "better all the time": ([3.0, 2.0, 1.0], [3.2, 2.5, 2.0], False),
    "worse twice": ([3.0, 2.0, 1.0], [2.0, 2.1, 2.2], True),
    "worse once": ([3.0, 2.0, 1.0], [2.0, 1.9, 2.2], False),
    "worse twice, and in training as well": ([1.0, 2.0, 3.0], [2.0, 2.1, 2.2], False),
    "worse twice, long ago": ([3.0, 2.0, 1.0, 0.9], [2.0, 2.1, 2.2, 1.9], False),
}


@pytest.mark.parametrize("training, validation, is_said", LOGS.values(), ids=LOGS)
def test_overfitting_is_said(training, validation, is_said):
    sentence = evaluation.overfitting(rows_of(training, validation))

    assert (sentence is not None) == is_said
