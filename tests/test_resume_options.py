"""The options of a resumed run: those that the checkpoint has saved, changed by those that are
given, and all of them checked, because last.pt may come from anywhere."""

import shutil

import pytest
from material import COLOURS, coloured, error_of
from runs import change_checkpoint, short_run, write_vocabulary

import train
from cli import InputError

pytestmark = pytest.mark.usefixtures("smallest")


@pytest.fixture
def resume_with(whole_run, tmp_path):
    """resume_with(saved, *given): the options with which a run goes on that has saved these, a
    dict, when those are given."""

    def resume_with(saved, *given):
        shutil.copy(whole_run / "last.pt", tmp_path)
        change_checkpoint(tmp_path, arguments=saved)
        args, _ = train.parse(["--resume", "--out_dir", str(tmp_path), *given])
        return vars(args)

    return resume_with


def options_of(*argv):
    """All options of a run that starts with these, as a dict."""
    args, _ = train.parse(argv)
    return vars(args)


SAVED = {
    "none": "--train_data a.tar",
    "the built-in scenes": "",
    "lists": "--train_data a.tar b/*.tar --captions json.a json.b txt --zeroshot_data x y",
    "a list without entries": "--train_data a.tar --val_data none",
    "names that look like options": "--train_data a.tar --vocab=-v --zeroshot_data=z=1",
    "switches that are on": "--train_data a.tar --compile --grad_checkpointing",
    "switches that are off": "--train_data a.tar --no-compile --no-grad_checkpointing",
    "zeros": "--train_data a.tar --learning_rate 0 --workers 0 --warmup_steps 0",
    "small numbers": "--train_data a.tar --learning_rate 3.3e-7 --head_learning_rate 1e-300",
    "steps": "--train_data a.tar --steps 7 --log_every 3 --eval_every 4 --save_every 5",
    "epochs": "--train_data a.tar --epochs 0.3",
    "another checkpoint": "--train_data a.tar --init_from x.pt --freeze text",
}


@pytest.mark.parametrize("options", SAVED.values(), ids=SAVED)
def test_saved_options_come_back_as_they_were(resume_with, tmp_path, options):
    saved = options_of(*options.split())

    resumed = resume_with(saved)

    assert resumed == {**saved, "out_dir": str(tmp_path), "resume": True}


def test_a_space_in_a_name_is_kept(resume_with):
    saved = options_of("--train_data", "my pairs/a b.tar", "--captions", "json.the text")

    resumed = resume_with(saved)

    assert resumed["train_data"] == ["my pairs/a b.tar"]
    assert resumed["captions"] == ["json.the text"]


GIVEN = {
    "a number": ("--learning_rate 1", {"learning_rate": 1.0}),
    "zero": ("--learning_rate 0", {"learning_rate": 0.0}),
    "a switch": ("--no-compile", {"compile": False}),
    "a list": ("--zeroshot_data z", {"zeroshot_data": ["z"]}),
    "steps instead of epochs": ("--steps 9", {"steps": 9, "epochs": None}),
    "other epochs": ("--epochs 2", {"steps": None, "epochs": 2.0}),
}


@pytest.mark.parametrize("given, expected", GIVEN.values(), ids=GIVEN)
def test_what_is_given_wins(resume_with, given, expected):
    saved = options_of(*"--train_data a.tar --compile --zeroshot_data x y --epochs 3".split())

    resumed = resume_with(saved, *given.split())

    changes = {name: x for name, x in resumed.items() if x != saved[name]}
    del changes["out_dir"], changes["resume"]
    assert {**expected, **changes} == expected
    assert {name: resumed[name] for name in expected} == expected


def test_epochs_replace_steps(resume_with):
    saved = options_of("--train_data", "a.tar", "--steps", "7")

    resumed = resume_with(saved, "--epochs", "2")

    assert resumed["steps"] is None
    assert resumed["epochs"] == 2


def test_an_option_that_is_newer_than_the_checkpoint_has_the_default_of_all_runs(resume_with):
    """Not that of the built-in scenes, which are not cropped: the run has done without it."""
    saved = options_of()
    assert saved.pop("crop_area") == 1.0

    resumed = resume_with(saved)

    assert resumed["crop_area"] == train.make_parser().get_default("crop_area")


FIXED = """--model ViT-S-16, --loss sigmoid, --cls_weight 0.5, --weight_decay 0.3, --seed 1,
--captions json.captions, --label_captions json.captions, --patch_dropout 0.5, --crop_area 0.5,
--vocab clip, --init_from x.pt, --image_size 32, --freeze text, --context_length 8"""


@pytest.mark.parametrize("given", FIXED.replace("\n", " ").split(", "))
def test_what_defines_a_run_cannot_be_changed(whole_run, given):
    option, value = given.split()

    with pytest.raises(InputError, match=option):
        train.parse(["--resume", "--out_dir", str(whole_run), option, value])


# ---- other data


def test_other_training_data_are_refused(copied_run, shards, capsys):
    before = (copied_run / "last.pt").read_bytes()

    options = short_run(shards, copied_run, "--resume", "--train_data", shards / "bad-0.tar")

    assert "--train_data" in error_of(capsys, train.main, *options)
    assert (copied_run / "last.pt").read_bytes() == before


@pytest.fixture
def own_run(shards, tmp_path):
    """The options of a run on shards of its own, which may be changed. It has taken one step."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("train-0.tar", "train-1.tar", "val-0.tar", "vocab.tiktoken"):
        shutil.copy(shards / name, folder)
    options = short_run(folder, tmp_path / "out", "--steps", 1)
    train.main(options)
    return options


def test_other_captions_of_the_same_length_are_refused(own_run, tmp_path, capsys):
    shard = tmp_path / "own" / "train-0.tar"
    shard.write_bytes(shard.read_bytes().replace(b"a red square", b"a wed square"))

    message = error_of(capsys, train.main, *own_run, "--resume")

    assert "shards" in message


def test_validation_data_cannot_take_the_place_of_pairs_that_were_held_out(tmp_path, capsys):
    shard = coloured(tmp_path / "all.tar", *60 * [*COLOURS])
    val_shard = coloured(tmp_path / "val.tar", *COLOURS)
    write_vocabulary(tmp_path)
    options = f"--train_data {shard} --out_dir {tmp_path}/out"
    options += " --model tiny --batch_size 16 --steps 1 --workers 0 --device cpu"
    train.main(options.split())

    message = error_of(capsys, train.main, *options.split(), "--resume", "--val_data", val_shard)

    assert "--val_data" in message
