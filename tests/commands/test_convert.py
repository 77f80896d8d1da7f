"""Test scripts/convert.py. It turns weights of other layouts into a checkpoint, and a checkpoint
into files that open_clip and transformers load."""

import json

import open_clip
import pytest
import torch
from material import error_of, run, write_checkpoint
from oracle import assert_same_towers, make_random_model, open_clip_of

from common.tokenizer import Tokenizer, words_to_tiktoken
from eval import load
from scripts.convert import main, open_clip_config
from superclip import SuperCLIPConfig

VOCAB = words_to_tiktoken(["dog"])
V = {"vocab_size": Tokenizer(VOCAB).vocab_size}
STATS = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.1, 0.2, 0.5)}
HEADS = {"vision_heads": 4, "text_heads": 8}  # by default both towers have two heads


@pytest.fixture
def converted(tmp_path):
    """Return a function that converts weights, or the weights with a name, and loads the result."""
    (tmp_path / "own.tiktoken").write_text(VOCAB)

    def convert(weights):
        if isinstance(weights, dict):
            torch.save(weights, tmp_path / "weights.pt")
            weights = tmp_path / "weights.pt"
        assert not run(main, weights, tmp_path / "out.pt", "--vocab", tmp_path / "own.tiktoken")
        return load(tmp_path / "out.pt")[0]

    return convert


def assert_same_but_for_the_head(again, model):
    """Check that configuration and weights are equal, except that `again` is plain CLIP."""
    assert again.config == SuperCLIPConfig(**{**vars(model.config), "cls_weight": 0})
    weights = dict(again.state_dict())
    expected = {name: x for name, x in model.state_dict().items() if name in weights}
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_openais_file_has_quick_gelu(converted):
    scalars = ("input_resolution", "context_length", "vocab_size")
    ours = make_random_model(quick_gelu=True, **V)
    state = open_clip_of(ours).state_dict() | {name: torch.tensor(1) for name in scalars}

    assert_same_but_for_the_head(converted(state), ours)


def test_a_name_of_open_clip_has_the_weights_and_what_its_tag_says(
    tmp_path, converted, monkeypatch
):
    """The configuration with this name has plain GELU and the mean and std of open_clip. The values
    of the tag replace them."""
    ours = make_random_model(quick_gelu=True, **HEADS, **STATS, **V)
    torch.save(open_clip_of(ours).state_dict(), tmp_path / "here.pt")
    config = open_clip_config(ours.config) | {"quick_gelu": False}
    (tmp_path / "small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small.json")
    tag = {"file": str(tmp_path / "here.pt"), "quick_gelu": True}
    tag |= {"mean": STATS["image_mean"], "std": STATS["image_std"]}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", {"here": tag})

    assert_same_but_for_the_head(converted("small/here"), ours)


def test_parts_that_we_lack_are_named_though_all_tensors_would_fit(tmp_path, capsys):
    ours = make_random_model(**V)
    torch.save(open_clip_of(ours).state_dict(), tmp_path / "here.pt")
    config = open_clip_config(ours.config)
    config["vision_cfg"]["pool_type"] = "avg"
    config["text_cfg"]["no_causal_mask"] = True
    (tmp_path / "other.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "other.json")

    error = error_of(capsys, main, f"other/{tmp_path}/here.pt", tmp_path / "x.pt")

    assert "no_causal_mask, pool_type" in error


# ---- a checkpoint in another layout, and back


@torch.no_grad()
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_open_clip_loads_what_to_open_clip_writes(loss, tmp_path):
    model = make_random_model(loss=loss, quick_gelu=True, **V, **HEADS, **STATS)
    path = write_checkpoint(tmp_path / "best.pt", model, VOCAB)

    assert not run(main, path, tmp_path / "folder", "--to", "open_clip")
    assert not run(main, tmp_path / "folder", tmp_path / "again.pt")

    again, tokenizer, _ = load(tmp_path / "again.pt")
    assert_same_but_for_the_head(again, model)
    assert tokenizer.vocab == VOCAB
    name = f"local-dir:{tmp_path / 'folder'}"
    other, preprocess = open_clip.create_model_from_pretrained(name)
    assert_same_towers(model, other.eval())
    assert (other.logit_scale, other.logit_bias) == (model.logit_scale, model.logit_bias)
    assert (*preprocess.transforms[-1].mean,) == STATS["image_mean"]


@pytest.mark.parametrize("part", [{"layer_norm_eps": 1e-3}, {"hidden_act": "gelu"}])
def test_parts_of_transformers_that_we_lack_are_refused(part, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "a.pt", make_random_model(quick_gelu=True, **V), VOCAB)
    assert not run(main, path, tmp_path / "folder", "--to", "transformers")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["text_config"] |= part
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))

    assert "lacks" in error_of(capsys, main, tmp_path / "folder", tmp_path / "x.pt")


def test_a_folder_without_image_processor_has_clips_statistics_and_this_is_said(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "a.pt", make_random_model(**V, **STATS), VOCAB)
    assert not run(main, path, tmp_path / "folder", "--to", "transformers")
    for file in tmp_path.glob("folder/*processor_config.json"):
        file.unlink()
    capsys.readouterr()

    assert not run(main, tmp_path / "folder", tmp_path / "again.pt")

    assert "mean" in capsys.readouterr().out.partition("wrote")[0]
    again, _, _ = load(tmp_path / "again.pt")
    assert again.config.image_mean == SuperCLIPConfig.image_mean
    assert again.config.image_std == SuperCLIPConfig.image_std
