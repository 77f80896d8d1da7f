"""Compare converted weights with the library that they come from: its features and its tokens.

    DOWNLOAD=1 pytest -k published

downloads published weights. Without DOWNLOAD=1 the same functions compare small models with random
weights, so only the download is not tested.
"""

import json
import os
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import hf_hub_download, list_repo_files
from material import Evil, error_of, run, write_checkpoint
from oracle import (
    arguments_of,
    assert_near,
    assert_same_towers,
    make_random_model,
    open_clip_of,
)

from common.tokenizer import words_to_tiktoken
from eval import load
from scripts.convert import main, open_clip_state, read_weights
from superclip import SuperCLIPConfig

DOWNLOAD = pytest.mark.skipif(os.environ.get("DOWNLOAD") != "1", reason="needs DOWNLOAD=1")
CAPTIONS = [
    "a photo of a cat",
    "Two dogs, one ball!",
    "it's 3 o'clock at the café",
    "a T-shirt (size XL) for $9.99",
    "first line\nsecond  line",
    "naïve Zürich 東京",
    "snow ❄ falls",
    'A sign says "50% off"; e.g. HERE',
    "",
    "one of " * 60,
]


@torch.no_grad()
def compare(weights, folder, other, tokens):
    """Convert weights, and compare the result with open_clip's model of the same weights. Return
    our model. tokens (10, T): what open_clip's tokenizer makes of CAPTIONS."""
    assert not run(main, weights, folder / "converted.pt")
    model, tokenizer, _ = load(folder / "converted.pt")
    ours = tokenizer(CAPTIONS)
    images = torch.randn(10, 3, model.config.image_size, model.config.image_size)

    assert ours.tolist() == tokens.tolist()
    assert_near(model.encode_image(images), other.encode_image(images, normalize=True))
    assert_near(model.encode_text(ours), other.encode_text(tokens, normalize=True))
    return model


def compare_with_open_clip(name, folder):
    """name: MODEL/TAG, where the tag may be a file."""
    model, _, tag = name.partition("/")
    other = open_clip.create_model(model, tag, require_pretrained=True).eval()
    return compare(name, folder, other, open_clip.get_tokenizer(model)(CAPTIONS))


def compare_with_the_authors(file, folder):
    """file: a checkpoint of the authors' code. The oracle is open_clip, on which it builds."""
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): x for name, x in state.items()}
    _, config, _ = read_weights(Path(file))
    config = arguments_of(SuperCLIPConfig(**config))
    other = open_clip.model.CustomTextCLIP(**config).eval()
    assert not other.load_state_dict(state, strict=False).missing_keys
    tokens = open_clip.get_tokenizer("ViT-B-16")(CAPTIONS, config["text_cfg"]["context_length"])
    return compare(file, folder, other, tokens)


# ---- published weights


@DOWNLOAD
@pytest.mark.parametrize("name", ["ViT-B-32/laion2b_s34b_b79k", "ViT-B-32-quickgelu/openai"])
def test_published_weights_of_open_clip(name, tmp_path):
    compare_with_open_clip(name, tmp_path)


@DOWNLOAD
def test_published_weights_of_the_superclip_authors(tmp_path):
    names = list_repo_files("hustvl/SuperCLIP")
    names = [name for name in names if name.endswith((".pt", ".pth", ".bin"))]
    assert names

    for name in names:
        folder = tmp_path / name.replace("/", "-")
        file = hf_hub_download("hustvl/SuperCLIP", name, local_dir=folder)
        compare_with_the_authors(file, folder)
        shutil.rmtree(folder)  # the files are large


# ---- small models with random weights in their place

CLIPS = {"vocab_size": 49408, "context_length": 20}
HEADS = {"vision_heads": 4, "text_heads": 8}  # by default both towers have two heads
STATS = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.1, 0.2, 0.5)}


def write_open_clip_model(folder, name, model, **facts):
    """Write the weights of a model into weights.pt, and make a model with this name known to
    open_clip. facts: entries of its configuration."""
    torch.save(open_clip_of(model).state_dict(), folder / "weights.pt")
    config = arguments_of(model.config) | facts
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")


def test_small_weights_in_place_of_published_ones_of_open_clip(tmp_path):
    small = make_random_model(quick_gelu=True, cls_weight=0, **HEADS, **CLIPS)
    write_open_clip_model(tmp_path, "small-clip", small)

    model = compare_with_open_clip(f"small-clip/{tmp_path}/weights.pt", tmp_path)

    assert model.config == small.config


