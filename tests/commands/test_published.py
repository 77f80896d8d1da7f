"""Compare converted weights with the library that they come from: its features and its tokens.

    DOWNLOAD=1 pytest -k published

downloads published weights. Without DOWNLOAD=1 the same functions compare small models with random
weights, so only the download is not tested.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from material import run, write_checkpoint
from open_clip.tokenizer import SimpleTokenizer
from oracle import assert_near, make_random_model, open_clip_of
from transformers import CLIPModel, CLIPTokenizer

from common.tokenizer import clip_vocabulary
from eval import load
from scripts.convert import main, open_clip_config, read_weights
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
def compare(weights, folder, other_features, tokens):
    """Convert weights, and compare the result with another model of the same weights. Return our
    model. other_features: maps images and tokens to the normalised features of both in the other
    model; tokens (10, T): what the other tokenizer makes of CAPTIONS."""
    assert not run(main, weights, folder / "converted.pt")
    model, tokenizer, _ = load(folder / "converted.pt")
    ours = tokenizer(CAPTIONS)
    images = torch.randn(10, 3, model.config.image_size, model.config.image_size)

    image_features, text_features = other_features(images, tokens)

    for row, other_row, end in zip(ours, tokens, ours.argmax(dim=1)):  # paddings differ
        assert row[: end + 1].tolist() == other_row[: end + 1].tolist()
    assert_near(model.encode_image(images), image_features)
    assert_near(model.encode_text(ours), text_features)
    return model


def features_of(other, images, tokens):
    """Return the normalised features of images and tokens in a model of open_clip."""
    return other.encode_image(images, normalize=True), other.encode_text(tokens, normalize=True)


def compare_with_open_clip(name, folder):
    """name: MODEL/TAG, where the tag may be a file."""
    model, _, tag = name.partition("/")
    other = open_clip.create_model(model, tag, require_pretrained=True).eval()
    tokens = open_clip.get_tokenizer(model)(CAPTIONS)
    return compare(name, folder, partial(features_of, other), tokens)


def compare_with_transformers(weights, folder):
    """weights: a folder of transformers, with a tokenizer."""
    other = CLIPModel.from_pretrained(weights).eval()
    length = other.config.text_config.max_position_embeddings
    pad = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(weights)(CAPTIONS, **pad).input_ids

    def other_features(images, tokens):
        output = other(tokens, images)
        return output.image_embeds, output.text_embeds

    return compare(weights, folder, other_features, tokens)


def compare_with_the_authors(file, folder):
    """file: a checkpoint of the authors' code. The oracle is open_clip, on which it builds."""
    state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): x for name, x in state.items()}
    _, config, _ = read_weights(Path(file))
    config = open_clip_config(SuperCLIPConfig(**config))
    other = open_clip.model.CustomTextCLIP(**config).eval()
    assert not other.load_state_dict(state, strict=False).missing_keys
    tokens = open_clip.get_tokenizer("ViT-B-16")(CAPTIONS, config["text_cfg"]["context_length"])
    return compare(file, folder, partial(features_of, other), tokens)


# ---- published weights


@DOWNLOAD
@pytest.mark.parametrize("name", ["ViT-B-32/laion2b_s34b_b79k", "ViT-B-32-quickgelu/openai"])
def test_published_weights_of_open_clip(name, tmp_path):
    compare_with_open_clip(name, tmp_path)


@DOWNLOAD
def test_published_weights_of_transformers(tmp_path):
    kinds = ["*.json", "*.txt", "pytorch_model.bin"]
    name = "openai/clip-vit-base-patch32"
    weights = snapshot_download(name, allow_patterns=kinds, local_dir=tmp_path / "weights")

    compare_with_transformers(weights, tmp_path)


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
# By default both towers have two heads, and pixels have CLIP's mean and standard deviation.
UNUSUAL = dict(vision_heads=4, text_heads=8, image_mean=(0.5, 0.4, 0.3), image_std=(0.1, 0.2, 0.5))


def test_small_weights_in_place_of_published_ones_of_open_clip(tmp_path):
    small = make_random_model(quick_gelu=True, cls_weight=0, vision_heads=4, text_heads=8, **CLIPS)
    torch.save(open_clip_of(small).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "small-clip.json").write_text(json.dumps(open_clip_config(small.config)))
    open_clip.add_model_config(tmp_path / "small-clip.json")

    model = compare_with_open_clip(f"small-clip/{tmp_path}/weights.pt", tmp_path)

    assert model.config == small.config


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_small_weights_in_place_of_published_ones_of_transformers(quick_gelu, tmp_path):
    """The projections are square, so that their shape does not tell whether they are transposed."""
    more = dict(quick_gelu=quick_gelu, embed_dim=128, cls_weight=0)
    small = make_random_model(**more, **CLIPS, **UNUSUAL)
    path = write_checkpoint(tmp_path / "small.pt", small, clip_vocabulary())
    assert not run(main, path, tmp_path / "folder", "--to", "transformers")
    clip = SimpleTokenizer()  # CLIP's vocabulary in open_clip
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    ids = {special.get(token, token): i for token, i in clip.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=ids, merges=[*clip.bpe_ranks])
    tokenizer.save_pretrained(tmp_path / "folder")

    model = compare_with_transformers(tmp_path / "folder", tmp_path)

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
