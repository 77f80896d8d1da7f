"""Test --resume. Whatever has ended a run, --resume goes on from its last save, and ends with the
bits of a run that nothing has interrupted. A run in a folder is never overwritten by another."""

import shutil
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from children import before, finish, hook, in_step, killed
from material import assert_ends_like, cases, checkpoint_of, error_of, rows_of, short_run
from material import run as run_command

import eval as evaluation
import superclip
import train
from common.run import read_log


@pytest.fixture
def copied_run(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "copied")


# ---- the same bits

# Case -> the moment of a kill, and the step from which the run then goes on. os.replace gives each
# file its name. Its calls are for last.pt at step 0, and then for last.pt and best.pt in turn.
CHECKPOINTS = {"last.pt", "best.pt"}
MOMENTS = {
    "after the save of step 0": (in_step(3, killed), 0),
    "as last.pt is written": (before("os.replace", 4, killed), 4),
    "as best.pt is written": (before("os.replace", 5, killed), 8),
    "after best.pt is written": (in_step(9, killed), 8),
    "in the last validation": (before("eval.retrieval", 4, killed), 12),
}


@cases("moment, step", MOMENTS)
def test_a_scheduler_repeats_a_command_until_the_run_has_ended(
    children, shards, whole_run, tmp_path, capsys, moment, step
):
    """The command is `python train.py --resume out || python train.py ... --out_dir out`. Its first
    half goes on with a run, and its second half starts one. A file of another program in the folder
    stays, and so does what the log had when the run was killed."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".other.txt.7.tmp").touch()
    resume = ["--resume", str(out)]
    start = short_run(shards, out)
    assert run_command(train.main, *resume) == 2
    code, _ = finish(children.start("train", start, moment))
    assert code == -signal.SIGKILL
    with open(out / "log.jsonl", "ab") as log:
        log.write(b'{"step": 6, "lo\xff')  # a row that was cut
    before = (out / "log.jsonl").read_bytes()

    if run_command(train.main, *resume) == 2:
        train.main(start)

    assert_ends_like(out, whole_run)
    assert f"from step {step}\n" in capsys.readouterr().out
    assert [path.name for path in out.glob(".*")] == [".other.txt.7.tmp"]
    assert (out / "log.jsonl").read_bytes().startswith(before)


def test_a_run_that_was_killed_before_its_first_save_starts_again(children, shards, tmp_path):
    """Its folder has no log, which a run writes after its first save."""
    start = short_run(shards, tmp_path / "out")
    finish(children.start("train", start, before("os.replace", 1, killed)))

    train.main(start)

    assert {path.name for path in (tmp_path / "out").iterdir()} == {"log.jsonl", *CHECKPOINTS}


def test_ctrl_c_ends_a_run_with_one_line(children, shards, whole_run, tmp_path):
    """Its loading process ends, too. Otherwise the process that waits for it would hang."""
    options = short_run(shards, tmp_path, "--workers", 1)
    interrupted = in_step(6, partial(signal.raise_signal, signal.SIGINT))

    code, printed = finish(children.start("train", options, interrupted))

    assert code == 130, printed
    assert printed.count("stopped by Ctrl-C") == 1
    assert "Traceback" not in printed
    train.main(["--resume", str(tmp_path), "--workers", "0"])
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
    """Here the towers have dropout. The second run is stopped in its tenth step."""
    options = options.split()
    forward = superclip.MLP.forward

    def with_dropout(mlp, x):
        return F.dropout(forward(mlp, x), 0.1, mlp.training)

    monkeypatch.setattr(superclip.MLP, "forward", with_dropout)
    monkeypatch.setattr(superclip.SuperCLIP, "forward", superclip.SuperCLIP.forward)  # to restore
    train.main(short_run(shards, tmp_path / "whole", *options))
    hook("superclip.SuperCLIP.forward", 10, partial(signal.raise_signal, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train.main(short_run(shards, tmp_path / "out", *options))

    train.main(["--resume", str(tmp_path / "out")])

    assert_ends_like(tmp_path / "out", tmp_path / "whole")


def test_two_processes_go_on_to_the_bit(children, shards, tmp_path):
    """Both are killed in their tenth step."""
    for name, moment in (("whole", []), ("out", [in_step(10, killed)])):
        both = [short_run(shards, tmp_path / name), *moment]
        for process in children.train_two(both, both):
            finish(process)

    for process in children.train_two(*2 * [[["--resume", tmp_path / "out"]]]):
        code, printed = finish(process)
        assert code == 0, printed

    assert_ends_like(tmp_path / "out", tmp_path / "whole")


# ---- what may change


def test_what_is_typed_replaces_the_options_of_the_run(
    copied_run, shards, tmp_path, capsys, device
):
    """What differs is printed, also from what the run has chosen for an option that was left open.
    The shards have moved, and lost their vocabulary."""
    before = checkpoint_of(copied_run)["model"]
    moved = shutil.copytree(shards, tmp_path / "moved")
    (moved / "vocab.tiktoken").unlink()
    data = f"--train_data {moved}/train-*.tar --val_data {moved}/val-*.tar"
    more = "--steps 16 --learning_rate 0 --dtype bfloat16 --micro_batch_size 4 --workers 1"
    options = f"{data} {more} --no-compile --log_every 1 --eval_every 2 --device {device}"

    train.main(["--resume", str(copied_run), *options.split()])

    saved = checkpoint_of(copied_run)
    assert saved["step"] == 16
    assert saved["model"]["num_captions"] == 16 * 16
    assert torch.equal(saved["model"]["visual.proj"], before["visual.proj"])  # at a rate of 0
    printed = capsys.readouterr().out
    for change in ("learning_rate: 0.001 -> 0.0", "dtype: float32 -> bfloat16", "steps: 12 -> 16"):
        assert f"\n{change}\n" in printed
    assert "\nmodel:" not in printed


def test_an_option_that_a_fork_has_added_has_its_default(copied_run, capsys):
    """The run is one of code that lacked two options. One is a field of the configuration."""
    last = checkpoint_of(copied_run)
    for name in ("cls_weight", "crop_area"):
        del last["header"]["options"][name]
    del last["config"]["cls_weight"]
    torch.save(last, copied_run / "last.pt")

    train.main(["--resume", str(copied_run), "--steps", "13"])

    saved = checkpoint_of(copied_run)
    assert saved["config"]["cls_weight"] == 1.0
    assert saved["header"]["options"]["crop_area"] == 0.9
    assert "\ncrop_area: None -> 0.9\n" in capsys.readouterr().out


class PlainDescent(torch.optim.SGD):
    """An optimizer of a fork, whose state_dict is unlike torch's. It counts its steps."""

    steps = 0

    def step(self):
        self.steps += 1
        return super().step()

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_the_optimizer_of_a_fork_is_restored_by_its_own_functions(shards, tmp_path, monkeypatch):
    optimizers = []

    def make_optimizer(model, *_):
        optimizers.append(PlainDescent(model.parameters()))
        return optimizers[-1]

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    train.main(short_run(shards, tmp_path))

    train.main(["--resume", str(tmp_path), "--steps", "16"])

    assert [optimizer.steps for optimizer in optimizers] == [12, 16]


