"""Failures around a run: the last whole step is saved, or else what was there before stays, and a
sentence says why the run has ended."""

import pytest
from children import before, fail, finish, in_step, kill_a_loader, remove, with_files_up_to
from material import error_of, write_shard
from runs import (
    checkpoint_of,
    losses_of,
    sample,
    short_run,
    write_old_log,
    write_vocabulary,
)

import train

pytestmark = pytest.mark.usefixtures("smallest")


def test_a_killed_loading_process_ends_the_run_after_its_last_whole_step(
    children, shards, tmp_path
):
    options = short_run(shards, tmp_path / "out", "--workers", 1, "--steps", 100)
    options += "--save_every 100 --eval_every 100 --log_every 1".split()

    code, printed = finish(children.train(options, in_step(5, kill_a_loader)))

    assert code == 2
    assert "--workers" in printed
    assert "Traceback" not in printed
    saved = checkpoint_of(tmp_path / "out")
    assert saved["step"] >= 5
    assert saved["step"] == losses_of(tmp_path / "out")[-1]["step"]
    assert saved["model"]["num_captions"] == 16 * saved["step"]


def test_a_run_that_fails_in_its_first_step_cannot_be_resumed_and_does_not_say_so(
    children, shards, tmp_path
):
    code, printed = finish(children.train(short_run(shards, tmp_path / "out"), in_step(1, fail)))

    assert code == 2
    assert "--resume" not in printed
    assert not list(tmp_path.glob("out/*.pt"))


def test_a_fine_tuning_that_fails_in_its_first_validation_can_be_resumed_and_says_so(
    children, shards, whole_run, tmp_path
):
    options = short_run(shards, tmp_path / "out", "--init_from", whole_run / "best.pt")

    code, printed = finish(children.train(options, before("eval.retrieval", 1, fail)))

    assert code == 2
    assert "--resume" in printed
    assert checkpoint_of(tmp_path / "out")["step"] == 0


def test_a_failing_validation_ends_the_run_after_its_last_whole_step(
    children, shards, folders, tmp_path
):
    options = short_run(shards, tmp_path / "out", "--zeroshot_data", folders)

    code, printed = finish(children.train(options, in_step(2, remove(folders))))

    assert code == 2
    assert "Traceback" not in printed
    assert str(folders) in printed
    assert checkpoint_of(tmp_path / "out")["step"] == 4


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on(children, shards, tmp_path):
    out = tmp_path / "out"
    train.main(short_run(shards, out, "--steps", 3))
    before = (out / "last.pt").read_bytes()

    options = short_run(shards, out, "--resume")
    code, printed = finish(children.train(options, with_files_up_to(100_000)))

    assert code == 2
    assert "last.pt" in printed
    assert "Traceback" not in printed
    assert (out / "last.pt").read_bytes() == before
    assert not list(out.glob(".*.tmp"))
    assert losses_of(out)[-1]["step"] == 12


def test_a_log_that_cannot_grow_does_not_end_the_run(children, shards, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write_old_log(out)
    with open(out / "log.jsonl", "a") as log:
        log.write(10_000_000 * " ")

    code, printed = finish(children.train(short_run(shards, out), with_files_up_to(10_000_000)))

    assert code == 0, printed
    assert "log" in printed
    assert checkpoint_of(out)["step"] == 12


@pytest.mark.parametrize("log_every", [1, 100])
def test_weights_that_are_not_finite_are_not_saved(shards, tmp_path, capsys, log_every):
    train.main(short_run(shards, tmp_path, "--steps", 3))
    before = (tmp_path / "last.pt").read_bytes()

    options = short_run(shards, tmp_path, "--resume", "--learning_rate", 1e30)
    message = error_of(capsys, train.main, *options, "--log_every", log_every)

    assert "--learning_rate" in message
    assert (tmp_path / "last.pt").read_bytes() == before


def test_bad_samples_are_replaced_and_counted(shards, tmp_path):
    """Two epochs of 40 pairs, of which four are bad, and may be replaced by another bad one."""
    out = tmp_path / "out"

    train.main(short_run(shards, out, "--train_data", shards / "bad-0.tar", "--steps", 4))

    assert 4 <= losses_of(out)[-1]["bad_samples"] <= 12
    assert checkpoint_of(out)["model"]["num_captions"] == 4 * 16


def test_a_run_with_more_bad_samples_than_good_ones_ends(tmp_path, capsys):
    worse = [{**sample(i), "png": b"x"} for i in range(24)]
    good = [sample(i) for i in range(16)]
    shard = write_shard(tmp_path / "worse.tar", worse + good)
    write_vocabulary(tmp_path)

    options = f"--train_data {shard} --val_data none --out_dir {tmp_path}/out --model tiny"
    options += " --batch_size 16 --steps 12 --log_every 1 --workers 0 --device cpu"
    message = error_of(capsys, train.main, *options.split())

    assert "half" in message
