"""Test that two processes of one run do what one process does.

The environment says that torchrun has started them. test_step.py compares the gradients."""

import shutil

import pytest
import torch
from children import finish
from material import cases, checkpoint_of, rows_of, short_run

import train


def test_two_processes_do_what_one_does(children, shards, tmp_path, device_of_two):
    """Weights, counts and losses are the same. A bad sample is replaced in the process that loads
    it. The learning rate is low, because Adam amplifies the smallest difference."""
    pairs = ["--train_data", shards / "bad-0.tar", "--device", device_of_two]
    options = [*pairs, "--patch_dropout", 0.5, "--learning_rate", 1e-5, "--steps", 6]
    tolerance = 1e-5 if device_of_two == "cpu" else 1e-4
    train.main(short_run(shards, tmp_path / "one", *options))

    both = [short_run(shards, tmp_path / "two", *options)]
    first, second = children.train_two(both, both)

    code, printed = finish(first)
    other_code, other_printed = finish(second)
    assert (code, other_code) == (0, 0), printed
    assert "loss" in printed
    assert "loss" not in other_printed  # process 0 prints for both
    ours = checkpoint_of(tmp_path / "one")["model"]
    theirs = checkpoint_of(tmp_path / "two")["model"]
    torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=tolerance)
    rows, other_rows = (rows_of(tmp_path / name, "loss") for name in ("one", "two"))
    assert other_rows[-1] == pytest.approx(rows[-1], rel=tolerance)
    log = (tmp_path / "two" / "log.jsonl").read_text()
    assert len(log.splitlines()) == 1 + 3 + 3  # a header, losses, validations: each once


# case -> options of the first process, and of the second one
DIFFERENCES = {
    "other data": ("--out_dir {0}/new", "--out_dir {0}/new --train_data {shards}/train-0.tar"),
    "another last.pt": ("--resume {0}/run", "--resume {0}/older"),  # as without a shared disk
}


@cases("ours, theirs", DIFFERENCES)
def test_processes_that_would_train_apart_end(children, shards, whole_run, tmp_path, ours, theirs):
    for name in ("run", "older"):
        shutil.copytree(whole_run, tmp_path / name)
    last = checkpoint_of(tmp_path / "older")
    torch.save({**last, "step": 8}, tmp_path / "older" / "last.pt")
    pairs = f"--train_data {shards}/train-*.tar --steps 14 --device cpu"
    new = "--batch_size 16 --model tiny"
    commands = []
    for options in (ours, theirs):
        text = f"{pairs} {options}" if "--resume" in options else f"{pairs} {new} {options}"
        commands.append(text.format(tmp_path, shards=shards).split())

    first, second = children.train_two([commands[0]], [commands[1]])

    code, printed = finish(first)
    second.terminate()  # torchrun does so when one process has failed
    _, other_printed = finish(second)
    assert code == 2, printed + other_printed
    assert "processes" in printed
    assert "Traceback" not in printed + other_printed


def test_a_mistake_of_the_user_is_one_sentence(children, tmp_path):
    """There are no shards. The second process would make the same mistake, but misses the first one
    before."""
    options = short_run(tmp_path, tmp_path / "out")

    first, second = children.train_two([options], [options])

    code, printed = finish(first)
    second.terminate()  # torchrun does so when one process has failed
    _, other_printed = finish(second)
    assert code == 2
    [error] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert tmp_path.name in error
    assert "Traceback" not in printed
    # With torch 2.8 gloo prints "[Gloo] Rank 1 is connected to ...".
    assert [line for line in other_printed.splitlines() if not line.startswith("[Gloo]")] == []


def test_process_0_adds_no_trace_to_the_mistake_of_another(children, shards, tmp_path):
    """Only the second process misses its shards. The first one loses the connection to it."""
    out = tmp_path / "out"

    first, second = children.train_two([short_run(shards, out)], [short_run(tmp_path, out)])

    code, printed = finish(second)
    first.join(0.5)
    first.terminate()  # torchrun does so when one process has failed
    _, printed_by_first = finish(first)
    assert code == 2
    assert tmp_path.name in printed
    assert "Traceback" not in printed + printed_by_first
