"""A run: what it uses if no option says otherwise, what it tells while it goes on, and that its
folder is its own."""

import json
import multiprocessing
import re
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from material import COLOURS, TINY, coloured, error_of, make_model, run

import cli
import data
import superclip
import train
from cli import InputError

ROOT = Path(train.__file__).parent
PAUSE = 0.1  # seconds that a slow loader takes for a batch


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Options of a short run: four steps of 16 pairs, with a validation after each second one."""
    monkeypatch.setitem(superclip.PRESETS, "tiny", TINY)
    train_data = coloured(tmp_path / "train.tar", *16 * [*COLOURS])
    val_data = coloured(tmp_path / "val.tar", *2 * [*COLOURS])
    words = data.words_to_tiktoken(list(COLOURS))
    (tmp_path / "vocab.tiktoken").write_text(words)
    options = f"--train_data {train_data} --val_data {val_data} --out_dir {tmp_path}/out"
    options += " --model tiny --batch_size 16 --steps 4 --log_every 1 --eval_every 2"
    options += " --workers 0 --device cpu --dtype float32"
    return options.split()


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


def rows_of(log):
    """The header and the rows of a log, in order. A resumed run begins with an empty line."""
    return [json.loads(line) for line in log.read_text().splitlines() if line]


# ---- what it uses if no option says otherwise


def test_weight_decay_is_that_of_clip():
    args, _ = train.parse(["--train_data", "pairs.tar"])

    assert args.weight_decay == 0.2


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

    assert train.pick_dtype(torch.device("cuda", 0)) == dtype


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_the_dtype_without_units_for_another_is_float32(monkeypatch, device):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)

    assert train.pick_dtype(torch.device(device)) == "float32"


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


def test_without_a_compiler_the_message_names_the_way_out(flags, capsys, tmp_path, monkeypatch):
    from torch._inductor import config  # not at the top, because its import takes seconds

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # holds no result yet
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        message = error_of(capsys, train.main, *flags, "--compile")

    assert "--no-compile" in message


# ---- a step


def test_an_update_does_not_take_the_logit_scale_below_0():
    """exp(0) = 1: a lower scale would make all candidates alike. A step of Adam is as long as the
    learning rate."""
    model = make_model().train()
    optimizer = train.make_optimizer(model, 0.01, 0.01, 0.2)
    model.logit_scale.data.fill_(0.005)
    model.logit_scale.grad = torch.tensor(1.0)

    train.update(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), 1.0)

    assert model.logit_scale.item() == 0


# ---- what it tells


def seconds_of(row, steps=1):
    """How long the steps before a row have taken, by the speed that it tells."""
    return steps * 16 / row["images_per_second"]


def test_the_speed_is_that_of_the_clock(flags, make_slow, tmp_path):
    """A step cannot be shorter than the pause in it, nor all of them longer than the run."""
    make_slow()
    start = time.perf_counter()

    train.main(flags)

    whole = time.perf_counter() - start
    seconds = [seconds_of(row) for row in rows_of(tmp_path / "out" / "log.jsonl") if "loss" in row]
    assert len(seconds) == 4
    assert min(seconds) > 0.99 * PAUSE
    assert sum(seconds) < 1.01 * whole


def test_data_wait_is_the_share_of_the_time_that_goes_into_waiting(flags, make_slow, tmp_path):
    make_slow()

    train.main(flags)

    for row in rows_of(tmp_path / "out" / "log.jsonl"):
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

    rows = rows_of(tmp_path / "out" / "log.jsonl")
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


def test_the_header_names_the_commit(flags, tmp_path):
    train.main([*flags, "--steps", "1"])

    command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    header = rows_of(tmp_path / "out" / "log.jsonl")[0]["header"]
    assert header["commit"] == commit


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

    header, *rows = rows_of(tmp_path / "out" / "log.jsonl")
    (first, project, config), *logged = wandb.calls
    assert (first, project) == ("init", "scenes")
    assert json.loads(json.dumps(config)) == header["header"]
    assert logged == [("log", row, row["step"]) for row in rows]
    assert len([row for row in rows if "loss" in row]) == 4
    assert len([row for row in rows if "validation" in row]) == 2


# ---- its folder is its own


@pytest.fixture
def start():
    """start(function, *args) -> a process that has begun, forked from this one."""
    processes = []

    def start(function, *args):
        process = multiprocessing.get_context("fork").Process(target=function, args=args)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def wait_for(condition, seconds=30):
    """Returns when the condition holds, or after so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def lock_and_wait(folder, locked):
    cli.lock_folder(folder)
    locked.set()
    time.sleep(60)


def test_a_locked_folder_is_free_when_the_process_that_locked_it_has_ended(start, tmp_path):
    locked = multiprocessing.Event()
    process = start(lock_and_wait, tmp_path, locked)
    assert locked.wait(30)

    with pytest.raises(InputError, match=tmp_path.name):
        cli.lock_folder(tmp_path, seconds=0.2)

    process.kill()
    process.join()
    cli.lock_folder(tmp_path, seconds=0)


def end_a_run_in(folder, last, locked, messages):
    """Be another run, which saves when someone waits for the folder, and ends."""
    cli.lock_folder(folder)
    locked.set()
    wait_for(lambda: "waiting" in messages.read_text(), seconds=10)
    (folder / "last.pt").write_bytes(last)


@pytest.fixture
def run_behind_another(start, flags, tmp_path):
    """run_behind_another(*options): start a run while another one is in its folder, which saves
    last.pt and leaves it. Returns the exit code, the messages, and last.pt as the other one left
    it."""

    def run_behind_another(*options):
        train.main([*flags, "--out_dir", str(tmp_path / "finished")])
        last = (tmp_path / "finished" / "last.pt").read_bytes()
        messages = tmp_path / "messages.txt"
        messages.touch()
        (tmp_path / "out").mkdir()
        locked = multiprocessing.Event()
        start(end_a_run_in, tmp_path / "out", last, locked, messages)
        assert locked.wait(30)
        with open(messages, "w", buffering=1) as file, redirect_stderr(file):
            code = run(train.main, *flags, *options)
        return code, messages.read_text(), last

    return run_behind_another


def test_a_resumed_run_waits_for_the_one_in_its_folder_and_goes_on_from_its_end(
    run_behind_another, tmp_path
):
    code, messages, last = run_behind_another("--resume")

    assert not code, messages
    assert (tmp_path / "out" / "last.pt").read_bytes() == last  # it had nothing left to do
    rows = rows_of(tmp_path / "out" / "log.jsonl")
    assert not [row for row in rows if "loss" in row]


def test_a_new_run_does_not_write_into_the_folder_of_another(run_behind_another, tmp_path):
    code, messages, last = run_behind_another()

    assert code == 2
    assert "--resume" in messages
    assert (tmp_path / "out" / "last.pt").read_bytes() == last
