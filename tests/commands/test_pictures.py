"""scripts/pictures.py: where the validation pictures of a run are, by its checkpoint."""

import pytest
from material import TOKENIZER, make_model

import eval as evaluation
from scripts.pictures import validation_of

VALIDATION = {
    "captions of its own": (
        {"val_data": ["v.tar"], "val_captions": ["json.long"], "captions": ["json.short"]},
        (["v.tar"], ["json.long"]),
    ),
    "captions of training": (
        {"val_data": ["v.tar"], "val_captions": None, "captions": ["json.short"]},
        (["v.tar"], ["json.short"]),
    ),
    "pairs held out of training": ({"val_data": None, "captions": ["txt"]}, (None, ["txt"])),
    "no validation": ({"val_data": ["none"], "captions": ["txt"]}, (None, ["txt"])),
    "odd values": ({"val_data": [5], "captions": {"a": 1}}, (None, ["txt"])),
    "odd options": (5, (None, ["txt"])),
    "no run": (None, (None, ["txt"])),
}


@pytest.mark.parametrize("arguments, expected", VALIDATION.values(), ids=VALIDATION)
def test_a_checkpoint_says_where_its_run_validated(arguments, expected, tmp_path):
    more = {}
    if arguments is not None:
        more = {"arguments": arguments}
    evaluation.write_checkpoint(tmp_path / "best.pt", make_model(), TOKENIZER.vocab, **more)

    assert validation_of(tmp_path / "best.pt") == expected