def test_what_is_typed_is_saved_at_once(copied_run, monkeypatch):
    """A run that is killed soon, and goes on without the option, still has it."""
    monkeypatch.setattr(superclip.SuperCLIP, "forward", superclip.SuperCLIP.forward)  # to restore
    hook("superclip.SuperCLIP.forward", 1, partial(signal.raise_signal, signal.SIGINT))

    with pytest.raises(KeyboardInterrupt):
        train.main(["--resume", str(copied_run), "--steps", "14", "--learning_rate", "0.25"])

    header = checkpoint_of(copied_run)["header"]
    assert (header["steps"], header["options"]["learning_rate"]) == (14, 0.25)


OTHER_DATA = ["--steps=11", "--train_data=bad-0.tar", "--val_data=none"]
FIXED = train.OPTIONS.keys() - {"resume", *train.MAY_CHANGE}


@pytest.mark.parametrize("option", [*OTHER_DATA, *sorted(FIXED)])
def test_what_cannot_change_is_refused_and_changes_nothing(
    copied_run, shards, monkeypatch, capsys, option
):
    """The run has more than 11 steps. An option that may not be typed is refused with any value,
    also with the one that it has."""
    monkeypatch.chdir(shards)
    name, _, value = option.removeprefix("--").partition("=")
    before = checkpoint_of(copied_run)["header"]["options"]
    files = {path.name: path.read_bytes() for path in copied_run.iterdir()}
    if not value:
        value = before[name] or 1
    values = value if isinstance(value, list) else [value]

    message = error_of(capsys, train.main, "--resume", copied_run, f"--{name}", *values)

    assert f"--{name}" in message
    assert {path.name: path.read_bytes() for path in copied_run.iterdir()} == files


