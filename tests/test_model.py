"""Test the model: the two towers against open_clip's, plain CLIP, and the presets.
superclip.py needs nothing but torch."""

import math
import runpy
import sys

import open_clip
import open_clip.model
import pytest
import torch
import torch.nn.functional as F
import torchvision
from children import ROOT
from material import small_model
from oracle import (
    arguments_of,
    assert_near,
    assert_same_towers,
    make_pairs,
    make_random_model,
    open_clip_of,
    state_of,
)

from superclip import PRESETS, SuperCLIPConfig, attend

# ---- the towers


@pytest.mark.parametrize("T", [10, 16], ids=["short captions", "captions as long as the context"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_the_towers_equal_open_clips(quick_gelu, T):
    heads = {"vision_heads": 1, "text_heads": 4}  # not the 2 of a width of 128
    model = make_random_model(quick_gelu=quick_gelu, **heads)

    assert vars(model.config).items() >= heads.items()
    assert_same_towers(model, open_clip_of(model), T)


def test_a_new_model_starts_with_open_clips_scale_and_spread():
    """The test compares the standard deviation of each tensor. For two draws of n numbers it
    differs by about 1 / sqrt(n)."""
    model = small_model(vision_layers=2, text_layers=2)

    ours = state_of(model)

    theirs = open_clip.model.CLIP(**arguments_of(model.config)).state_dict()
    assert ours["logit_scale"] == theirs["logit_scale"]
    for name in ours.keys() - {"logit_scale"}:
        tolerance = 4 / ours[name].numel() ** 0.5
        expected = pytest.approx(theirs[name].std().item(), rel=tolerance)
        assert ours[name].std().item() == expected, name


def test_a_new_head_has_the_loss_of_logits_of_variance_1():
    model = small_model().train()

    loss = model(*make_pairs(model, B=32))["classification_loss"]

    V = model.config.vocab_size
    assert loss.item() == pytest.approx(math.log(V) + 1 / 2, abs=0.2)


def test_kept_patches_equal_open_clips_patch_dropout():
    """The head, which test_authors.py compares with the authors', reads the kept patches alone."""
    model = make_random_model()
    images, tokens = make_pairs(model)
    keep = torch.tensor([[7, 0, 12]]).expand(4, 3)
    other = open_clip_of(model)
    with_class_token = [0, 8, 1, 13]
    other.visual.patch_dropout.register_forward_hook(lambda _, args, x: x[:, with_class_token])

    features, patches = model.visual(images, keep)

    assert_near(features, other.encode_image(images))
    assert patches.shape == (4, 3, 128)
    assert_near(model.word_logits(images, keep), model.head(patches))


def test_plain_clip_says_that_it_has_no_word_head():
    images = torch.zeros(1, 3, 16, 16)

    with pytest.raises(AssertionError):
        small_model(cls_weight=0).word_logits(images)


def test_uint8_images_are_normalised_by_the_configuration():
    """By default the mean and the standard deviation are CLIP's."""
    mean = (0.5, 0.4, 0.3)
    std = (0.1, 0.2, 0.3)
    model = make_random_model(image_mean=mean, image_std=std)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)

    features = model.encode_image(images)

    floats = torchvision.transforms.functional.normalize(images / 255, mean, std)
    torch.testing.assert_close(features, model.encode_image(floats))
    assert SuperCLIPConfig().image_mean == open_clip.constants.OPENAI_DATASET_MEAN
    assert SuperCLIPConfig().image_std == open_clip.constants.OPENAI_DATASET_STD


def test_under_autocast_blocks_have_its_dtype_and_features_length_1_in_float32():
    """In bfloat16 the length could be wrong by 0.4 %."""
    model = make_random_model()
    seen = set()
    for block in (*model.visual.transformer.resblocks, *model.text.transformer.resblocks):
        block.register_forward_hook(lambda block, args, x: seen.update({args[0].dtype, x.dtype}))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        images, tokens = make_pairs(model)
        features = torch.cat([model.encode_image(images), model.encode_text(tokens)])

    assert seen == {torch.bfloat16}
    assert features.norm(dim=1).tolist() == pytest.approx(8 * [1], abs=1e-6)


def test_attention_on_a_cpu_is_computed_in_float32():
    """In bfloat16 torch's attention is five times slower there."""
    q, k, v = torch.randn(3, 2, 2, 50, 8).bfloat16()

    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v, is_causal=True)

    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert torch.equal(found, exact.bfloat16())


# ---- plain CLIP


def test_from_one_seed_the_towers_are_those_of_plain_clip_bit_for_bit():
    """The study compares runs of both models with the same seed, so they must begin alike."""
    clip = small_model(cls_weight=0).state_dict()  # small_model seeds torch
    superclip = small_model().state_dict()

    assert all(torch.equal(x, superclip[name]) for name, x in clip.items())


def test_an_unknown_loss_is_refused():
    with pytest.raises(AssertionError, match="Softmax"):
        SuperCLIPConfig(loss="Softmax")


# ---- the presets


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"tiny"}))
def test_a_preset_is_open_clips_model_of_that_name(name):
    ours = arguments_of(SuperCLIPConfig(**PRESETS[name]))
    theirs = open_clip.get_model_config(name)

    assert ours["embed_dim"] == theirs["embed_dim"]
    assert ours["vision_cfg"] == {"head_width": 64, **theirs["vision_cfg"]}
    assert ours["text_cfg"] == theirs["text_cfg"]


# ---- superclip.py can be copied alone into another project

# The other packages of requirements.txt, and packages that arrive with them
PACKAGES = ["PIL", "regex", "tiktoken", "torchvision", "tqdm"]


def test_superclip_py_needs_nothing_but_torch(monkeypatch):
    """superclip.py makes a step although nothing else of the project can be imported."""
    for name in (*PACKAGES, "common", *(path.stem for path in ROOT.glob("*.py"))):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails

    code = runpy.run_path(ROOT / "superclip.py")

    config = code["SuperCLIPConfig"](**code["PRESETS"]["tiny"], vocab_size=60)
    model = code["SuperCLIP"](config)
    tokens = torch.tensor([[58, 7, 59], [58, 8, 59]])
    model(torch.zeros(2, 3, 72, 72), tokens)["loss"].backward()
