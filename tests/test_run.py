"""A run from its first step to its last: it learns, is validated, and keeps its best model."""

import importlib
import json
import shlex
import shutil
from functools import partial

import pytest
import torch
from material import COLOURS, coloured
from runs import (
    checkpoint_of,
    header_of,
    losses_of,
    short_run,
    steps_of,
    validations_of,
    write_vocabulary,
)

import data
import eval as evaluation
import train
from scripts import scenes

pytestmark = pytest.mark.usefixtures("smallest")


def test_a_run_learns(whole_run):
    """At first, it can but guess: ln 16 for its 16 pairs, and about ln V + 1/2 for the words."""
    first, *_, last = losses_of(whole_run)

    assert last["contrastive_loss"] < first["contrastive_loss"] - 0.3
    assert last["classification_loss"] < first["classification_loss"] - 1


# ---- its validations


def test_one_checkpoint_has_one_score(shards, tmp_path):
    """eval.py gives the score of the last validation, even after training in bfloat16."""
    options = "--dtype", "bfloat16", "--val_captions", "json.captions"
    train.main(short_run(shards, tmp_path, *options))

    model, tokenizer, _ = evaluation.load(tmp_path / "last.pt")
    pairs = data.Pairs(data.expand([shards / "val-0.tar"]), tokenizer, 16, ["json.captions"])
    result = evaluation.retrieval(*evaluation.encode_shards(model, pairs))

    assert validations_of(tmp_path)[-1]["validation"] == json.loads(json.dumps(result))


def test_best_pt_is_the_model_of_the_best_validation(shards, tmp_path):
    """A rate that spoils the model after a while. Of equal scores, the last one counts."""
    train.main(short_run(shards, tmp_path, "--learning_rate", 0.02, "--eval_every", 2))

    scores = {row["mean_r1"]: row["step"] for row in validations_of(tmp_path)}
    best = checkpoint_of(tmp_path, "best.pt")
    assert best["mean_r1"] == max(scores)
    assert best["step"] == scores[max(scores)] < 12


@pytest.mark.parametrize("name, val_data", [("best.pt", "val-*.tar"), ("last.pt", "none")])
def test_the_last_lines_name_the_best_model_if_there_is_one(
    shards, tmp_path, monkeypatch, capsys, name, val_data
):
    monkeypatch.chdir(shards)

    train.main(short_run(shards, tmp_path, "--steps", 1, "--val_data", val_data))

    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("  python -m")]
    assert len(commands) == 3
    assert all(f"{tmp_path}/{name}" in command for command in commands)
    assert (tmp_path / "best.pt").exists() == (name == "best.pt")


def test_zero_shot_is_scored_at_every_validation_even_without_pairs(shards, folders, tmp_path):
    options = "--val_data", "none", "--zeroshot_data", folders
    train.main(short_run(shards, tmp_path, *options))

    rows = validations_of(tmp_path)
    assert steps_of(rows) == [4, 8, 12]
    assert [row["zeroshot"][str(folders)]["n"] for row in rows] == [12, 12, 12]


# ---- its data


def test_of_a_folder_with_both_sides_it_trains_on_one_and_validates_on_the_other(
    shards, tmp_path, capsys
):
    for name in ("train-0.tar", "train-1.tar", "val-0.tar", "vocab.tiktoken"):
        shutil.copy(shards / name, tmp_path)
    options = f"--train_data {tmp_path} --out_dir {tmp_path}/out --model tiny --batch_size 16"

    train.main([*options.split(), "--steps=1", "--workers=0", "--device=cpu"])

    assert header_of(tmp_path / "out")["pairs"] == 70
    scores = validations_of(tmp_path / "out")[-1]["validation"]["image_to_text"]
    assert scores["R@1"]["n"] == 20
    assert "1 of the shards" in capsys.readouterr().out


@pytest.mark.parametrize("n, held_out", [(204, 3), (196, 0)])
def test_one_pair_in_a_hundred_is_held_out_of_two_hundred_and_more(tmp_path, n, held_out):
    shard = coloured(tmp_path / "pairs.tar", *n // 4 * [*COLOURS])
    write_vocabulary(tmp_path)
    options = f"--train_data {shard} --out_dir {tmp_path}/out --model tiny --batch_size 16"

    train.main([*options.split(), "--steps=1", "--workers=0", "--device=cpu"])

    assert header_of(tmp_path / "out")["pairs"] == n - held_out
    rows = validations_of(tmp_path / "out")
    assert [row["validation"]["image_to_text"]["R@1"]["n"] for row in rows] == [held_out][:held_out]


@pytest.mark.parametrize("name", ["visual.proj", "token_counts"])
def test_a_seed_is_of_weights_and_order(shards, tmp_path, name):
    """And of dropped patches (test_update.py), captions and crops (test_data.py)."""
    for seed in (0, 1):
        options = "--steps", 1, "--learning_rate", 0, "--seed", seed
        train.main(short_run(shards, tmp_path / str(seed), *options))

    first, other = (checkpoint_of(tmp_path / seed)["model"] for seed in "01")
    assert not torch.equal(first[name], other[name])


def test_a_bare_run_draws_scenes_and_ends_with_commands_that_work(
    few_looks, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    few_scenes = partial(scenes.make_scenes, train=40, val=12)
    monkeypatch.setattr(train, "make_scenes", few_scenes)

    train.main(["--steps=1", "--workers=0", "--device=cpu"])

    printed = capsys.readouterr().out
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  python")]
    assert len(commands) == 3
    for _, _, module, *options in commands:
        importlib.import_module(module).main(options)


# ---- other ways to train


def test_without_the_word_head_it_trains_plain_clip(shards, tmp_path):
    train.main(short_run(shards, tmp_path, "--steps", 2, "--cls_weight", 0))

    model, _, _ = evaluation.load(tmp_path / "last.pt")
    assert model.head is None
    assert "classification_loss" not in losses_of(tmp_path)[-1]


def test_words_can_come_from_other_captions_than_the_text(shards, tmp_path):
    """ "thing" is in the captions of json alone."""
    train.main(short_run(shards, tmp_path, "--steps", 2, "--label_captions", "json.captions"))

    model, tokenizer, _ = evaluation.load(tmp_path / "last.pt")
    assert model.token_counts[tokenizer.encode("thing")] > 0


WAYS = {
    "SigLIP's loss": "--loss sigmoid",
    "micro-batches": "--micro_batch_size 4 --grad_checkpointing --workers 1",
    "fewer patches": "--patch_dropout 0.5 --captions json.captions txt",
    "bfloat16": "--dtype bfloat16",
    "float16": "--dtype float16",
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_other_ways_to_train_learn_too(shards, tmp_path, options):
    train.main(short_run(shards, tmp_path, *options.split()))

    first, *_, last = losses_of(tmp_path)
    assert last["step"] == 12
    assert last["loss"] < first["loss"] - 1
