"""Training: the same result however a run is cut up, interrupted or spread over processes, and
nothing lost whatever happens to it."""

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from material import COLOURS, TINY, error_of, png, write_shard
from torch.utils._pytree import tree_flatten

import data
import eval as evaluation
import superclip
import train
from cli import run_command
from data import words_to_tiktoken
from scripts import scenes

TIMES = ("images_per_second", "data_wait", "memory_gb")  # what may differ between equal runs


def sample(i):
    """A noisy square of one colour. Every seventh caption is long: 32 columns of tokens, not 16."""
    name = list(COLOURS)[i % 4]
    text = f"a {name} square" + (" and nothing else on it" * 4 if i % 7 == 0 else "")
    texts = {"captions": [text, f"{name} thing"]}
    image = png(COLOURS[name], np.random.default_rng(i))
    return {"png": image, "txt": text.encode(), "json": json.dumps(texts).encode()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Training, validation and bad shards with their vocabulary."""
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "train-0.tar", map(sample, range(40)))
    write_shard(folder / "train-1.tar", map(sample, range(40, 70)))  # 70: no multiple of a batch
    write_shard(folder / "val-0.tar", map(sample, range(70, 90)))
    bad = [sample(i) for i in range(40)]
    del bad[3]["txt"]
    bad[11]["png"] = bad[11]["png"][:200]
    bad[20]["txt"] = b"   "
    bad[30]["txt"] = b"\xff\xfe\xfa"
    write_shard(folder / "bad-0.tar", bad)
    words = "a red green blue grey square thing and nothing else on it".split()
    (folder / "vocab.tiktoken").write_text(words_to_tiktoken(words))
    return folder


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(superclip.PRESETS, "tiny", TINY)


def flags(shards, out, *more):
    """Twelve steps of 16 pairs, logged, saved and validated at steps that interleave."""
    base = f"--train_data {shards}/train-*.tar --val_data {shards}/val-*.tar --out_dir {out}"
    base += " --batch_size 16 --steps 12 --learning_rate 1e-3 --workers 0 --device cpu"
    base += " --log_every 2 --save_every 3 --eval_every 4"
    if "--init_from" not in more:  # else the checkpoint sets the model
        base += " --model tiny"
    return [*base.split(), *map(str, more)]


def rows(out, kind=None):
    """What a run has logged, without headers and times, in order. A run that was killed may have
    left half a line, and a resumed run may log a step twice: the later row counts."""
    found, log = {}, Path(out) / "log.jsonl"
    for line in log.read_text().splitlines() if log.exists() else ():
        row = json.loads(line) if line.endswith("}") else {"header": None}
        if "header" not in row:
            name = "loss" if "loss" in row else "validation"
            found[row["step"], name] = {k: v for k, v in row.items() if k not in TIMES}
    return [found[step, name] for step, name in sorted(found) if kind in (None, name)]


def header_of(out):
    return json.loads((out / "log.jsonl").read_text().splitlines()[0])["header"]


def checkpoint(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def assert_same(a, b):
    """Equal to the bit, all the way down, but for the arguments."""
    (xs, structure), (ys, other) = (tree_flatten({**x, "arguments": None}) for x in (a, b))
    assert structure == other
    for x, y in zip(xs, ys):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def assert_ends_like(out, whole):
    """A run ends with the bits of another one, and its log has the same rows."""
    assert_same(checkpoint(out), checkpoint(whole))
    assert_same(checkpoint(out, "best.pt"), checkpoint(whole, "best.pt"))
    assert rows(out) == rows(whole)


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """A run that nothing has interrupted."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(superclip.PRESETS, "tiny", TINY)
        train.main(flags(shards, out))
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


# ---- processes of their own: forked from a server that has imported torch once


@pytest.fixture(scope="module")
def start():
    """start(job, output, *args) -> a running process, which prints to the file `output`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "tiktoken", "pytest"])
    started = []

    def start(job, output, *args):
        process = context.Process(target=child, args=(job, str(output), *args))
        process.start()
        process.output = output
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()  # one that hangs because its test has failed


def child(job, output, *args):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its own children, data workers
    superclip.PRESETS["tiny"] = TINY
    job(*args)


def run(argv):
    run_command(lambda _: train.main(argv))


def finish(process):
    """-> exit code, what it has printed."""
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, process.output.read_text()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# ---- a run


def test_a_run_learns_and_its_log_says_how(whole):
    losses, validations = rows(whole, "loss"), rows(whole, "validation")
    assert [row["step"] for row in losses] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in validations] == [4, 8, 12]
    assert losses[-1]["loss"] < losses[0]["loss"] - 1
    for row in losses:
        total = row["contrastive_loss"] + row["classification_loss"]
        assert row["loss"] == pytest.approx(total) and row["samples"] == 16 * row["step"]
        rate = train.learning_rate_at(row["step"] - 1, 1e-3, 1, 12)  # one step of warm-up
        assert row["learning_rate"] == pytest.approx(rate)
    header = header_of(whole)
    model, _, _ = evaluation.load(whole / "last.pt")
    assert header["parameters"] == sum(p.numel() for p in model.parameters())
    assert header["samples"] == 70 and header["arguments"]["steps"] == 12


def test_one_checkpoint_has_one_score(shards, tmp_path):
    """eval.py gives the score of the last validation, even after training in bfloat16."""
    train.main(flags(shards, tmp_path, "--dtype", "bfloat16", "--val_captions", "json.captions"))
    model, tokenizer, _ = evaluation.load(tmp_path / "last.pt")
    shards = data.expand([f"{shards}/val-*.tar"])
    pairs = data.Pairs(shards, tokenizer, 16, ["json.captions"])
    result = evaluation.retrieval(*evaluation.encode_shards(model, pairs))
    assert rows(tmp_path, "validation")[-1]["validation"] == json.loads(json.dumps(result))


def test_best_pt_is_the_model_of_the_best_validation(shards, tmp_path):
    """A rate that spoils the model after a while: the score that best.pt carries is the highest
    one, and that of its weights."""
    train.main(flags(shards, tmp_path, "--learning_rate", 0.02, "--eval_every", 2))
    scores = [row["mean_r1"] for row in rows(tmp_path, "validation")]
    best = checkpoint(tmp_path, "best.pt")
    assert best["mean_r1"] == max(scores) > scores[-1]
    assert best["step"] == 2 * (len(scores) - scores[::-1].index(max(scores)))  # the last of them


@pytest.mark.parametrize(
    "more",
    [
        ["--cls_weight", 0, "--patch_dropout", 0.5, "--captions", "json.captions", "txt"],
        ["--loss", "sigmoid", "--micro_batch_size", 4, "--grad_checkpointing", "--workers", 1],
        ["--dtype", "bfloat16", "--label_captions", "json.captions", "--val_data", "none"],
    ],
)
def test_other_ways_to_train(shards, folders, tmp_path, more):
    """Zero-shot is scored at every validation, also without validation pairs."""
    train.main(flags(shards, tmp_path, "--steps", 8, "--zeroshot_data", folders, *more))
    validations = rows(tmp_path, "validation")
    assert [row["step"] for row in validations] == [4, 8]
    assert all(row["zeroshot"][str(folders)]["n"] == 12 for row in validations)
    model, tokenizer, _ = evaluation.load(tmp_path / "last.pt")
    assert (model.head is None) == ("--cls_weight" in more)
    if model.head:  # "thing" is in the captions of json alone
        thing = model.token_counts[tokenizer.encode("thing")]
        assert (thing > 0) == ("--label_captions" in more)
    assert (model.logit_bias is None) == ("sigmoid" not in more)
    assert (tmp_path / "best.pt").exists() == ("none" not in more)
    assert len(rows(tmp_path, "loss")) == 4


def test_a_seed_is_of_weights_and_order(shards, tmp_path):
    """And of dropped patches (tests/test_step.py), captions and crops (tests/test_data.py)."""
    first, other = tmp_path / "first", tmp_path / "other"
    for out, seed in ((first, 0), (other, 1)):
        train.main(flags(shards, out, "--steps", 1, "--learning_rate", 0, "--seed", seed))
    first, other = (checkpoint(out)["model"] for out in (first, other))
    for name in ("visual.proj", "token_counts"):
        assert not torch.equal(first[name], other[name]), name


def test_one_pair_in_a_hundred_is_held_out(tmp_path, shards):
    """Three of 201 pairs, which are not trained on; none of fewer than 200."""
    shutil.copy(shards / "vocab.tiktoken", tmp_path)
    for n, trained_on in ((201, 198), (199, 199)):
        shard, out = write_shard(tmp_path / f"{n}.tar", map(sample, range(n))), tmp_path / str(n)
        argv = f"--train_data {shard} --out_dir {out} --model tiny --batch_size 16 --steps 1"
        train.main([*argv.split(), "--device=cpu", "--workers=0"])
        assert header_of(out)["samples"] == trained_on
        scores = [row["validation"]["image_to_text"]["R@1"] for row in rows(out, "validation")]
        assert [score["n"] for score in scores] == ([3] if n == 201 else [])


def test_defaults_follow_the_situation():
    """Options for the built-in scenes, gentle ones for fine-tuning, the usual ones otherwise."""
    bare, _ = train.parse([])
    assert (bare.model, bare.batch_size, bare.learning_rate) == ("tiny", 32, 4e-4)
    larger, _ = train.parse(["--batch_size", "128"])  # four times as large: twice the rate
    assert larger.learning_rate == pytest.approx(8e-4) and larger.epochs == 2 * bare.epochs
    own, _ = train.parse(["--train_data", "x.tar"])
    assert (own.model, own.batch_size, own.learning_rate) == ("ViT-B-16", 256, 5e-4)
    gentle, _ = train.parse(["--train_data", "x.tar", "--init_from", "y.pt"])
    assert gentle.learning_rate == 5e-5


def test_a_bare_run_draws_scenes_and_ends_with_commands_that_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "make_scenes", partial(scenes.make_scenes, train=40, val=12))
    train.main(["--steps=1", "--workers=0", "--device=cpu"])
    pictures = "scenes/zeroshot/held_out/red square"
    last = capsys.readouterr().out.replace("FILE", repr(pictures)).replace("DIR", repr(pictures))
    commands = [shlex.split(line) for line in last.splitlines() if line.startswith("  python -m")]
    assert len(commands) == 3
    for _, _, module, *argv in commands:
        importlib.import_module(module).main(argv)


# ---- fine-tuning


def test_init_from_scores_the_checkpoint_first_and_goes_on_from_it(whole, shards, tmp_path):
    """With a rate of 0 the weights stay; only counts grow. Another model's vocabulary comes along:
    the shards here lie beside none."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(shards / "train-0.tar", bare)
    more = "--learning_rate", 0, "--train_data", bare / "train-0.tar"
    train.main(flags(shards, tmp_path / "out", "--init_from", whole / "best.pt", *more))
    before, after = checkpoint(whole, "best.pt"), checkpoint(tmp_path / "out")
    assert after["vocab"] == before["vocab"] and after["config"] == before["config"]
    for name, value in before["model"].items():
        same = torch.equal(value, after["model"][name])
        assert same == (name not in ("token_counts", "num_captions"))
    assert after["model"]["num_captions"] == before["model"]["num_captions"] + 12 * 16
    first, *_ = rows(tmp_path / "out", "validation")
    assert first["step"] == 0 and first["mean_r1"] == before["mean_r1"]


@pytest.mark.parametrize("tower, more", [("image", ()), ("text", ("--micro_batch_size", 4))])
def test_a_frozen_tower_keeps_its_weights(whole, shards, tmp_path, tower, more):
    """With its projection, and without optimizer state. All else is trained, the head, too."""
    more = "--init_from", whole / "best.pt", "--freeze", tower, *more
    train.main(flags(shards, tmp_path / "out", *more))
    before, after = checkpoint(whole, "best.pt")["model"], checkpoint(tmp_path / "out")
    prefix = "visual." if tower == "image" else "text."
    frozen = [name for name in before if name.startswith(prefix)]
    assert frozen == [name for name in before if torch.equal(before[name], after["model"][name])]
    counts = ("token_counts", "num_captions")
    assert len(after["optimizer"]["state"]) == len(before) - len(frozen) - len(counts)


@pytest.mark.parametrize("best, name", [(0.5, "best.pt"), (-1.0, "last.pt")])
def test_the_best_model_is_named_if_there_is_one(capsys, best, name):
    args = argparse.Namespace(out_dir="out", val_data=None)

    train.print_next(args, best, {})

    assert f"--checkpoint 'out/{name}'" in capsys.readouterr().out


def test_a_head_may_come_and_go(whole, shards, tmp_path):
    """--cls_weight 0 takes it away. Where there is none, a new one gets the usual rate, because it
    has nothing to lose, and a resumed run keeps that."""
    more = "--init_from", whole / "last.pt", "--cls_weight", 0
    train.main(flags(shards, tmp_path / "clip", *more))
    assert not [name for name in checkpoint(tmp_path / "clip")["model"] if "head" in name]
    more = "--init_from", tmp_path / "clip" / "last.pt", "--learning_rate", 0
    train.main(flags(shards, tmp_path / "new", *more))
    old, new = checkpoint(tmp_path / "clip")["model"], checkpoint(tmp_path / "new")
    assert all(torch.equal(new["model"][name], value) for name, value in old.items())
    assert new["arguments"]["head_learning_rate"] == 5e-4
    assert new["model"]["head.linear.bias"].abs().max() > 0  # it has learnt


# ---- several processes


def be_one_of_two(rank, port, argv, dies_at=None):
    """What torchrun makes of a process: its place in the environment, and train.py. Rank 1 may be
    killed in a step, as rank 0 waits for its features."""
    train.RANK, train.WORLD, train.LOCAL_RANK = rank, 2, rank
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    compare, steps = superclip.SuperCLIP.compare, itertools.count(1)

    def compare_or_die(*inputs):
        if rank == 1 and next(steps) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return compare(*inputs)

    superclip.SuperCLIP.compare = compare_or_die
    run(argv)


@pytest.fixture
def start_two(start, tmp_path):
    """start_two(flags of rank 0, flags of rank 1) -> two processes."""

    def start_two(*argvs, dies_at=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = enumerate(argvs)
        return [start(be_one_of_two, tmp_path / f"{r}.txt", r, port, x, dies_at) for r, x in ranks]

    return start_two


def test_two_processes_do_what_one_does(start_two, shards, tmp_path):
    """The same weights, counts and log. (tests/test_step.py compares the gradients.) Bad samples
    are replaced in the process that meets them, and all are counted. One process prints."""
    # At a low learning rate, because Adam makes much of the smallest difference.
    more = "--train_data", shards / "bad-0.tar", "--patch_dropout", 0.5, "--learning_rate", 1e-5
    one, two = tmp_path / "one", tmp_path / "two"
    for rank, process in enumerate(start_two(*[flags(shards, two, *more)] * 2)):
        code, printed = finish(process)
        assert code == 0 and ("step " in printed) == (rank == 0), printed
    train.main(flags(shards, one, *more))
    ours, theirs = (checkpoint(out)["model"] for out in (one, two))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    for mine, other in zip(rows(one, "loss"), rows(two, "loss"), strict=True):
        assert other == pytest.approx(mine, rel=1e-5)
    epochs = 12 * 16 // 40  # with four bad samples each, some replaced by another bad one
    assert 4 * (epochs - 1) <= mine["bad_samples"] <= 6 * epochs


@pytest.mark.parametrize("more", [("--train_data", "bad-0.tar"), ("--learning_rate", 1e-4)])
def test_processes_that_differ_do_not_start(start_two, shards, tmp_path, monkeypatch, more):
    monkeypatch.chdir(shards)
    argv = flags(shards, tmp_path / "out", "--train_data", "train-0.tar")
    for process in start_two(argv, [*argv, *map(str, more)]):
        code, printed = finish(process)
        assert code == 2 and "Traceback" not in printed, printed
    assert not (tmp_path / "out" / "last.pt").exists()


def test_a_signal_to_one_of_two_stops_both_and_one_goes_on(start_two, shards, tmp_path):
    out = tmp_path / "out"
    argv = flags(shards, out, "--steps", 4000, "--save_every", 4000, "--eval_every", 4000)
    processes = start_two(argv, argv)
    wait_for(lambda: rows(out))
    os.kill(processes[1].pid, signal.SIGTERM)
    (code, printed), (other_code, _) = map(finish, processes)
    assert code == other_code == 0 and "--resume" in printed, printed
    step = checkpoint(out)["step"]
    assert 2 <= step < 4000
    train.main([*argv, "--resume", "--steps", str(step + 2)])
    assert checkpoint(out)["step"] == step + 2


def test_if_one_process_dies_the_other_saves_its_last_whole_step(start_two, shards, tmp_path):
    """The counts, too, are those of the steps before: what the failed one has counted is undone."""
    argv = flags(shards, tmp_path / "out", "--save_every", 100, "--eval_every", 100)
    code, printed = finish(start_two(argv, argv, dies_at=6)[0])
    assert code == 2 and "Traceback" not in printed, printed
    content = checkpoint(tmp_path / "out")
    assert content["step"] == 5 and content["model"]["num_captions"] == 5 * 16


# ---- killed, stopped, and failures outside the step


def slowly(argv):
    """In a process group of its own."""
    os.setpgid(0, 0)
    rate = train.learning_rate_at
    train.learning_rate_at = lambda *args: time.sleep(0.03) or rate(*args)
    run(argv)


def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(whole, shards, start, tmp_path):
    rng, out, output = random.Random(0), tmp_path / "out", tmp_path / "output.txt"
    argv = flags(shards, out, "--workers", 2)
    for _ in range(5):
        output.write_text("")
        process = start(slowly, output, [*argv, "--resume"])
        wait_for(lambda: output.read_text().count("samples 70"))  # it has begun
        process.join(rng.uniform(0, 0.3))
        process.kill()
        process.join()
    code, printed = finish(start(run, output, [*argv, "--resume"]))
    assert code == 0, printed
    assert_ends_like(out, whole)


def slow_to_validate(argv, marker, seconds):
    """A run whose first validation takes a while, and that says when it begins."""
    validate = train.validate

    def slowly(*args):
        if not marker.exists():
            marker.touch()
            time.sleep(seconds)  # a signal does not shorten it
        return validate(*args)

    train.validate = slowly
    run(argv)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_and_nothing_is_lost(whole, shards, start, tmp_path, number):
    """It goes to the loading processes, too, and twice, as torchrun and schedulers send it."""
    out, output = tmp_path / "out", tmp_path / "output.txt"
    argv = flags(shards, out, "--workers", 2, "--save_every", 100)
    process = start(slowly, output, argv)
    wait_for(lambda: rows(out))
    for _ in range(2):
        os.killpg(process.pid, number)
        time.sleep(0.05)
    code, printed = finish(process)
    assert code == 0 and "--resume" in printed, printed
    assert checkpoint(out)["step"] >= 2
    train.main([*argv, "--resume"])
    assert_ends_like(out, whole)


def test_a_signal_in_a_validation_waits_and_a_later_one_does_not(whole, shards, start, tmp_path):
    """The save comes before the validation, so that even the second signal loses nothing, and the
    validation is made up for: also that of the checkpoint from which a fine-tuning starts."""
    gentle = ["--init_from", whole / "last.pt"]
    for name, more, steps in (("once", [], [4, 8, 12]), ("twice", gentle, [0, 4, 8, 12])):
        out, marker = tmp_path / name, tmp_path / f"{name}.mark"
        argv, once = flags(shards, out, *more), name == "once"
        seconds = 1 if once else 4
        process = start(slow_to_validate, tmp_path / f"{name}.txt", argv, marker, seconds)
        wait_for(marker.exists)
        os.kill(process.pid, signal.SIGTERM)
        if not once:
            time.sleep(3.2)
            os.kill(process.pid, signal.SIGTERM)
        code, printed = finish(process)
        assert code == (0 if once else 128 + signal.SIGTERM), printed
        assert checkpoint(out)["step"] == steps[0]
        assert [row["step"] for row in rows(out, "validation")] == ([4] if once else [])
        train.main([*argv, "--resume"])
        assert [row["step"] for row in rows(out, "validation")] == steps
    assert_ends_like(tmp_path / "once", whole)


@pytest.mark.parametrize("failure", ["a loading process is killed", "a folder disappears"])
def test_a_failure_outside_the_step_loses_no_step(shards, folders, start, tmp_path, failure):
    out, more = tmp_path / "out", ("--workers", 1, "--zeroshot_data", folders, "--log_every", 1)
    argv = flags(shards, out, "--steps", 4000, "--save_every", 4000, "--eval_every", 40, *more)
    process = start(run, tmp_path / "output.txt", argv)
    wait_for(lambda: len(rows(out, "loss")) > 3)
    if failure == "a folder disappears":
        shutil.rmtree(folders)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children.split()[0]), signal.SIGKILL)
    code, printed = finish(process)
    assert code == 2 and "Traceback" not in printed, printed
    assert checkpoint(out)["step"] == rows(out, "loss")[-1]["step"]
    assert checkpoint(out)["model"]["num_captions"] == 16 * checkpoint(out)["step"]


