"""Test the commands that a run prints at its end."""

import importlib
import shlex
import shutil
from functools import partial

import pytest
from material import small_model

import train
from common.run import print_commands


def test_the_commands_at_the_end_of_a_run_work(scenes_folder, tmp_path, monkeypatch, capsys):
    """They show the pictures with which the run was validated. The name of the folder could be a
    pattern."""
    folder = tmp_path / "a[1]"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "find_or_make_scenes", partial(shutil.copytree, scenes_folder))
    train.main(["--steps=1", "--workers=0", "--device=cpu"])
    printed = capsys.readouterr().out.splitlines()

    commands = [shlex.split(line) for line in printed if line.startswith("  python")]
    for _, _, module, *options in commands:
        importlib.import_module(module).main(options)

    assert len(commands) == 3
    assert "12 pictures" in capsys.readouterr().out  # found by scripts.search


@pytest.mark.parametrize("names", [["last.pt"], ["last.pt", "best.pt"]])
def test_they_show_best_pt_or_else_last_pt(tmp_path, capsys, names):
    """A run that has only harmed the model has no best.pt."""
    for name in names:
        (tmp_path / name).touch()

    print_commands(tmp_path, small_model(), val_samples=None)

    assert f"{tmp_path / names[-1]} --images" in capsys.readouterr().out
