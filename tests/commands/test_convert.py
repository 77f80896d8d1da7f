"""scripts/convert.py: weights of other layouts become a checkpoint, and a checkpoint becomes what
open_clip and transformers load, by the lines of Python that the command prints."""

import json

import open_clip
import open_clip.model
import pytest
import torch
from material import cases, error_of, run, write_checkpoint
from oracle import assert_near, assert_same_towers, make_pairs, make_random_model, open_clip_of
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

from checkpoint import load
from scripts.convert import (
    ASSUMED,
    check_config,
    main,
    open_clip_config,
    read_shapes,
    rename,
    transformers_state,
)
from superclip import SuperCLIP, SuperCLIPConfig
from tokenizer import Tokenizer, words_to_tiktoken

VOCAB = words_to_tiktoken(["dog"])
V = {"vocab_size": Tokenizer(VOCAB).vocab_size}
STATS = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.1, 0.2, 0.5)}
HEADS = {"vision_heads": 4, "text_heads": 8}  # by default both towers have two


def save(content, path, config=None):
    """config: open_clip's, for the file that its models on the hub have beside them."""
    if config is not None:
        path.with_name("open_clip_config.json").write_text(json.dumps(config))
    torch.save(content, path)
    return path


@pytest.fixture
def converted(tmp_path):
    """A function that converts a file and loads the result."""
    (tmp_path / "own.tiktoken").write_text(VOCAB)

    def convert(path):
        assert not run(main, path, tmp_path / "out.pt", "--vocab", tmp_path / "own.tiktoken")
        return load(tmp_path / "out.pt")[0]

    return convert


def assert_same_but_for_the_head(again, model):
    """Configuration and weights, where `again` is plain CLIP."""
    assert again.config == SuperCLIPConfig(**{**vars(model.config), "cls_weight": 0})
    weights = dict(again.state_dict())
    expected = {name: x for name, x in model.state_dict().items() if name in weights}
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def run_recipe(printed, folder, monkeypatch):
    """Run the lines of Python that convert has printed, in an empty folder. Returns the names that
    they define."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    names = {}
    exec("\n".join(line[2:] for line in printed.splitlines() if line.startswith("  ")), names)
    return names


# ---- weights in


def test_weights_of_open_clip_become_plain_clip(tmp_path, converted):
    """From the layout with the text tower under "text.". Such files hold constants, too."""
    ours = make_random_model(**V)
    state = open_clip_of(ours, custom_text=True).state_dict()
    state["text.attn_mask"] = torch.zeros(16, 16)

    model = converted(save(state, tmp_path / "weights.pt"))

    assert_same_but_for_the_head(model, ours)


def test_a_wrapper_of_transformers_model_changes_no_weight(tmp_path, converted):
    """DistributedDataParallel adds a prefix. The projections are square, so that no shape tells
    whether they were transposed."""
    ours = make_random_model(embed_dim=128, **V)
    state = {f"module.{name}": x for name, x in transformers_state(ours).items()}

    model = converted(save(state, tmp_path / "weights.pt"))

    assert_same_but_for_the_head(model, ours)


# Three scalars are in OpenAI's files only, and mean quick GELU and heads that are 64 wide.
SCALARS = {x: torch.tensor(1) for x in ("input_resolution", "context_length", "vocab_size")}
B32 = open_clip.get_model_config("ViT-B-32-quickgelu")
HUB = {"model_cfg": B32, "preprocess_cfg": {"mean": STATS["image_mean"], "std": (1, 1, 1)}}
# case -> (scalars in the file, open_clip's configuration beside it, the heads of both towers and
# whether GELU is the quick one, the red of the mean, how many facts are assumed)
RED = SuperCLIPConfig.image_mean[0]
KNOWLEDGE = {
    "OpenAI's file": (SCALARS, None, (2, 2, True, RED), 0),
    "nothing is known": ({}, None, (2, 2, False, RED), 3),
    "a model's configuration": ({}, B32, (2, 8, True, RED), 1),
    "that of the hub": ({}, HUB, (2, 8, True, 0.5), 0),
}


@cases("scalars, beside, expected, assumed", KNOWLEDGE)
def test_what_shapes_do_not_tell_is_known_or_said_to_be_assumed(
    tmp_path, converted, capsys, scalars, beside, expected, assumed
):
    other = open_clip_of(make_random_model(quick_gelu=True, **HEADS, **V))
    open_clip.model.convert_weights_to_fp16(other)  # as in OpenAI's files
    path = save(other.state_dict() | scalars, tmp_path / "x.pt", beside)

    c = converted(path).config

    assert (c.vision_heads, c.text_heads, c.quick_gelu, c.image_mean[0]) == expected
    printed = capsys.readouterr().out
    assert sum(text in printed for text in ASSUMED.values()) == assumed
    assert ("open_clip_config.json" in printed) == (assumed > 0)


# ---- weights in, by a name of open_clip


def test_a_name_has_the_weights_and_what_its_tag_says(tmp_path, converted, monkeypatch, capsys):
    """The name says plain GELU, and open_clip's mean and std. But the tag knows better, so nothing
    is assumed."""
    ours = make_random_model(quick_gelu=True, **HEADS, **STATS, **V)
    path = save(open_clip_of(ours).state_dict(), tmp_path / "here.pt")
    config = open_clip_config(ours.config) | {"quick_gelu": False}
    (tmp_path / "small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small.json")
    tag = {"file": str(path), "quick_gelu": True}
    tag |= {"mean": STATS["image_mean"], "std": STATS["image_std"]}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", {"here": tag})

    model = converted("small/here")

    assert_same_but_for_the_head(model, ours)
    assert "Assumed" not in capsys.readouterr().out


NAMES = ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-L-16", "ViT-H-14", "ViT-B-32-256"]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_open_clip_has_our_shapes(name):
    check_config(name, open_clip.get_model_config(name))

    with torch.device("meta"):  # so that weights cost nothing
        state = rename(open_clip.create_model(name, device="meta").state_dict())
        model = SuperCLIP(SuperCLIPConfig(**read_shapes(name, state)))

    model.load_state_dict(state, strict=True)  # which compares all names and shapes


# ---- mistakes

# a name that cannot be converted -> what the sentence names: a part of the model that this project
# lacks, where the names are, or the network
BAD_NAMES = {
    "roberta-ViT-B-32/laion2b_s12b_b32k": "hf_model_name",
    "ViT-B-16-SigLIP/webli": "timm_model_name",
    "coca_ViT-B-32/laion2b_s13b_b90k": "multimodal_cfg",
    "ViT-B-32/laion2b_s34b": "list_pretrained",
    "ViT-B-32/laion2b_s34b_b79k": "network",
}


@pytest.mark.parametrize("name, part", BAD_NAMES.items(), ids=BAD_NAMES)
def test_what_cannot_be_converted_is_refused_before_a_download(
    name, part, tmp_path, monkeypatch, capsys
):
    """The hub's library has no network here, and no file of an earlier download."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    assert part in error_of(capsys, main, name, tmp_path / "x.pt")