def with_little_disk(argv):
    """Files of more than 100 kB cannot be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    run(argv)


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on(shards, start, tmp_path):
    out, output = tmp_path / "out", tmp_path / "output.txt"
    train.main(flags(shards, out, "--steps", 3))
    before = (out / "last.pt").read_bytes()
    code, printed = finish(start(with_little_disk, output, flags(shards, out, "--resume")))
    assert code == 2 and "last.pt" in printed and "Traceback" not in printed
    assert (out / "last.pt").read_bytes() == before
    assert {path.name for path in out.iterdir()} <= {"last.pt", "best.pt", "log.jsonl"}
    assert rows(out, "loss")[-1]["step"] == 12  # it went on to the end


@pytest.mark.parametrize("log_every", [1, 100])
def test_weights_that_are_not_finite_are_not_saved(shards, tmp_path, capsys, log_every):
    train.main(flags(shards, tmp_path, "--steps", 3))
    before = (tmp_path / "last.pt").read_bytes()
    argv = flags(shards, tmp_path, "--learning_rate", 1e30, "--log_every", log_every, "--resume")
    assert "--learning_rate" in error_of(capsys, train.main, *argv)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_run_with_more_bad_samples_than_good_ones_ends(shards, tmp_path, capsys):
    worse = [{**sample(i), "png": b"x"} for i in range(30)] + [*map(sample, range(10))]
    write_shard(tmp_path / "worse.tar", worse)
    shutil.copy(shards / "vocab.tiktoken", tmp_path)
    argv = flags(shards, tmp_path / "out", "--train_data", tmp_path / "worse.tar")
    assert "half" in error_of(capsys, train.main, *argv)


# ---- what a run refuses, and what --resume may change


FIXED = "--model ViT-S-16, --loss sigmoid, --cls_weight 0.5, --weight_decay 0.3, --seed 1,"
FIXED += "--captions json.captions, --label_captions json.captions, --patch_dropout 0.5,"
FIXED += "--vocab clip, --init_from x.pt, --image_size 32, --train_data bad-0.tar, --steps 11,"
FIXED += "--freeze text, --context_length 8"


@pytest.mark.parametrize("more", FIXED.split(","))
def test_what_defines_a_run_stays(copy, shards, capsys, monkeypatch, more):
    monkeypatch.chdir(shards)
    before = (copy / "last.pt").read_bytes()
    option, value = more.split()
    assert option in error_of(capsys, train.main, *flags(shards, copy, "--resume", option, value))
    assert (copy / "last.pt").read_bytes() == before


def test_the_rest_may_change_and_what_is_not_given_stays(copy, whole, tmp_path, shards):
    train.main(flags(shards, copy, "--resume"))  # it is complete, and stays so
    assert_ends_like(copy, whole)
    moved = shutil.move(copy, tmp_path / "moved")
    more = ["--batch_size", 8, "--steps", 30, "--learning_rate", 1e-4, "--warmup_steps", 2]
    train.main(["--resume", "--out_dir", str(moved), *map(str, more)])
    content = checkpoint(moved)
    assert content["step"] == 30 and content["samples"] == 240  # 12 of 16, and 6 of 8
    assert content["arguments"]["workers"] == 0 and content["arguments"]["learning_rate"] == 1e-4
    last = rows(moved, "loss")[-1]
    assert last["samples"] == 240 and last["learning_rate"] < 1e-4


def test_with_other_validation_data_the_old_best_score_is_forgotten(copy, shards):
    """The score of best.pt is raised by hand: with the same data, nothing beats it."""
    same, long = ["--val_data", shards / "val-*.tar"], ["--val_captions", "json.captions"]
    for more, kept in ((same, True), (long, False), (["--val_data", shards / "bad-0.tar"], False)):
        best = checkpoint(copy, "best.pt")
        torch.save({**best, "mean_r1": 1.1}, copy / "best.pt")
        steps = checkpoint(copy)["step"] + 2
        train.main(flags(shards, copy, *more, "--steps", steps, "--resume"))
        assert (checkpoint(copy, "best.pt")["mean_r1"] == 1.1) == kept


def test_a_folder_is_for_one_run_and_a_killed_one_frees_it(shards, start, tmp_path, capsys):
    out = tmp_path / "out"
    process = start(run, tmp_path / "output.txt", flags(shards, out, "--steps", 4000))
    wait_for(lambda: (out / "last.pt").exists())
    for more in ([], ["--resume"]):  # at once; without --resume not even later
        assert "--out_dir" in error_of(capsys, train.main, *flags(shards, out, *more))
    process.kill()
    process.join()
    assert "--resume" in error_of(capsys, train.main, *flags(shards, out))
    (out / ".last.pt.1.tmp").touch()  # it was killed as it saved, and as it logged
    with open(out / "log.jsonl", "a") as log:
        log.write('\n{"step": 1, "lo')
    train.main(flags(shards, out, "--resume", "--steps", checkpoint(out)["step"] + 1))
    assert not (out / ".last.pt.1.tmp").exists()
    lines = (out / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[lines.index('{"step": 1, "lo') + 1])["header"]


def test_resume_without_a_whole_checkpoint(whole, shards, tmp_path, capsys):
    """It starts a run if the data are named, since a scheduler may have killed it before its first
    save. It never replaces a best.pt, nor a last.pt that is damaged or holds weights only."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "log.jsonl").write_text("of an attempt that was never saved")
    train.main(flags(shards, tmp_path / "new", "--resume"))
    assert checkpoint(tmp_path / "new")["step"] == 12 and header_of(tmp_path / "new")
    best, last = (whole / "best.pt").read_bytes(), (whole / "last.pt").read_bytes()
    for number, files in enumerate(({}, {"last.pt": best}, {"last.pt": last[: len(last) // 2]})):
        out, files = tmp_path / str(number), {"best.pt": best, **files}
        out.mkdir()
        for name, content in files.items():
            (out / name).write_bytes(content)
        assert "last.pt" in error_of(capsys, train.main, *flags(shards, out, "--resume"))
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files
