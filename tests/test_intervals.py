"""A 95 % interval covers the truth in 95 % of all samples."""

import math

import numpy as np
import pytest
import torch

import eval as evaluation


def interval_of(hits, n):
    """The interval that eval.py gives a score of so many hits among n images."""
    return evaluation.score(torch.arange(n) < hits, chance=0.1)["interval"]


def coverage(truth, intervals):
    """How probable it is that an interval covers the true share. intervals: those of 0 to n hits,
    which have the probabilities of a binomial distribution."""
    n = len(intervals) - 1
    covered = 0.0
    for hits, (low, high) in enumerate(intervals):
        if low <= truth <= high:
            covered += math.comb(n, hits) * truth**hits * (1 - truth) ** (n - hits)
    return covered


@pytest.mark.parametrize("n", [20, 100, 320])
def test_an_interval_covers_the_truth_in_95_of_100_samples(n):
    """As a mean over all shares: for a single one, coverage goes up and down with the few outcomes
    that there are. The textbook's interval, p ± 1.96 standard errors, covers 84 % with n = 20."""
    intervals = [interval_of(hits, n) for hits in range(n + 1)]
    truths = [i / 500 for i in range(1, 500)]

    covered = [coverage(truth, intervals) for truth in truths]

    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.006)


@pytest.mark.parametrize("truth", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_no_share_is_covered_rarely(truth):
    """The textbook's interval covers a share of 1 % in 87 of 100 samples of 200."""
    intervals = [interval_of(hits, 200) for hits in range(201)]

    assert 0.92 <= coverage(truth, intervals) <= 0.99


def test_captions_of_an_image_stand_or_fall_together():
    """Images differ in how hard they are, and each has five captions. An interval that took the
    captions for independent would be too short, and cover the truth in 73 of 100 evaluations."""
    rng = np.random.default_rng(0)
    image = torch.arange(200).repeat_interleave(5)
    covered = 0

    for _ in range(400):
        difficulty = torch.from_numpy(rng.beta(0.5, 0.5, 200))  # of mean 1/2
        hits = torch.from_numpy(rng.random(1000)) < difficulty[image]
        means = evaluation.mean_by_image(hits.double(), image)
        low, high = evaluation.score(means, chance=0)["interval"]
        covered += low <= 0.5 <= high

    assert covered >= 0.93 * 400  # two standard errors below 95 %
