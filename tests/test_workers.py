"""Loading processes: as many as can be used, ahead of the step, and none of them is left behind,
whatever happens to the run."""

import multiprocessing
import os
import resource
import select
import signal
import time

import pytest
import torch
from material import TOKENIZER, run, write_good_shard, write_tar

import data
from data import Pairs

CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than cores


@pytest.fixture
def new_children():
    """new_children() -> the processes that this one has started since the test began."""
    before = multiprocessing.active_children()
    return lambda: [child for child in multiprocessing.active_children() if child not in before]


@pytest.mark.parametrize(
    "workers, processes, expected",
    [(None, 1, 3), (None, 2, 1), (2, 1, 2), (999, 1, 5)],
    ids=["a core each", "shared by two processes", "as asked", "no more than batches"],
)
def test_an_evaluation_has_as_many_workers_as_it_can_use(
    monkeypatch, new_children, workers, processes, expected
):
    monkeypatch.setattr(data, "cores", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    batches = data.make_loader(range(10), workers, batch_size=2)

    assert next(batches).tolist() == [0, 1]
    assert len(new_children()) == expected
    assert len(list(batches)) == 4


class Watched(Pairs):
    """Pairs of which the last of the 16 waits until the first ones were handed out."""

    def __getitem__(self, item):
        if item[0] == 15:
            assert self.handed_out.wait(60), "the whole step was loaded first"
            self.loaded.set()
        return super().__getitem__(item)


def test_computing_begins_before_a_step_is_loaded_which_is_loaded_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SMALL", 1)
    pairs = Watched([write_good_shard(tmp_path / "0.tar", 16)], TOKENIZER, 16)
    pairs.handed_out = multiprocessing.Event()
    pairs.loaded = multiprocessing.Event()

    batches = data.load_batches(pairs, 16, slice(None), 4, 0, 1, 2, CPU)
    next(batches)
    pairs.handed_out.set()

    assert pairs.loaded.wait(60), "the rest of the step is not loaded before it is asked for"
    assert len(list(batches)) == 3


# ---- processes end with the one that has started them


def two_pools(tell):
    with data.process_pool(2) as pool:
        list(pool.map(abs, range(4)))
        tell()


def two_loading_processes(tell):
    for _ in data.make_loader(range(1000), 2, batch_size=1):
        tell()


@pytest.mark.parametrize("start", [two_pools, two_loading_processes])
def test_processes_end_with_their_parent_even_if_it_is_killed(start):
    started = FORK.Event()
    reader, writer = os.pipe()  # open as long as one of the processes lives

    def tell():
        started.set()
        time.sleep(600)

    parent = FORK.Process(target=start, args=(tell,))
    parent.start()
    os.close(writer)
    assert started.wait(60)
    parent.kill()

    ready, _, _ = select.select([reader], [], [], 60)
    assert ready and os.read(reader, 1) == b""
    os.close(reader)


def test_loading_processes_outlive_a_signal_to_the_whole_group(tmp_path, new_children):
    pairs = Pairs([write_good_shard(tmp_path / "0.tar", 16)], TOKENIZER, 16)
    batches = data.load_batches(pairs, 4, slice(None), 4, 0, 40, 2, CPU)
    for _ in range(2):  # one of each process, so that both have begun
        next(batches)

    for process in new_children():
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)

    assert len(list(batches)) == 38
    assert new_children() == []


def exit_code_of_process(function):
    """Runs a function in a process of its own. Returns its exit code, or None after a minute."""
    child = FORK.Process(target=function)
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    return code


def test_a_loader_that_cannot_start_ends_at_once():
    def start_with_few_files():
        few = len(os.listdir("/dev/fd")) + 25
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
        with pytest.raises(OSError, match="open files"):
            next(data.make_loader(range(100), 50, batch_size=1))

    assert exit_code_of_process(start_with_few_files) == 0


def test_a_program_ends_although_its_loader_is_not_done():
    def leave():
        global left
        left = data.make_loader(range(100), 2, batch_size=1)
        next(left)

    assert exit_code_of_process(leave) == 0


# ---- a loader that fails


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_only_end_the_run_with_a_sentence(tmp_path, capsys, new_children, workers):
    """A worker that is left over would hold up the end of the program for half a minute. (One that
    is killed is in test_failures.py.)"""
    members = []
    for i in range(120):
        members += [(f"{i}.jpg", b"x"), (f"{i}.txt", b"a")]
    pairs = Pairs([write_tar(tmp_path / "0.tar", members)], TOKENIZER, 16)

    code = run(lambda _: list(data.load_batches(pairs, 4, slice(None), 4, 0, 1, workers, CPU)))

    error = capsys.readouterr().err
    assert code == 2
    assert "0.tar" in error and error.count("\n") == 1
    assert new_children() == []