# ---- weights out


@torch.no_grad()
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_open_clip_loads_what_to_open_clip_writes(loss, tmp_path, capsys, monkeypatch):
    """A model with the same features, scale and bias, a preprocess with the mean and std of the
    configuration, and a tokenizer with its vocabulary. All of them come back."""
    model = make_random_model(loss=loss, quick_gelu=True, **V, **HEADS, **STATS)
    path = write_checkpoint(tmp_path / "best.pt", model, VOCAB)
    monkeypatch.chdir(tmp_path)

    assert not run(main, path, "folder", "--to", "open_clip")
    assert not run(main, "folder", "again.pt")

    again, tokenizer, _ = load("again.pt")
    assert_same_but_for_the_head(again, model)
    assert tokenizer.vocab == VOCAB
    names = run_recipe(capsys.readouterr().out, tmp_path / "empty", monkeypatch)
    other = names["model"].eval()
    assert_same_towers(model, other)
    assert (other.logit_scale, other.logit_bias) == (model.logit_scale, model.logit_bias)
    normalize = names["preprocess"].transforms[-1]
    assert (*normalize.mean, *normalize.std) == STATS["image_mean"] + STATS["image_std"]
    assert torch.equal(names["tokenizer"](["a dog"]), tokenizer(["a dog"]))


@torch.no_grad()
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_has_the_same_features(quick_gelu, tmp_path, capsys, monkeypatch):
    """Also of a text that goes on after its end. The projections are square, so that no shape tells
    whether they were transposed. What the installed version saves comes back."""
    model = make_random_model(embed_dim=128, quick_gelu=quick_gelu, **V, **HEADS, **STATS)
    path = write_checkpoint(tmp_path / "a.pt", model, VOCAB)
    images, tokens = make_pairs(model)
    tokens[0, 4] = Tokenizer(VOCAB).end

    assert not run(main, path, tmp_path / "export", "--to", "transformers")
    names = run_recipe(capsys.readouterr().out, tmp_path / "empty", monkeypatch)
    out = names["model"](tokens, images)
    names["model"].save_pretrained("saved")
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "export")
    CLIPProcessor(processor, CLIPTokenizer()).save_pretrained("saved")
    assert not run(main, "saved", "again.pt", "--vocab", tmp_path / "export" / "model.tiktoken")

    assert_near(model.encode_image(images), out.image_embeds)
    assert_near(model.encode_text(tokens), out.text_embeds)
    assert_same_but_for_the_head(load("again.pt")[0], model)