def test_small_weights_in_place_of_published_ones_of_the_authors(tmp_path):
    """A file of the authors tells nothing of heads and GELU, and they have the usual values."""
    small = make_random_model(**CLIPS)
    state = open_clip_of(small, custom_text=True).state_dict()
    state["text.attn_mask"] = torch.zeros(20, 20)  # a constant in files of open_clip
    for name, x in small.head.state_dict().items():
        name = name.replace("ln.", "ln_mlp.").replace("linear.", "text_projection.")
        state[f"text_decoder.{name}"] = x
    state["cap_fq"] = torch.zeros(1, 49408, dtype=torch.float64)
    state["num_samples"] = torch.zeros(1, 1, dtype=torch.float64)
    state = {f"module.{name}": x for name, x in state.items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "authors.pt")

    model = compare_with_the_authors(tmp_path / "authors.pt", tmp_path)

    assert model.config == small.config


def test_what_the_tag_of_a_published_model_says_counts_more_than_its_name(tmp_path, monkeypatch):
    small = make_random_model(quick_gelu=True, cls_weight=0, **STATS, **CLIPS)
    write_open_clip_model(tmp_path, "small-tagged", small, quick_gelu=False)
    tag = {"file": str(tmp_path / "weights.pt"), "quick_gelu": True}
    tag |= {"mean": STATS["image_mean"], "std": STATS["image_std"]}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-tagged", {"here": tag})

    assert not run(main, "small-tagged/here", tmp_path / "out.pt")

    assert load(tmp_path / "out.pt")[0].config == small.config


def test_parts_that_we_lack_are_named_though_all_tensors_would_fit(tmp_path, capsys):
    small = make_random_model(**CLIPS)
    text = {**arguments_of(small.config)["text_cfg"], "no_causal_mask": True}
    write_open_clip_model(tmp_path, "other", small, text_cfg=text)

    error = error_of(capsys, main, f"other/{tmp_path}/weights.pt", tmp_path / "x.pt")

    assert "no_causal_mask" in error


def test_the_authors_counters_become_integer_counts(tmp_path):
    """The authors add up shares of captions over steps of 16,384 captions. In this test there are
    two steps. Token 7 is in 75 % of the captions of each step, and token 8 is in 33 captions."""
    state = open_clip_of(make_random_model()).state_dict()
    state["num_samples"] = torch.full((1, 1), 2.0, dtype=torch.float64)
    state["cap_fq"] = torch.zeros(1, 300, dtype=torch.float64)
    state["cap_fq"][0, 7] = 1.5
    state["cap_fq"][0, 8] = 33 / 16384 - 1e-9
    torch.save(state, tmp_path / "authors.pt")

    weights, *_ = read_weights(tmp_path / "authors.pt")

    assert weights["num_captions"].item() == 2 * 16384
    assert weights["token_counts"][[7, 8]].tolist() == [24576, 33]


def test_a_pickle_that_holds_code_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, "model.pt")

    error = error_of(capsys, main, "model.pt", "x.pt")

    assert "model.pt" in error
    assert not Path("mark").exists()


def test_a_folder_of_the_hub_holds_other_files_of_weights(tmp_path):
    """They are in the layout of transformers."""
    small = make_random_model(cls_weight=0, **CLIPS)
    torch.save(open_clip_of(small).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "pytorch_model.bin").touch()

    weights, *_ = read_weights(tmp_path)

    assert weights.keys() == small.state_dict().keys()


# ---- a checkpoint for open_clip, and back


@torch.no_grad()
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_open_clip_loads_what_to_open_clip_writes(loss, tmp_path):
    vocab = words_to_tiktoken(["dog"])
    size = {"vocab_size": len(vocab.splitlines()) + 2}
    model = make_random_model(loss=loss, quick_gelu=True, **size, **HEADS, **STATS)
    path = write_checkpoint(tmp_path / "best.pt", model, vocab)

    assert not run(main, path, tmp_path / "folder", "--to", "open_clip")
    assert not run(main, tmp_path / "folder", tmp_path / "again.pt")

    again, tokenizer, _ = load(tmp_path / "again.pt")
    assert again.config == SuperCLIPConfig(**{**vars(model.config), "cls_weight": 0})
    assert tokenizer.vocab == vocab
    name = f"local-dir:{tmp_path / 'folder'}"
    other, preprocess = open_clip.create_model_from_pretrained(name)
    for one in (model, again):
        assert_same_towers(one, other.eval())
        assert (other.logit_scale, other.logit_bias) == (one.logit_scale, one.logit_bias)
    assert (*preprocess.transforms[-1].mean,) == STATS["image_mean"]


def test_a_module_that_a_fork_adds_does_not_go_to_open_clip():
    model = make_random_model()
    model.text_decoder = torch.nn.Linear(8, 8)

    state = open_clip_state(model)

    assert state.keys() == open_clip_of(make_random_model()).state_dict().keys()
