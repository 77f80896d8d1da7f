"""What a run uses if no option says otherwise: its options, its schedule, what suits the device.

--help states these rules, and here they are worked out by hand."""

import pytest
import torch

import cli
import train


def test_the_defaults_are_those_of_published_runs():
    args = train.parse(["--train_data", "pairs.tar"])

    assert args.batch_size == 256
    assert args.learning_rate == 5e-4
    assert args.weight_decay == 0.2
    assert args.epochs == 30
    assert args.crop_area == 0.9


@pytest.mark.parametrize("argv, size, ratio", [("", 32, 1), ("--batch_size=256", 256, 8**0.5)])
def test_a_larger_batch_of_scenes_takes_fewer_steps_at_a_higher_rate(argv, size, ratio):
    args = train.parse(argv.split())

    assert args.model == "tiny"
    assert args.crop_area == 1.0
    assert args.batch_size == size
    assert args.epochs == pytest.approx(2.4 * ratio, rel=1e-3)
    assert args.learning_rate == pytest.approx(3.5e-4 * ratio, rel=1e-3)


def test_fine_tuning_is_gentle():
    """Larger steps would destroy what the weights know. The model is that of the checkpoint."""
    args = train.parse(["--train_data", "pairs.tar", "--init_from", "model.pt"])

    assert args.learning_rate == 5e-5
    assert args.model is None


@pytest.mark.parametrize("start", [[], ["--train_data", "x.tar"], ["--init_from", "model.pt"]])
def test_what_is_given_wins(start):
    given = "--learning_rate 0 --epochs 1 --batch_size 8 --weight_decay 0"

    args = train.parse([*start, *given.split()])

    assert (args.learning_rate, args.epochs, args.batch_size, args.weight_decay) == (0, 1, 8, 0)


def test_the_learning_rate_rises_and_falls():
    """Four steps of warm-up, and then half a cosine to the twelfth."""
    rate = [8 * train.learning_rate_factor(step, 4, 12) for step in range(13)]

    assert rate[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]  # a quarter more each step, up to the peak
    assert rate[8] == pytest.approx(4.0)  # half way down
    assert rate[10] == pytest.approx(4 * (1 - 0.5**0.5))
    assert rate[12] == pytest.approx(0.0)
    assert train.learning_rate_factor(0, 0, 12) == 1.0  # without warm-up


# Options, and the steps in all, of warm-up, and between validations, for 70 pairs, of which an
# epoch makes four batches of 16. Validations have equal distances, up to a few steps at the end.
LENGTHS = {
    "--epochs=2.5": (10, 1, 4),
    "--epochs=0.1": (1, 0, 1),
    "--steps=1000": (1000, 100, 334),
    "--steps=6001": (6001, 600, 1501),
    "--steps=50000": (50_000, 1000, 2000),
    "--steps=9 --warmup_steps=0 --eval_every=4": (9, 0, 4),
}


@pytest.mark.parametrize("options, expected", LENGTHS.items(), ids=LENGTHS)
def test_warm_up_and_validations_follow_the_length_of_the_run(options, expected):
    args = train.make_parser().parse_args(["--batch_size=16", *options.split()])

    train.set_lengths(args, 70)

    assert (args.steps, args.warmup_steps, args.eval_every) == expected


@pytest.mark.parametrize(
    "capability, dtype", [((6, 1), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16")]
)
def test_the_dtype_of_a_gpu_is_the_fastest_that_it_has_units_for(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    assert cli.pick_dtype(torch.device("cuda", 0)) == dtype
