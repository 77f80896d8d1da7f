"""What a run uses if no option says otherwise: its options, its schedule, what suits the device.

--help states these rules, and here they are worked out by hand."""

import pytest
import torch
from material import error_of
from runs import short_run

import cli
import train

# ---- the options of three kinds of run


def test_the_defaults_are_those_of_published_runs():
    args, _ = train.parse(["--train_data", "pairs.tar"])

    assert args.model == "ViT-B-16"
    assert args.batch_size == 256
    assert args.learning_rate == 5e-4
    assert args.weight_decay == 0.2
    assert args.epochs == 30
    assert args.crop_area == 0.9


def test_the_built_in_scenes_have_defaults_of_their_own():
    args, _ = train.parse([])

    assert args.model == "tiny"
    assert args.batch_size == 32
    assert args.learning_rate == 3.5e-4
    assert args.epochs == 2.4
    assert args.crop_area == 1.0


def test_a_batch_of_scenes_that_is_four_times_as_large_takes_half_the_steps_at_twice_the_rate():
    args, _ = train.parse(["--batch_size", "128"])

    assert args.learning_rate == pytest.approx(7e-4)
    assert args.epochs == pytest.approx(4.8)


def test_fine_tuning_is_gentle():
    """Larger steps would destroy what the weights know. The model is that of the checkpoint."""
    args, _ = train.parse(["--train_data", "pairs.tar", "--init_from", "model.pt"])

    assert args.learning_rate == 5e-5
    assert args.model is None


@pytest.mark.parametrize("start", [[], ["--train_data", "x.tar"], ["--init_from", "model.pt"]])
def test_what_is_given_wins(start):
    given = "--learning_rate 0 --epochs 1 --batch_size 8 --weight_decay 0"

    args, _ = train.parse([*start, *given.split()])

    assert (args.learning_rate, args.epochs, args.batch_size, args.weight_decay) == (0, 1, 8, 0)


def test_steps_replace_epochs():
    args, _ = train.parse(["--steps", "7"])

    assert args.steps == 7
    assert args.epochs is None


# ---- the schedule


def test_the_learning_rate_rises_and_falls():
    """Four steps of warm-up, and then half a cosine to the twelfth."""
    rate = [8 * train.learning_rate_factor(step, 4, 12) for step in range(13)]

    assert rate[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]  # a quarter more each step, up to the peak
    assert rate[8] == pytest.approx(4.0)  # half way down
    assert rate[10] == pytest.approx(4 * (1 - 0.5**0.5))
    assert rate[12] == pytest.approx(0.0)


def test_without_warm_up_the_learning_rate_starts_at_its_peak():
    assert train.learning_rate_factor(0, 0, 12) == 1.0


# Options, and the steps in all, of warm-up, and between rows, validations and saves, for 70 pairs,
# of which an epoch makes four batches of 16.
SCHEDULES = {
    "a short run": ("--epochs=2.5", (10, 1, 1, 4, 10)),
    "part of an epoch": ("--epochs=0.1", (1, 0, 1, 1, 1)),
    "a middling run": ("--steps=1000", (1000, 100, 20, 334, 1000)),
    "a long run": ("--steps=50000", (50_000, 1000, 20, 2000, 50_000)),
    "its own": (
        "--steps=9 --warmup_steps=0 --log_every=3 --eval_every=4 --save_every=5",
        (9, 0, 3, 4, 5),
    ),
}


@pytest.mark.parametrize("options, expected", SCHEDULES.values(), ids=SCHEDULES)
def test_the_schedule_follows_the_length_of_the_run(options, expected):
    args = train.make_parser().parse_args(["--batch_size=16", *options.split()])

    assert train.make_schedule(args, 70) == expected


@pytest.mark.parametrize("steps", [3, 10, 1800, 2001, 12_345, 100_000])
def test_there_are_at_least_three_validations_and_no_two_are_close(steps):
    args = train.make_parser().parse_args(["--steps", str(steps)])

    distance = train.make_schedule(args, 70).eval_every

    validated = {*range(distance, steps, distance), steps}
    assert len(validated) >= 3
    last_distance = (steps - 1) % distance + 1
    assert last_distance > distance / 3


# ---- the device

CAPABILITIES = {  # of a GPU: its dtype, and whether it can run what torch.compile makes
    "Pascal": ((6, 1), "float16", False),
    "Volta": ((7, 0), "float16", True),
    "Turing": ((7, 5), "float16", True),
    "Ampere": ((8, 0), "bfloat16", True),
    "Hopper": ((9, 0), "bfloat16", True),
}


@pytest.mark.parametrize("capability, dtype, _", CAPABILITIES.values(), ids=CAPABILITIES)
def test_the_dtype_of_a_gpu_is_the_fastest_that_it_has_units_for(monkeypatch, capability, dtype, _):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    assert cli.pick_dtype(torch.device("cuda", 0)) == dtype


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_the_dtype_without_units_for_another_is_float32(monkeypatch, device):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)

    assert cli.pick_dtype(torch.device(device)) == "float32"


@pytest.mark.parametrize("capability, _, compiles", CAPABILITIES.values(), ids=CAPABILITIES)
def test_a_gpu_compiles_by_default_if_it_can(monkeypatch, capability, _, compiles):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    args = train.make_parser().parse_args([])

    assert train.wants_compile(args, torch.device("cuda", 0)) == compiles


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_other_devices_do_not_compile_by_default(device):
    args = train.make_parser().parse_args([])

    assert not train.wants_compile(args, torch.device(device))


@pytest.mark.parametrize("option, compiles", [("--compile", True), ("--no-compile", False)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_option_decides_for_any_device(monkeypatch, option, compiles, device):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    args = train.make_parser().parse_args([option])

    assert train.wants_compile(args, torch.device(device)) == compiles


def test_without_a_compiler_the_message_names_the_way_out(
    smallest, shards, capsys, tmp_path, monkeypatch
):
    from torch._inductor import config  # not at the top, because its import takes seconds

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # holds no result yet
    options = short_run(shards, tmp_path / "out", "--compile")
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        message = error_of(capsys, train.main, *options)

    assert "--no-compile" in message
