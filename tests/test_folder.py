"""A folder is for one run at a time: it is locked before anything in it is read, others wait a
little, and no run writes over what it finds there."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from contextlib import redirect_stderr

import pytest
from material import error_of, run
from runs import all_rows, checkpoint_of, header_of, losses_of, short_run, write_old_log

import cli
import train
from cli import InputError

pytestmark = pytest.mark.usefixtures("smallest")

# ---- the lock of a folder


@pytest.fixture
def fork():
    """fork(function, *args): a process that does this. It is ended after the test."""
    processes = []

    def fork(function, *args):
        process = multiprocessing.get_context("fork").Process(target=function, args=args)
        process.start()
        processes.append(process)
        return process

    yield fork
    cli.unlock_folders()
    for process in processes:
        process.kill()
        process.join()


def lock_and_wait(folder, locked):
    cli.lock_folder(folder)
    locked.set()
    time.sleep(60)


def lock_fork_and_end(folder, child):
    """Lock a folder, and end while a process lives on that was forked meanwhile."""
    cli.lock_folder(folder)
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
    else:
        child.value = pid
    os._exit(0)


def test_a_locked_folder_is_waited_for_and_then_refused(fork, tmp_path, capsys):
    locked = multiprocessing.Event()
    fork(lock_and_wait, tmp_path, locked)
    assert locked.wait(30)

    with pytest.raises(InputError, match=tmp_path.name):
        cli.lock_folder(tmp_path, seconds=0.2)

    assert capsys.readouterr().err.count("waiting") == 1


def test_a_killed_process_leaves_the_folder_unlocked(fork, tmp_path):
    locked = multiprocessing.Event()
    process = fork(lock_and_wait, tmp_path, locked)
    assert locked.wait(30)

    process.kill()
    process.join()

    assert cli.lock_folder(tmp_path, seconds=0)


def test_what_a_process_has_started_does_not_hold_its_lock(fork, tmp_path):
    """Loading processes may outlive a killed run for a while."""
    child = multiprocessing.Value("i")
    process = fork(lock_fork_and_end, tmp_path, child)
    process.join()

    is_locked = cli.lock_folder(tmp_path, seconds=0)

    os.kill(child.value, signal.SIGKILL)  # it was alive
    assert is_locked


NO_LOCKS = ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EACCES"]


@pytest.fixture
def fail_to_lock(monkeypatch):
    """fail_to_lock(name): each lock fails with the error of this name. (This machine has locks.)"""

    def fail_to_lock(name):
        def lockf(file, operation):
            raise OSError(getattr(errno, name), "no lock")

        monkeypatch.setattr(fcntl, "lockf", lockf)

    return fail_to_lock


@pytest.mark.parametrize("name", NO_LOCKS)
def test_a_file_system_without_locks_gets_a_warning(fail_to_lock, tmp_path, capsys, name):
    fail_to_lock(name)

    is_locked = cli.lock_folder(tmp_path)

    assert not is_locked
    assert tmp_path.name in capsys.readouterr().err


def test_a_run_goes_on_without_locks(fail_to_lock, shards, tmp_path):
    fail_to_lock("ENOSYS")

    train.main(short_run(shards, tmp_path, "--steps", 1))

    assert checkpoint_of(tmp_path)["step"] == 1


def test_a_broken_disk_is_not_taken_for_one_without_locks(fail_to_lock, tmp_path):
    fail_to_lock("EIO")

    with pytest.raises(OSError):
        cli.lock_folder(tmp_path)


# ---- a run in a folder that another one holds


def end_a_run_in(folder, last, locked, messages):
    """Be another run, which saves when someone waits for the folder, and ends."""
    cli.lock_folder(folder)
    locked.set()
    while "waiting" not in messages.read_text():
        time.sleep(0.01)
    (folder / "last.pt").write_bytes(last)


@pytest.fixture
def run_behind_another(fork, shards, whole_run, tmp_path):
    """run_behind_another(*options): start a run while another one is in its folder, which saves
    last.pt and leaves it. Returns the exit code, and the messages."""

    def run_behind_another(*options):
        out = tmp_path / "out"
        out.mkdir()
        messages = tmp_path / "messages.txt"
        messages.touch()
        locked = multiprocessing.Event()
        fork(end_a_run_in, out, (whole_run / "last.pt").read_bytes(), locked, messages)
        assert locked.wait(30)
        with open(messages, "w", buffering=1) as file, redirect_stderr(file):
            code = run(train.main, *short_run(shards, out, *options))
        return code, messages.read_text()

    return run_behind_another


def test_a_resumed_run_waits_for_the_one_in_its_folder_and_goes_on_from_its_end(
    run_behind_another, whole_run, tmp_path
):
    code, messages = run_behind_another("--resume")

    assert not code, messages
    assert (tmp_path / "out" / "last.pt").read_bytes() == (whole_run / "last.pt").read_bytes()
    assert losses_of(tmp_path / "out") == []  # nothing was left to do


def test_a_new_run_does_not_write_into_the_folder_of_another(
    run_behind_another, whole_run, tmp_path
):
    code, messages = run_behind_another()

    assert code == 2
    assert "--resume" in messages
    assert (tmp_path / "out" / "last.pt").read_bytes() == (whole_run / "last.pt").read_bytes()


# ---- what lies in the folder


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_new_run_is_refused_where_one_has_been(whole_run, shards, tmp_path, capsys, name):
    shutil.copy(whole_run / name, tmp_path)
    before = (tmp_path / name).read_bytes()

    message = error_of(capsys, train.main, *short_run(shards, tmp_path))

    assert "--out_dir" in message
    assert [path.name for path in tmp_path.glob("*.pt")] == [name]
    assert (tmp_path / name).read_bytes() == before


def test_what_a_kill_has_left_is_mended(copied_run, shards):
    """A file that was being written goes, and the next line of the log begins a new line."""
    (copied_run / ".last.pt.1.tmp").touch()
    with open(copied_run / "log.jsonl", "a") as log:
        log.write('{"step": 13, "lo')

    train.main(short_run(shards, copied_run, "--resume", "--steps", 14))

    assert not (copied_run / ".last.pt.1.tmp").exists()
    lines = (copied_run / "log.jsonl").read_text().splitlines()
    cut = lines.index('{"step": 13, "lo')
    assert json.loads(lines[cut + 1])["step"] == 12
    assert losses_of(copied_run)[-1]["step"] == 14


def test_a_log_that_is_there_is_kept(shards, tmp_path):
    """Somebody may have deleted the checkpoints, which are large, and kept the log."""
    write_old_log(tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()

    train.main(short_run(shards, tmp_path, "--steps", 1))

    assert (tmp_path / "log.jsonl").read_bytes().startswith(before)
    headers = [row for row in all_rows(tmp_path) if "header" in row]
    assert len(headers) == 2
    assert headers[1]["header"]["steps"] == 1


def test_a_log_is_kept_even_if_the_run_does_not_start(shards, tmp_path, capsys):
    write_old_log(tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()

    error_of(capsys, train.main, *short_run(shards, tmp_path, "--batch_size", 1000))

    assert (tmp_path / "log.jsonl").read_bytes() == before


FOREIGN = {
    "of another program": b'{"other tool": 1}\n{"other tool": 2}\n',
    "a text": b"step 1\n",
    "no text at all": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_log_that_is_not_ours_is_refused(shards, tmp_path, capsys, content):
    (tmp_path / "log.jsonl").write_bytes(content)

    message = error_of(capsys, train.main, *short_run(shards, tmp_path))

    assert "log.jsonl" in message
    assert (tmp_path / "log.jsonl").read_bytes() == content
    assert not list(tmp_path.glob("*.pt"))


def test_an_empty_log_is_no_other_programs(shards, tmp_path):
    (tmp_path / "log.jsonl").touch()

    train.main(short_run(shards, tmp_path, "--steps", 1))

    assert header_of(tmp_path)["steps"] == 1
    assert checkpoint_of(tmp_path)["step"] == 1
