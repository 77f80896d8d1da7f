"""The predicted times in docs/speed.md follow from the operations of a step, which are counted."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig

ROOT = Path(train.__file__).parent
SPEED = (ROOT / "docs" / "speed.md").read_text()
SHARE = 0.15  # of the peak
PEAKS = {"RTX 4090": 165e12, "A100": 312e12, "H100": 989e12}  # FLOP/s, dense bfloat16
MINUTE, HOUR = 60, 3600
ROW = re.compile(r"^\| (ViT-\S+) \| ([\d.]+) \|((?: \d+ min \|){3})((?: \d+ h \|){3})$", re.M)
ROWS = {name: rest for name, *rest in ROW.findall(SPEED)}


def seconds(samples, gflop):
    """Of so many samples, on each GPU of the table."""
    return [samples * gflop * 1e9 / (SHARE * peak) for peak in PEAKS.values()]


def test_the_table_has_the_models_that_one_trains():
    assert ROWS.keys() == {"ViT-S-16", "ViT-B-32", "ViT-B-16", "ViT-L-14"}


@pytest.mark.parametrize("name", ROWS)
def test_operations_of_an_image_are_counted(name):
    """Forward and backward, with a caption of 16 tokens, on tensors without numbers."""
    with torch.device("meta"):
        model = SuperCLIP(SuperCLIPConfig(**PRESETS[name]))
        tokens = torch.zeros(1, 16, dtype=torch.long)
        images = torch.zeros(1, 3, 224, 224)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        image_features, text_features, terms = model.features_and_terms(images, tokens, tokens)
        (image_features.sum() + text_features.sum() + terms["classification_loss"]).backward()

    gflop, _, _ = ROWS[name]
    assert f"{counter.get_total_flops() / 1e9:.1f}" == gflop


@pytest.mark.parametrize("name", ROWS)
def test_times_follow_from_operations_and_peaks(name):
    gflop, minutes, hours = ROWS[name]

    fine_tuning = seconds(5 * 50_000, float(gflop))
    training = seconds(87e6, float(gflop))
    assert re.findall(r"\d+", minutes) == [f"{s / MINUTE:.0f}" for s in fine_tuning]
    assert re.findall(r"\d+", hours) == [f"{s / HOUR:.0f}" for s in training]
