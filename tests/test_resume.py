"""Test --resume. Whatever has ended a run, --resume goes on from its last save, and ends with the
bits of a run that nothing has interrupted. A run in a folder is never overwritten by another."""

import json
import re
import shutil
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from children import before, finish, hook, in_step, killed
from material import assert_ends_like, cases, checkpoint_of, error_of, rows_of, short_run

import eval as evaluation
import superclip
import train
from common.run import read_log


@pytest.fixture
def copied_run(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "copied")


# ---- killed

# Case -> the moment of a kill, and the step from which the run then goes on. os.replace gives each
# file its name. Its calls are for last.pt and best.pt in turn, at steps 4, 8 and 12.
MOMENTS = {
    "before anything is saved": (in_step(3, killed), 0),
    "as last.pt is written": (before("os.replace", 3, killed), 4),
    "as best.pt is written": (before("os.replace", 4, killed), 8),
    "after best.pt is written": (in_step(9, killed), 8),
    "in the last validation": (before("eval.retrieval", 4, killed), 12),
}


@cases("moment, step", MOMENTS)
def test_a_killed_run_ends_as_if_it_had_not_been(
    children, shards, whole_run, tmp_path, capsys, moment, step
):
    out = tmp_path / "out"
    options = short_run(shards, out)
    code, _ = finish(children.start("train", options, moment))
    assert code == -signal.SIGKILL
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 6, "lo')  # a row that was cut

    train.main([*options, "--resume"])

    assert_ends_like(out, whole_run)
    assert f"from step {step}\n" in capsys.readouterr().out
    assert not list(out.glob(".*.tmp"))
    assert (out / "log.jsonl").read_text().count('\n{"header"') == 1  # not behind the cut row


def test_ctrl_c_ends_a_run_with_one_line(children, shards, whole_run, tmp_path):
    """Its loading process ends, too. Otherwise the process that waits for it would hang."""
    options = short_run(shards, tmp_path, "--workers", 1)
    interrupted = in_step(6, partial(signal.raise_signal, signal.SIGINT))

    code, printed = finish(children.start("train", options, interrupted))

    assert code == 130, printed
    assert printed.count("stopped by Ctrl-C") == 1
    assert "Traceback" not in printed
    train.main([*options, "--resume"])
    assert_ends_like(tmp_path, whole_run)


# If you add an option, add a line here.
OPTIONS = {
    "CLIP's loss": "",
    "SigLIP's loss, other captions, fewer patches": "--loss sigmoid --captions json.captions txt "
    "--label_captions txt --patch_dropout 0.5",
}


