"""What a run tells while it goes on: the rows of its log, its speed, the time that is left."""

import json
import re
import subprocess
import sys
import time

import pytest
import torch
from children import ROOT
from runs import all_rows, header_of, losses_of, short_run, steps_of, validations_of

import data
import eval as evaluation
import train
from cli import InputError

pytestmark = pytest.mark.usefixtures("smallest")

PAUSE = 0.1  # seconds that a slow loader takes for a batch


@pytest.fixture
def flags(shards, tmp_path):
    """Options of four steps, with a row for each, and a validation after each second one."""
    return short_run(shards, tmp_path, "--steps", 4, "--log_every", 1, "--eval_every", 2)


@pytest.fixture
def make_slow(monkeypatch):
    """make_slow(stop): each batch takes PAUSE seconds more, and after `stop` of them the run ends,
    with an InputError."""
    load_batches = data.load_batches

    def make_slow(stop=None):
        def load_slowly(*args, **options):
            for number, batch in enumerate(load_batches(*args, **options)):
                if number == stop:
                    raise InputError("enough")
                time.sleep(PAUSE)
                yield batch

        monkeypatch.setattr(data, "load_batches", load_slowly)

    return make_slow


# ---- the rows


def test_a_row_is_logged_where_it_is_due(whole_run):
    """Every second step, and every fourth, which is validated."""
    assert steps_of(losses_of(whole_run)) == [2, 4, 6, 8, 10, 12]
    assert steps_of(validations_of(whole_run)) == [4, 8, 12]


def test_a_row_holds_the_terms_and_their_weighted_sum(shards, tmp_path):
    train.main(short_run(shards, tmp_path, "--steps", 2, "--cls_weight", 0.5))

    row = losses_of(tmp_path)[-1]
    terms = row["contrastive_loss"] + 0.5 * row["classification_loss"]
    assert row["loss"] == pytest.approx(terms)


def test_a_row_holds_the_samples_and_the_rate_of_its_step(whole_run):
    for row in losses_of(whole_run):
        rate = 1e-3 * train.learning_rate_factor(row["step"] - 1, 1, 12)  # one step of warm-up
        assert row["learning_rate"] == pytest.approx(rate)
        assert row["samples"] == 16 * row["step"]


def test_the_header_says_what_the_run_is(whole_run):
    header = header_of(whole_run)

    model, _, _ = evaluation.load(whole_run / "last.pt")
    assert header["parameters"] == sum(p.numel() for p in model.parameters())
    assert header["pairs"] == 70
    assert header["vocabulary"] == model.config.vocab_size
    assert header["steps"] == 12
    assert header["arguments"]["learning_rate"] == 1e-3
    assert header["config"] == json.loads(json.dumps(vars(model.config)))


def test_the_header_names_the_commit(flags, tmp_path):
    train.main([*flags, "--steps", "1"])

    command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    assert header_of(tmp_path)["commit"] == commit


