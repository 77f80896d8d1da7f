"""Nothing lost, nothing silently wrong: faults that a hostile user found once, and what must happen
instead. Faults of a single function are tested beside it, in the other files."""

# Fixtures are imported, and arguments look as if they hid them.
# ruff: noqa: F401, F811

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from material import error_of, result_of, run, write_shard
from test_train import (
    assert_same,
    copy,
    die,
    finish,
    flags,
    last,
    log_of,
    rows,
    sample,
    shards,
    small_preset_and_own_signals,
    start,
    whole,
    without_model,
)

import data
import eval as evaluation
import train
from scripts import pack, show, vocab, words
from superclip import InputError, cli

FULL = OSError(errno.ENOSPC, "No space left on device")
IMAGES = evaluation.ShardImages
EVAL = ["--workers", 0, "--device", "cpu"]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def assert_one_sentence(output, *texts):
    """What a command has printed names its fault once, and shows no trace."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(text in errors[0] for text in texts), output
    for trace in ("Traceback", "Error:", "Alarm clock", "terminate called"):
        assert trace not in output


def sabotaged(how, main, argv):
    """A command whose world fails in one of several ways; see the tests."""
    cli(lambda _: ([SABOTAGE[name]() for name in how.split()], main(list(map(str, argv))))[1])


# ---- loading processes that cannot load


def no_shared_memory(*_):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left")


def deadly(function):
    """The function, which kills a loading process."""

    def dying(*args, **options):
        if torch.utils.data.get_worker_info():
            die()
        return function(*args, **options)

    return dying


SABOTAGE = {
    # A batch is collated into shared memory, or moved there on its way out of the worker.
    "collate": lambda: setattr(torch.UntypedStorage, "_new_using_fd_cpu", no_shared_memory),
    "send": lambda: setattr(torch.UntypedStorage, "_share_fd_cpu_", no_shared_memory),
    "kill": lambda: setattr(data, "load_image", deadly(data.load_image)),
    "validation": lambda: setattr(IMAGES, "__getitem__", deadly(IMAGES.__getitem__)),
}


@pytest.mark.parametrize(
    "command, how",
    [("train", how) for how in ("collate", "send", "validation")]
    + [("eval", how) for how in ("send", "kill")],
)
def test_a_loading_process_without_memory_ends_the_command_in_a_sentence(
    command, how, whole, shards, start, tmp_path
):
    argv = flags(shards, tmp_path / "out", "--workers", 2)
    if command == "eval":
        argv = ["retrieval", "--checkpoint", whole / "last.pt", "--data", shards / "val-0.tar"]
    main = train.main if command == "train" else evaluation.main
    process = start(sabotaged, tmp_path / "output.txt", how, main, argv)
    assert finish(process) == 2
    output = (tmp_path / "output.txt").read_text()
    assert_one_sentence(output, "--shm-size", "--workers 0")


# ---- checkpoints that cannot be written


def run_with_a_full_disk(argv, is_lost, signal_at=None):
    """A run in which some checkpoints cannot be written. Returns its exit code."""
    save, update, steps = torch.save, train.update, []

    def saving(content, file):
        if is_lost(content):
            raise FULL
        save(content, file)

    def updating(*args):
        steps.append(1)
        if len(steps) == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    with mock.patch("torch.save", saving), mock.patch("train.update", updating):
        return run(train.main, *argv)


@pytest.mark.parametrize("signal_at", [None, 4])
def test_a_run_that_cannot_save_its_last_checkpoint_says_so(shards, tmp_path, capsys, signal_at):
    argv = flags(shards, tmp_path, "--save_every", 100)
    assert run_with_a_full_disk(argv, lambda c: "optimizer" in c, signal_at) == 2
    printed = capsys.readouterr()
    assert_one_sentence(printed.err, f"{tmp_path}/last.pt", "could not be written")
    assert "The model is in" not in printed.out and "--resume" not in printed.out + printed.err
    assert not (tmp_path / "last.pt").exists()


def test_a_best_model_that_was_not_written_is_not_promised(shards, tmp_path, capsys):
    assert not run_with_a_full_disk(flags(shards, tmp_path), lambda c: "optimizer" not in c)
    assert f"The model is in {tmp_path}/last.pt" in capsys.readouterr().out
    assert not (tmp_path / "best.pt").exists()


# ---- a signal during a validation


def stopped_in_validation(argv, number):
    """In the n-th validation SIGTERM comes to the run and its workers. Without it, the validation
    would take longer than the test waits."""
    os.setpgid(0, 0)
    batches, count = evaluation.batches, []

    def slow(dataset, *args):
        for batch in batches(dataset, *args):
            count.append(args[-1] == "encoding")
            if sum(count) == number and args[-1] == "encoding":
                time.sleep(0.3)  # until all workers have started
                # not from the parent of the workers
                kill = ["kill", "-TERM", "--", f"-{os.getpgrp()}"]
                subprocess.run(kill, start_new_session=True)
                time.sleep(100)
            yield batch

    evaluation.batches = slow
    cli(lambda _: train.main(argv))


@pytest.mark.parametrize("number", [2, 3])
def test_a_signal_abandons_a_validation_and_loses_no_step(
    whole, shards, start, tmp_path, capsys, number
):
    out, output = tmp_path / "out", tmp_path / "output.txt"
    argv = flags(shards, out, "--workers", 2, "--save_every", 100)
    assert finish(start(stopped_in_validation, output, argv, number)) == 0
    assert last(out)["step"] == 4 * number
    assert "Traceback" not in output.read_text() and "Alarm" not in output.read_text()
    hint = f"stopped after step {4 * number}. To go on, give the same command with --resume"
    assert hint in output.read_text()
    train.main(["--out_dir", str(out), "--resume", "--workers", "0"])
    for name in ("model", "optimizer", "samples"):
        assert_same(last(out)[name], last(whole)[name])
    assert rows(out)[-1] == rows(whole)[-1]


def test_a_fine_tuning_that_was_stopped_as_it_scored_its_start_scores_it_later(
    whole, shards, start, tmp_path, capsys
):
    def argv(folder):
        init = "--init_from", whole / "last.pt", "--workers", 2
        return without_model(flags(shards, tmp_path / folder, *init))

    assert finish(start(stopped_in_validation, tmp_path / "output.txt", argv("out"), 1)) == 0
    assert not [*tmp_path.glob("out/*.pt")]
    for folder, more in (("out", ["--resume"]), ("undisturbed", [])):
        train.main([*argv(folder), *more])
    assert "a new run starts" in capsys.readouterr().out
    assert rows(tmp_path / "out") == rows(tmp_path / "undisturbed")
    for name in ("best.pt", "last.pt"):
        assert_same(*(last(tmp_path / f, name)["model"] for f in ("out", "undisturbed")))


# ---- several processes


def one_of_two(rank, port, how, argv):
    """What torchrun makes of a process, which may be the one that fails."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    update, gather, steps = train.update, data.Pairs.__getitem__, []

    def updating(*args):
        steps.append(1)
        if len(steps) == 4 and how == "killed" and rank == 1:
            die()
        if len(steps) == 4 and how == "raises" and rank == 1:
            raise InputError("the cat has eaten it")
        return update(*args)

    def reading(pairs, item):
        if item[0] > 64 and how == "worker" and rank == 1:
            raise InputError("the dog has eaten it")
        return gather(pairs, item)

    def slow(*_):  # a validation by one process, in which both get a signal
        others = [int(path.read_text()) for path in Path(argv[-1]).glob("*.pid")]
        for process in others:
            os.kill(process, signal.SIGTERM)
        time.sleep(100)

    train.update, data.Pairs.__getitem__ = updating, reading
    if how == "index":
        pool = data.ProcessPoolExecutor
        os.environ["XDG_CACHE_HOME"] = argv[-1]  # nothing is cached there yet

        def noted(workers):
            with open(Path(argv[-1]) / "indexed.txt", "a") as file:
                file.write(f"{workers} shards, {torch.distributed.is_initialized()}\n")
            time.sleep(0.5)  # long enough for the other process to want the same
            return pool(workers)

        data.ProcessPoolExecutor = noted
    if how == "signal":
        (Path(argv[-1]) / f"{rank}.pid").write_text(str(os.getpid()))
        evaluation.encode_texts = slow
    cli(lambda _: train.main(argv))


