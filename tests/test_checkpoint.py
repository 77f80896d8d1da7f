"""Test that files whose parts do not fit each other are refused, and files that hold code."""

from pathlib import Path

import pytest
import torch
from material import Evil, cases, small_model, write_checkpoint

from common.cli import InputError
from common.tokenizer import words_to_tiktoken
from eval import load

MODEL = small_model()
CONFIG = vars(MODEL.config)
MISFITS = {  # case -> entries of the file, and what the message must name
    "a tensor is missing": ({"model": {}}, "visual.proj"),
    "plain CLIP with a head": ({"config": {**CONFIG, "cls_weight": 0.0}}, "head."),
    "an unknown field": ({"config": {**CONFIG, "colour": 3}}, "colour"),
    "no vocabulary": ({"vocab": "none"}, ""),
    "another vocabulary": ({"vocab": words_to_tiktoken(["red"])}, "515"),
}


@cases("changes, named", MISFITS)
def test_a_checkpoint_whose_parts_do_not_fit_each_other_is_refused(tmp_path, changes, named):
    path = write_checkpoint(tmp_path / "model.pt", MODEL)
    torch.save({**torch.load(path), **changes}, path)

    with pytest.raises(InputError) as error:
        load(path)

    message = str(error.value)
    assert str(path) in message and named in message and "\n" not in message


def test_a_pickle_that_holds_code_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": MODEL.state_dict(), "optimizer": Evil()}, "model.pt")

    with pytest.raises(InputError, match="model.pt .* state_dict"):
        load(Path("model.pt"))

    assert not Path("mark").exists()
