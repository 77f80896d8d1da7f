"""Test the defaults of a run: its options and its schedule.

--help states the rules. The expected values were worked out from them by hand."""

from dataclasses import fields

import pytest
import torch

import train
from superclip import SuperCLIPConfig

# Options -> model, crop_area, batch_size, learning_rate, and the steps of a run on 20,000 pairs.
# Published runs have the values in the first row. On the scenes, a batch that is 8 times as large
# makes the run 8**0.5 times as long, in epochs. An option that is given replaces its default.
DEFAULTS = {
    "--train_data=a.tar": ("ViT-B-16", 0.9, 256, 5e-4, 30 * 78),
    "--train_data=a.tar --init_from=model.pt": (None, 0.9, 256, 5e-5, 30 * 78),
    "": ("tiny", 1, 32, 5e-4, 1000),
    "--batch_size=256": ("tiny", 1, 256, 5e-4, 353),
    "--micro_batch_size=64": ("tiny", 1, 32, 5e-4, 1000),  # more than a batch: no parts
    "--batch_size=256 --epochs=1 --learning_rate=0": ("tiny", 1, 256, 0, 78),
    "--init_from=model.pt --crop_area=0.5 --learning_rate=0": (None, 0.5, 32, 0, 1000),
}


def resolved(options, num_pairs):
    options, last = train.parse(options.split())
    assert last is None
    return train.resolve(options, torch.device("cpu"), num_pairs)


@pytest.mark.parametrize("options, expected", DEFAULTS.items(), ids=DEFAULTS)
def test_the_defaults_suit_the_data_and_what_is_there(options, expected):
    args = resolved(options, 20_000)

    found = (args.model, args.crop_area, args.batch_size, args.learning_rate, args.steps)
    assert found == expected
    assert (args.weight_decay, args.patch_dropout) == (0.2, 0)
    assert (args.workers > 0) == bool(args.train_data)  # scenes leave the cores to the model


@pytest.mark.parametrize("option", ["--epochs=0", "--patch_dropout=1", "--crop_area=0"])
def test_a_value_that_leaves_nothing_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        train.parse([option])

    assert option.partition("=")[0] in capsys.readouterr().err


# Fields of the configuration that the preset, the vocabulary or a checkpoint sets
SIZES = """patch_size vision_width vision_layers vision_heads text_width text_layers text_heads
embed_dim context_length vocab_size quick_gelu image_mean image_std""".split()


def test_every_other_field_of_the_configuration_is_an_option():
    """An option of a fork that misses the name of its field would be accepted, and do nothing."""
    others = {field.name for field in fields(SuperCLIPConfig)} - train.OPTIONS.keys()

    assert others == {*SIZES}


def test_the_learning_rate_rises_and_falls():
    """The warm-up has four steps. Then the rate falls along half a cosine until step 12."""
    rate = [8 * train.learning_rate_factor(step, 4, 12) for step in range(13)]

    assert rate[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]  # a quarter more each step, up to the peak
    assert rate[10] == pytest.approx(4 * (1 - 0.5**0.5))
    assert rate[12] == pytest.approx(0.0)
    assert train.learning_rate_factor(0, 0, 12) == 1.0  # without warm-up


# Options -> three numbers of steps: the length of the run, the length of its warm-up, and the
# distance between validations. An epoch of 70 pairs has four batches of 16.
LENGTHS = {
    "--epochs=2.5": (10, 5, 4),
    "--epochs=0.1": (1, 0, 1),
    "--steps=6000": (6000, 3000, 2000),
    "--steps=340000": (340_000, 3000, 2000),
    "--steps=9 --eval_every=4": (9, 4, 4),
    "--steps=9 --warmup_steps=0": (9, 0, 3),
}


@pytest.mark.parametrize("options, expected", LENGTHS.items(), ids=LENGTHS)
def test_warm_up_and_validations_follow_the_length_of_the_run(options, expected):
    args = resolved(f"--train_data a.tar --batch_size 16 {options}", 70)

    assert (args.steps, args.warmup_steps, args.eval_every) == expected


def test_a_field_that_is_an_option_decides_before_the_heads_are_counted(shards, monkeypatch):
    """A fork may add an option such as --vision_width. ViT-B-16 has 12 heads of 64."""
    monkeypatch.setitem(train.OPTIONS, "vision_width", (None, train.COUNT, "of the image tower"))
    monkeypatch.setitem(train.OPTIONS, "vision_layers", (None, train.COUNT, "of the image tower"))
    options = f"--vocab {shards}/vocab.tiktoken --vision_width 128 --vision_layers 1"
    args = resolved(f"--train_data a.tar {options}", 300)

    model, *_ = train.build_model(args, ["a.tar"])

    assert (model.config.vision_width, model.config.vision_heads) == (128, 2)