def run_two(start, folder, how, argv):
    """-> the exit codes of two processes, and what they have printed together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"{rank}.txt" for rank in (0, 1)]
    ranks = [start(one_of_two, outputs[rank], rank, port, how, argv) for rank in (0, 1)]
    return [finish(rank) for rank in ranks], "".join(path.read_text() for path in outputs)


@pytest.mark.parametrize(
    "how, sentence",
    [
        ("killed", "another process has ended"),
        ("raises", "cat has eaten"),
        ("worker", "dog has eaten"),
    ],
)
def test_if_one_process_fails_the_other_ends_too(shards, start, tmp_path, how, sentence):
    argv = flags(shards, tmp_path / "out", "--workers", 1)
    codes, output = run_two(start, tmp_path, how, argv)
    assert codes == ([2, -signal.SIGKILL] if how == "killed" else [2, 2])
    assert output.count(sentence) == 1 and "Traceback" not in output, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    others = [line for line in errors if "because another process has ended" in line]
    assert len(errors) == (1 if how == "killed" else 2) and len(others) == 1, output


def test_two_processes_of_a_machine_index_once_and_before_the_gpu_is_needed(
    shards, start, tmp_path
):
    (tmp_path / "out").mkdir()
    argv = flags(shards, tmp_path / "out", "--steps", 1, "--out_dir", tmp_path / "out")
    codes, output = run_two(start, tmp_path, "index", argv)
    assert codes == [0, 0], output
    notes = (tmp_path / "out" / "indexed.txt").read_text().splitlines()
    assert notes == ["2 shards, False", "1 shards, False"]  # training and validation data


def test_a_signal_to_both_processes_abandons_the_validation_of_one(shards, start, tmp_path):
    (tmp_path / "out").mkdir()
    argv = flags(shards, tmp_path / "out", "--save_every", 100, "--out_dir", tmp_path / "out")
    codes, output = run_two(start, tmp_path, "signal", argv)
    assert codes == [0, 0] and "Traceback" not in output, output
    assert last(tmp_path / "out")["step"] == 4 and output.count("--resume") == 1


# ---- logs that cannot be written, or are damaged


class FullDisk:
    """A file on a disk that is full from the third row on."""

    def __init__(self, *args, **options):
        self.file, self.rows = open(*args, **options), 0

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        self.rows += text.endswith("\n")
        if self.rows > 2:
            raise FULL
        return self.file.write(text)


def test_a_lost_log_line_loses_no_step(whole, shards, tmp_path, capsys):
    with mock.patch("scripts.log.open", FullDisk, create=True):
        train.main(flags(shards, tmp_path))
    assert "No space left on device" in capsys.readouterr().out
    assert_same(last(tmp_path)["model"], last(whole)["model"])


@pytest.mark.parametrize("damage", [b"", b"\n\n{}\n  \n", b'{"loss', b"\x00\xff\xfe", "é".encode()])
def test_a_damaged_log_is_no_obstacle_to_resuming(copy, damage):
    before = (copy / "log.jsonl").read_bytes() if damage else b""
    (copy / "log.jsonl").write_bytes(before + damage)
    train.main(["--out_dir", str(copy), "--resume", "--steps", "13"])
    after = (copy / "log.jsonl").read_bytes()
    assert after.startswith(before + damage) and json.loads(after.splitlines()[-1])["step"] == 13


# ---- captions that no terminal takes


def odd_shards(folder, text):
    """A shard for training and one for validation, with this caption in their JSON."""
    shutil.copy(folder / "vocab.tiktoken", ".")
    odd = [sample(i) | {"json": json.dumps({"captions": text}).encode()} for i in range(40)]
    return write_shard(Path("train-odd.tar"), odd[:20]), write_shard(Path("val-odd.tar"), odd[20:])


def print_odd(argv, shard, encoding):
    sys.stdout.reconfigure(encoding=encoding)
    sys.stderr.reconfigure(encoding=encoding)
    shown = [shard, "--captions", "json.captions"]
    cli(lambda _: (show.main(list(map(str, shown))), train.main(argv))[1])


@pytest.mark.parametrize("text, encoding", [("a \ud83d red", "utf-8"), ("a réd 🐕", "ascii")])
def test_a_caption_that_cannot_be_printed_ends_nothing(
    shards, start, tmp_path, monkeypatch, text, encoding
):
    monkeypatch.chdir(tmp_path)
    shard, val = odd_shards(shards, text)
    argv = flags(shards, tmp_path / "out", "--captions", "json.captions", "--steps", 4)
    argv += ["--train_data", str(shard), "--val_data", str(val)]
    output = tmp_path / "output.txt"
    code = finish(start(print_odd, output, argv, shard, encoding))
    assert code == 0, output.read_text(errors="replace")
    assert last(tmp_path / "out")["step"] == 4


# ---- two runs in one folder


def waiting(argv):
    """A run that waits in its fifth step, with live workers."""
    rate = train.learning_rate_at

    def stepping(step, *args):
        if step == 4:
            print("It holds still.", flush=True)
            time.sleep(100)
        return rate(step, *args)

    train.learning_rate_at = stepping
    cli(lambda _: train.main(argv))


def test_a_folder_is_for_one_run_at_a_time_and_killing_it_frees_the_folder(
    whole, shards, start, tmp_path, capsys
):
    out, output = tmp_path / "out", tmp_path / "output.txt"
    argv = flags(shards, out, "--workers", 2)
    process = start(waiting, output, argv)
    while "It holds still." not in (output.read_text() if output.exists() else ""):
        assert process.is_alive()
        time.sleep(0.05)
    before = contents(out)
    for more in ([], ["--resume"]):
        assert "another run" in error_of(capsys, train.main, *argv, *more)
        assert contents(out) == before
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("best.pt", "last.pt"):  # as if it had not saved yet
        (out / name).rename(hidden / name)
    assert "another run" in error_of(capsys, train.main, *argv)
    assert contents(out) | contents(hidden) == before
    for name in contents(hidden):
        (hidden / name).rename(out / name)
    process.kill()
    process.join()
    train.main([*argv, "--resume", "--workers", "0"])  # its workers may still be there
    assert_same(last(out)["model"], last(whole)["model"])


# ---- found later


def printing_to_nobody(argv):
    """From the fourth step on."""
    read, write = os.pipe()
    sys.stdout = sys.stderr = open(write, "w")
    update, calls = train.update, []

    def updating(*args):
        calls.append(1)
        if len(calls) == 4:
            os.close(read)
        return update(*args)

    train.update = updating
    cli(lambda _: train.main(argv))


def test_a_pipe_that_is_closed_loses_no_step(whole, shards, start, tmp_path):
    """As when Ctrl-C ends `python train.py | tee log`: tee first, and then the run has to save."""
    argv = flags(shards, tmp_path / "out", "--log_every", 1)
    finish(start(printing_to_nobody, tmp_path / "output.txt", argv))
    assert_same(last(tmp_path / "out")["model"], last(whole)["model"])


def test_weights_that_are_nan_do_not_replace_a_good_checkpoint(shards, tmp_path, capsys):
    """The loss is of before the update, and still finite."""
    update, calls = train.update, []

    def poisoned(model, *args):
        calls.append(1)
        if len(calls) == 6:
            model.visual.proj.grad[0, 0] = torch.nan
        return update(model, *args)

    with mock.patch("train.update", poisoned):
        assert "NaN" in error_of(capsys, train.main, *flags(shards, tmp_path))
    assert last(tmp_path)["step"] == 3


def test_a_block_of_bad_samples_is_replaced_by_samples_from_elsewhere(shards, tmp_path):
    shutil.copy(shards / "vocab.tiktoken", tmp_path)
    samples = [sample(i) | ({"txt": b" "} if 40 <= i < 160 else {}) for i in range(400)]
    write_shard(tmp_path / "block.tar", samples)  # more than a hundred in a row
    train.main(flags(shards, tmp_path / "out", "--train_data", tmp_path / "block.tar"))
    assert last(tmp_path / "out")["step"] == 12


# ---- nothing writes over its input


def test_no_command_writes_over_its_input(whole, shards, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(shards / "val-0.tar", "x.tar")
    Path("0.png").write_bytes(sample(0)["png"])
    Path("bad_rows.csv").write_text("image,caption\n0.png,a red square\n")
    shutil.copy(whole / "best.pt", "best.pt")
    before = contents(".")
    base = ["--checkpoint", "best.pt", "--device", "cpu"]
    argv = [a for a in flags(shards, ".") if a not in ("--model", "tiny")]
    for main, more in (
        (evaluation.main, ["retrieval", *base, "--data", "x.tar", "--json", "best.pt"]),
        (words.main, [*base, "--image", "0.png", "--out", "0.png"]),
        (words.main, [*base, "--image", "0.png", "--json", "best.pt"]),
        (vocab.main, ["x.tar", "--out", "x.tar"]),
        (show.main, ["x.tar", "--picture", "x.tar"]),
        (pack.main, ["--csv", "bad_rows.csv", "--out", "."]),
        (train.main, [*argv, "--init_from", "best.pt"]),
    ):
        assert run(main, *more) == 2, more
        assert before.items() <= contents(".").items(), more


# ---- data that is not what it was, or not what it should be


@pytest.mark.parametrize("change", ["swapped", "added", "recoded"])
def test_a_run_goes_on_with_the_same_training_data_only(copy, shards, tmp_path, capsys, change):
    folder = shutil.copytree(shards, tmp_path / "shards")
    argv = ["--out_dir", copy, "--resume", "--steps", 13, "--train_data", f"{folder}/train-*.tar"]
    a, b = folder / "train-0.tar", folder / "train-1.tar"
    if change == "swapped":
        a.rename(folder / "x"), b.rename(a), (folder / "x").rename(b)
    elif change == "added":
        shutil.copy(b, folder / "train-2.tar")
    before = contents(copy)
    if change == "recoded":  # nothing but the place has changed
        train.main(list(map(str, argv)))
        assert last(copy)["step"] == 13
    else:
        assert "training data" in error_of(capsys, train.main, *argv)
        assert contents(copy) == before


def test_with_other_validation_data_the_old_best_score_is_forgotten(copy, shards, tmp_path):
    torch.save(last(copy) | {"best": 2.0}, copy / "last.pt")  # nothing can be better
    before = (copy / "best.pt").read_bytes()
    train.main(["--out_dir", str(copy), "--resume", "--steps", "13"])
    assert (copy / "best.pt").read_bytes() == before and last(copy)["best"] == 2.0
    other = write_shard(tmp_path / "other.tar", map(sample, range(100, 120)))
    train.main(["--out_dir", str(copy), "--resume", "--steps", "14", "--val_data", str(other)])
    assert last(copy, "best.pt")["step"] == 14 and 0 <= last(copy)["best"] <= 1


def test_validation_data_that_is_trained_on_is_refused(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(shards)
    argv = flags(shards, tmp_path, "--val_data", "./train-1.tar")
    assert "share" in error_of(capsys, train.main, *argv)


def test_show_counts_what_the_index_does_not_use_and_shards_once(shards, tmp_path, capsys):
    shutil.copy(shards / "vocab.tiktoken", tmp_path)
    dotted = [{f"v2.{kind}": content for kind, content in sample(i).items()} for i in range(7)]
    path = write_shard(tmp_path / "x.tar", [*map(sample, range(8)), *dotted])
    show.main([str(path), f"{tmp_path}/../{tmp_path.name}/x.tar"])
    printed = capsys.readouterr().out
    assert "8 samples in 1 shards" in printed and "not used: 0" not in printed
    assert any(".v2.png" in line and " 7 " in f"{line} " for line in printed.splitlines())


def test_a_shard_that_disappears_during_the_run_is_named(shards, tmp_path):
    shutil.copy(shards / "train-0.tar", tmp_path / "a.tar")
    shutil.copy(shards / "train-1.tar", tmp_path / "b.tar")
    tokenizer = data.Tokenizer.from_file(shards / "vocab.tiktoken")
    pairs = data.Pairs(data.expand([tmp_path]), tokenizer, 16)
    (tmp_path / "a.tar").unlink()
    replaced = pairs[0, 39][3]
    assert len(replaced) == 1 and replaced[0][0].endswith("a.tar") and "No such" in replaced[0][2]


# ---- one checkpoint has one score


def test_eval_py_repeats_the_last_validation_of_a_bfloat16_run(shards, start, tmp_path):
    out, result = tmp_path / "out", tmp_path / "result.json"
    train.main(flags(shards, out, "--dtype", "bfloat16"))
    argv = ["retrieval", "--checkpoint", out / "last.pt", "--data", shards / "val-*.tar", *EVAL]
    process = start(sabotaged, tmp_path / "o.txt", "", evaluation.main, [*argv, "--json", result])
    assert finish(process) == 0
    logged = [row["validation"] for row in log_of(out) if "validation" in row][-1]
    printed = json.loads(result.read_text())
    assert logged == {way: printed[way] for way in logged}


# ---- mistakes are sentences, told at the start, and leave nothing in the way


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--epochs", "nan"], "--epochs"),
        (["--epochs", "inf"], "--epochs"),
        (["--learning_rate", "inf"], "--learning_rate"),
        (["--zeroshot_data", "nowhere"], "nowhere"),
        (["--val_data", "nowhere.tar"], "nowhere.tar"),
        (["--val_captions", "json.nope"], "json.nope"),
        (["--captions", "json.nope"], "json.nope"),  # found in the first step
        (["--vocab", "nowhere.tiktoken"], "nowhere.tiktoken"),
    ],
)
def test_the_corrected_command_runs_after_a_failed_start(
    shards, tmp_path, capsys, monkeypatch, more, sentence
):
    monkeypatch.chdir(tmp_path)
    argv = [a for a in flags(shards, "out") if a not in ("--steps", "12")]
    steps = mock.Mock(side_effect=train.update)
    with mock.patch("train.update", steps):
        assert sentence in error_of(capsys, train.main, *argv, *more)
    assert not steps.called
    train.main([*argv, "--steps", "1"])
    assert last("out")["step"] == 1
    assert [row["step"] for row in log_of("out")[1:] if "loss" in row] == [1]


def test_a_best_pt_under_the_name_of_last_pt_is_not_resumed(copy, capsys):
    os.replace(copy / "best.pt", copy / "last.pt")
    assert "cannot be resumed" in error_of(capsys, train.main, "--out_dir", copy, "--resume")


def test_templates_in_another_encoding_and_a_folder_as_a_target_are_sentences(
    checkpoint, tmp_path, capsys
):
    for name in ("red", "blue"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(sample(0)["png"])
    zeroshot = ["zeroshot", "--checkpoint", checkpoint, "--images", tmp_path / "images", *EVAL]
    (tmp_path / "templates.txt").write_text("ein Bild für {}\n", "latin-1")
    scores, _ = result_of(
        capsys, evaluation.main, tmp_path / "x.json", *zeroshot,
        "--templates", tmp_path / "templates.txt",
    )  # fmt: skip
    assert scores["top1"]["n"] == 2
    (tmp_path / "templates.txt").write_text("a photo of a {}\n", "utf-16")
    more = ["--templates", tmp_path / "templates.txt"]
    assert "{}" in error_of(capsys, evaluation.main, *zeroshot, *more)
    for name in ("y.json", "y.tiktoken"):
        (tmp_path / name).mkdir()
    assert "y.json" in error_of(capsys, evaluation.main, *zeroshot, "--json", tmp_path / "y.json")
    shard = write_shard(tmp_path / "x.tar", map(sample, range(4)))
    assert "y.tiktoken" in error_of(capsys, vocab.main, shard, "--out", tmp_path / "y.tiktoken")


def test_a_probe_with_one_image_in_all_is_a_sentence(checkpoint, tmp_path, capsys):
    (tmp_path / "images" / "red").mkdir(parents=True)
    (tmp_path / "images" / "red" / "0.png").write_bytes(sample(0)["png"])
    folders = ["--train", tmp_path / "images", "--test", tmp_path / "images"]
    argv = ["probe", "--checkpoint", checkpoint, *folders, *EVAL]
    assert "at least two" in error_of(capsys, evaluation.main, *argv)