@cases("options", OPTIONS)
def test_options_of_a_fork_that_draws_from_torch_resume_to_the_bit(
    shards, tmp_path, monkeypatch, options
):
    """Here the towers have dropout. The second run is stopped in its tenth step. A loading process
    draws the pairs, so that their seeds do not reach the generator of the steps."""
    options = [*options.split(), "--workers", 1]
    forward = superclip.MLP.forward

    def with_dropout(mlp, x):
        return F.dropout(forward(mlp, x), 0.1, mlp.training)

    monkeypatch.setattr(superclip.MLP, "forward", with_dropout)
    monkeypatch.setattr(superclip.SuperCLIP, "forward", superclip.SuperCLIP.forward)  # to restore
    train.main(short_run(shards, tmp_path / "whole", *options))
    hook("superclip.SuperCLIP.forward", 10, partial(signal.raise_signal, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train.main(short_run(shards, tmp_path / "out", *options))

    train.main(short_run(shards, tmp_path / "out", *options, "--resume"))

    assert_ends_like(tmp_path / "out", tmp_path / "whole")


# ---- what --resume may change


def test_a_run_goes_on_with_another_length_rate_and_machine(
    copied_run, shards, tmp_path, capsys, device
):
    """A run goes on even if its shards and their vocabulary have moved. It says what differs."""
    before = checkpoint_of(copied_run)["model"]
    moved = shutil.copytree(shards, tmp_path / "moved")
    more = "--steps 16 --learning_rate 0 --micro_batch_size 4 --workers 1 --dtype bfloat16"

    train.main(short_run(moved, copied_run, "--resume", *more.split(), "--device", device))

    saved = checkpoint_of(copied_run)
    assert saved["step"] == 16
    assert saved["model"]["num_captions"] == 16 * 16
    assert torch.equal(saved["model"]["visual.proj"], before["visual.proj"])  # at a rate of 0
    printed = capsys.readouterr().out
    for change in ("steps: 12 -> 16", "learning_rate: 0.001 -> 0.0", "dtype: float32 -> bfloat16"):
        assert f"--{change}\n" in printed


def test_a_resumed_run_keeps_a_best_pt_that_it_cannot_beat(copied_run, shards, capsys):
    """The commands that the run prints at its end use best.pt. Each line of its log is JSON."""
    best = copied_run / "best.pt"
    last = copied_run / "last.pt"
    torch.save({**torch.load(last), "best_r1": 1.0}, last)
    content = best.read_bytes()

    train.main(short_run(shards, copied_run, "--resume", "--steps", 13))

    assert best.read_bytes() == content
    assert f"{best} --out words.png" in capsys.readouterr().out
    assert all(map(json.loads, open(copied_run / "log.jsonl")))


def test_a_due_validation_is_made_and_keeps_a_best_pt_that_was_written_after_it(
    copied_run, shards, monkeypatch
):
    """last.pt was saved before the validation of step 12, in which the run may have been killed.
    With other steps the run would not validate there. best.pt holds the score to beat, because
    last.pt is older. Scores of the longer run are lower here."""
    best = copied_run / "best.pt"
    last = copied_run / "last.pt"
    torch.save({**torch.load(last), "best_r1": 0.0}, last)
    content = best.read_bytes()
    lower = {"mean_r1": 0.01}
    score_pairs = evaluation.score_pairs
    monkeypatch.setattr(
        evaluation, "score_pairs", lambda *x, **options: score_pairs(*x, **options) | lower
    )

    train.main(short_run(shards, copied_run, "--resume", "--steps", 13, "--eval_every", 100))

    rows = {row["step"]: row["mean_r1"] for row in rows_of(copied_run, "zeroshot")}
    assert rows[12] == rows[13] == 0.01
    assert best.read_bytes() == content


OTHERS = """--steps 11, --batch_size 8, --seed 1, --label_captions json.captions, --loss sigmoid,
--train_data bad-0.tar, --val_data none, --val_captions json.captions, --vocab clip"""


@pytest.mark.parametrize("other", OTHERS.replace("\n", " ").split(", "))
def test_what_defines_a_run_cannot_be_changed(copied_run, shards, monkeypatch, capsys, other):
    monkeypatch.chdir(shards)
    option, value = other.split()
    before = (copied_run / "last.pt").read_bytes()

    options = short_run(shards, copied_run, "--resume", option, value)
    message = error_of(capsys, train.main, *options)

    assert re.search(rf"{option}\b", message)  # not --vocab_size
    assert (copied_run / "last.pt").read_bytes() == before


def test_an_option_of_a_fork_cannot_be_changed(copied_run, shards, monkeypatch, capsys):
    """So is every option that MAY_CHANGE does not name. The message has both values. At its default
    an older run goes on, also if the optimizer's groups have an entry that those in last.pt lack.
    What the optimizer itself has put there stays."""
    parser = train.make_parser()
    parser.add_argument("--my_weight", type=float, default=0.2)
    monkeypatch.setattr(train, "make_parser", lambda: parser)
    options = short_run(shards, copied_run, "--resume", "--steps", 13)

    message = error_of(capsys, train.main, *options, "--my_weight", 0.5)

    assert "--my_weight from 0.2 to 0.5" in message
    last = torch.load(copied_run / "last.pt")
    for group in last["optimizer"]["param_groups"]:
        del group["eps"]
        group["lr_of_an_average"] = 7
    torch.save(last, copied_run / "last.pt")
    train.main(options)
    last = checkpoint_of(copied_run)
    assert last["step"] == 13
    assert {group["lr_of_an_average"] for group in last["optimizer"]["param_groups"]} == {7}


# ---- the log

HEADER = {"header": {"steps": 8}, "step": 0}
RESUMED = {"header": {"steps": 9}, "step": 4}
ROWS = [{"step": 4, "loss": 1.5}, {"step": 4, "zeroshot": {}}]  # the validation was due
LATER = {"step": 6, "loss": 1.2}


def test_of_the_rows_of_a_resumed_run_those_that_are_repeated_count(tmp_path):
    """A kill has cut a row, and a disk has damaged another one."""
    rows = [HEADER, *ROWS, {**LATER, "loss": 1.3}, RESUMED, ROWS[1], LATER]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 8, "lo'
    (tmp_path / "log.jsonl").write_bytes(b"\xff\n" + text.encode())

    header, found = read_log(tmp_path / "log.jsonl")

    assert header == {"steps": 9}
    assert found == [*ROWS, LATER]


# ---- the folder

FILES = {  # case -> a name in the folder, the file of a run that has this name, --resume or nothing
    "a run, not resumed": ("last.pt", "last.pt", []),
    "best.pt, not resumed": ("best.pt", "best.pt", []),
    "best.pt alone": ("best.pt", "best.pt", ["--resume"]),
    "weights alone": ("last.pt", "best.pt", ["--resume"]),
    "a log alone, not resumed": ("log.jsonl", "log.jsonl", []),
}


@cases("name, source, resume", FILES)
def test_what_cannot_be_resumed_is_refused_and_kept(
    whole_run, shards, tmp_path, capsys, name, source, resume
):
    content = (whole_run / source).read_bytes()
    (tmp_path / name).write_bytes(content)

    message = error_of(capsys, train.main, *short_run(shards, tmp_path, *resume))

    assert str(tmp_path) in message
    assert (tmp_path / name).read_bytes() == content