def test_a_run_needs_no_git(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    train.main([*flags, "--steps", "1"])

    assert header_of(tmp_path)["commit"] == ""


# ---- the clock


def seconds_of(row, steps=1):
    """How long the steps before a row have taken, by the speed that it tells."""
    return steps * 16 / row["images_per_second"]


def test_the_speed_is_that_of_the_clock(flags, make_slow, tmp_path):
    """A step cannot be shorter than the pause in it, nor all of them longer than the run."""
    make_slow()
    start = time.perf_counter()

    train.main(flags)

    whole = time.perf_counter() - start
    seconds = [seconds_of(row) for row in all_rows(tmp_path) if "loss" in row]
    assert len(seconds) == 4
    assert min(seconds) > 0.99 * PAUSE
    assert sum(seconds) < 1.01 * whole


def test_data_wait_is_the_share_of_the_time_that_goes_into_waiting(flags, make_slow, tmp_path):
    make_slow()

    train.main(flags)

    for row in all_rows(tmp_path):
        if "loss" in row:
            assert row["data_wait"] * seconds_of(row) > 0.99 * PAUSE
            assert row["data_wait"] <= 1


def test_data_wait_is_near_0_if_batches_are_there_before_they_are_needed(
    flags, tmp_path, monkeypatch
):
    load_batches = data.load_batches

    def load_all_at_once(*args, **options):
        return iter(list(load_batches(*args, **options)))

    monkeypatch.setattr(data, "load_batches", load_all_at_once)

    train.main(flags)

    rows = all_rows(tmp_path)
    waits = [row["data_wait"] for row in rows if "loss" in row]
    assert min(waits) < 0.1


def test_the_time_left_is_that_of_the_steps_to_come(flags, make_slow, capsys):
    """3,999 steps are left after the first one, and each takes at least the pause."""
    make_slow(stop=3)
    start = time.perf_counter()

    with pytest.raises(InputError, match="enough"):
        train.main([*flags, "--steps", "4000", "--eval_every", "4000"])

    whole = time.perf_counter() - start
    times = re.findall(r"(\d+):(\d\d):(\d\d) left", capsys.readouterr().out)
    assert len(times) == 3
    for step, (hours, minutes, seconds) in enumerate(times, start=1):
        left = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
        assert 0.99 * PAUSE <= left / (4000 - step) <= whole


# ---- a run that has become slow

# speeds of the rows, share of the last one's time that is waiting, and the option that is named
SPEEDS = {
    "steady": ([90, 80, 90, 85], 0.1, None),
    "three slow rows": ([90, 20, 20, 20], 0.1, "OMP_NUM_THREADS"),
    "three slow rows that wait for data": ([90, 20, 20, 20], 0.9, "--workers"),
    "two slow rows": ([90, 20, 20, 90], 0.1, None),
    "slow now and then": ([90, 20, 90, 20, 90, 20], 0.1, None),
    "slow from the start": ([20, 20, 20, 20], 0.1, None),
}


def show_rows(log, speeds, data_wait):
    for step, speed in enumerate(speeds, start=1):
        row = {"step": step, "images_per_second": speed, "data_wait": data_wait}
        log.show(row)


@pytest.fixture
def log(tmp_path):
    args = train.make_parser().parse_args(["--out_dir", str(tmp_path)])
    return train.Log(args, {"steps": 100, "batch_size": 16}, 0)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("speeds, data_wait, option", SPEEDS.values(), ids=SPEEDS)
def test_three_slow_rows_are_explained(log, two_threads, speeds, data_wait, option, capsys):
    show_rows(log, speeds, data_wait)

    printed = capsys.readouterr().out
    named = [name for name in ("OMP_NUM_THREADS", "--workers") if name in printed]
    assert named == [option] * (option is not None)


def test_slowness_is_explained_once(log, two_threads, capsys):
    show_rows(log, [90, *[20] * 10, 90, *[20] * 10], 0.1)

    assert capsys.readouterr().out.count("OMP_NUM_THREADS") == 1


def test_one_thread_is_not_advised_to_one_thread(log, capsys):
    show_rows(log, [90, 20, 20, 20], 0.1)

    assert "OMP_NUM_THREADS" not in capsys.readouterr().out


# ---- Weights & Biases

WANDB = """
calls = []

def init(project, config):
    calls.append(("init", project, config))
    return __import__(__name__)

def log(row, step):
    calls.append(("log", row, step))

def finish():
    pass
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module of this name that keeps what it is called with."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    del sys.modules["wandb"]


def test_wandb_gets_the_project_the_header_and_the_rows_of_the_log(flags, wandb, tmp_path):
    train.main([*flags, "--wandb", "scenes"])

    header, *rows = all_rows(tmp_path)
    (first, project, config), *logged = wandb.calls
    assert (first, project) == ("init", "scenes")
    assert json.loads(json.dumps(config)) == header["header"]
    assert logged == [("log", row, row["step"]) for row in rows]
    assert len([row for row in rows if "loss" in row]) == 4
    assert len([row for row in rows if "validation" in row]) == 2