# ---- best.pt


def test_best_pt_is_the_best_of_all_validations(copied_run, monkeypatch):
    """Scores of the longer run are lower here, so best.pt stays."""
    best = copied_run / "best.pt"
    before = best.read_bytes()
    score_pairs = evaluation.score_pairs
    monkeypatch.setattr(
        evaluation, "score_pairs", lambda *x, **more: score_pairs(*x, **more) | {"mean_r1": 0.0}
    )

    train.main(["--resume", str(copied_run), "--steps=13", "--eval_every=100"])

    assert [row["step"] for row in rows_of(copied_run, "zeroshot")] == [0, 4, 8, 12, 13]
    assert best.read_bytes() == before


# ---- the folder

FILES = {  # case -> a name in the folder, the file of a run that has this name, the option
    "a run, not resumed": ("last.pt", "last.pt", "--out_dir"),
    "best.pt, not resumed": ("best.pt", "best.pt", "--out_dir"),
    "best.pt alone": ("best.pt", "best.pt", "--resume"),
    "weights alone": ("last.pt", "best.pt", "--resume"),
    "a log alone, not resumed": ("log.jsonl", "log.jsonl", "--out_dir"),
    "a log alone": ("log.jsonl", "log.jsonl", "--resume"),  # study.compare leaves such folders
}


@cases("name, source, option", FILES)
def test_what_cannot_be_resumed_is_refused_and_kept(
    whole_run, tmp_path, capsys, name, source, option
):
    content = (whole_run / source).read_bytes()
    (tmp_path / name).write_bytes(content)

    message = error_of(capsys, train.main, option, tmp_path)

    assert str(tmp_path) in message
    assert (tmp_path / name).read_bytes() == content


# ---- the log


def test_rows_of_steps_that_a_run_repeats_count_once(tmp_path):
    """The run has died in the middle of a line, and goes on from step 4. Step 6 has no row any more
    in a run that logs every fourth step."""
    lines = [
        '{"step": 0, "header": {"torch": "2.8"}}',
        '{"step": 4, "loss": 5.0}',
        '{"step": 4, "zeroshot": {}, "mean_r1": 0.25}',
        '{"step": 6, "loss": 4.0}',
        '{"step": 8, "lo',
        '{"step": 4, "header": {"torch": "2.9"}}',
        '{"step": 4, "zeroshot": {}, "mean_r1": 0.5}',
        '{"step": 8, "loss": 3.0}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))

    headers, rows = read_log(tmp_path / "log.jsonl")

    assert headers == [{"torch": "2.8"}, {"torch": "2.9"}]
    assert rows == [
        {"step": 4, "loss": 5.0},
        {"step": 4, "zeroshot": {}, "mean_r1": 0.5},
        {"step": 8, "loss": 3.0},
    ]
