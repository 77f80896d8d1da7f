"""The model: the two towers against open_clip's, the word head, and the sizes of the presets."""

import open_clip
import open_clip.model
import pytest
import torch
import torch.nn.functional as F
import torchvision

from scripts.convert import open_clip_config, open_clip_state
from superclip import PRESETS, InputError, SuperCLIP, SuperCLIPConfig

V = 60
SMALL = dict(image_size=32, patch_size=8, vision_width=128, vision_layers=2, text_width=64)
SMALL |= dict(text_layers=2, embed_dim=24, context_length=16, vocab_size=V)


def small(**changes):
    """A small model with random biases and norms. At their initial zeros and ones, a bias in the
    wrong place would change nothing."""
    return stir(SuperCLIP(SuperCLIPConfig(**{**SMALL, **changes})).eval())


@torch.no_grad()
def stir(model):
    for name, p in model.named_parameters():
        if p.ndim == 1 and "class_embedding" not in name:  # biases and norms
            p += 0.1 * torch.randn_like(p)
    return model


def pairs(B=4, T=10, config=None):
    """Random images (B, 3, S, S) and captions (B, T) that start and end as captions do."""
    config = config or SuperCLIPConfig(**SMALL)
    V = config.vocab_size
    tokens = torch.randint(1, V - 2, (B, T))
    tokens[:, 0], tokens[:, -1] = V - 2, V - 1
    return torch.randn(B, 3, config.image_size, config.image_size), tokens


def close(mine, other, tolerance=1e-5):
    """No element differs by more than 1e-5 of the largest one."""
    assert mine.shape == other.shape
    assert (mine - other).abs().max() <= tolerance * other.abs().max()


@torch.no_grad()
def same_features(model, other, normalize=True, **shape):
    """Image and text features of our model equal those of open_clip's. Ours gets trimmed captions,
    open_clip's the same ones padded to the whole context."""
    images, tokens = pairs(config=model.config, **shape)
    padded = F.pad(tokens, (0, other.context_length - tokens.shape[1]))
    close(model.encode_image(images, normalize), other.encode_image(images, normalize))
    close(model.encode_text(tokens, normalize), other.encode_text(padded, normalize))


def open_clip_of(model, custom_text=False):
    """A model of open_clip's with the same weights, loaded strictly."""
    kind = open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP
    other = kind(**open_clip_config(model.config)).eval()
    state = open_clip_state(model)
    if custom_text:
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    other.load_state_dict(state, strict=True)
    return other


# -----------------------------------------------------------------------------
# The towers


def test_a_later_token_changes_no_earlier_one():
    """Outputs of the text transformer before and after token 6 is replaced."""
    model, (_, tokens) = small(), pairs()
    read = []
    model.text.transformer.register_forward_hook(lambda module, args, out: read.append(out))
    model.encode_text(tokens)
    tokens[:, 6] = tokens[:, 6] % 50 + 1
    model.encode_text(tokens)
    before, after = read
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(dim=2) > 1e-3).all()


def test_the_image_tower_is_not_causal():
    """A change of the last patch changes the output at every token."""
    model, (images, _) = small(), pairs()
    tokens = model.visual(images)
    images[:, :, -8:, -8:] += 1  # the last patch
    assert ((model.visual(images) - tokens).abs().amax(dim=2) > 1e-4).all()


def test_what_comes_after_the_end_token_changes_nothing():
    """Text features of the same captions, trimmed, padded, and with other tokens after the end."""
    model, (_, tokens) = small(), pairs(T=10)
    features = model.encode_text(tokens)
    for T in (11, 16):
        longer = F.pad(tokens, (0, T - 10))
        torch.testing.assert_close(model.encode_text(longer), features)
        longer[:, 10:] = torch.randint(1, V, (4, T - 10))  # even a second end token
        torch.testing.assert_close(model.encode_text(longer), features)
    tokens[:, 8] = tokens[:, 8] % 50 + 1  # before it, everything does
    assert ((model.encode_text(tokens) - features).abs().amax(dim=1) > 1e-4).all()


@pytest.mark.parametrize("changes", [{}, dict(image_mean=(0.5, 0.4, 0.3), image_std=(0.1,) * 3)])
def test_uint8_images_equal_floats_normalised_by_the_configuration(changes):
    model = small(**changes)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = model.config.image_mean, model.config.image_std
    floats = torchvision.transforms.functional.normalize(images / 255, mean, std)
    torch.testing.assert_close(model.encode_image(images), model.encode_image(floats))
    torch.testing.assert_close(model.class_logits(images), model.class_logits(floats))


def test_features_have_length_one_unless_asked_otherwise():
    model, (images, tokens) = small(), pairs()
    for encode, x in ((model.encode_image, images), (model.encode_text, tokens)):
        torch.testing.assert_close(encode(x).norm(dim=1), torch.ones(4))
        torch.testing.assert_close(F.normalize(encode(x, normalize=False), dim=1), encode(x))
    out = model(images, tokens)
    torch.testing.assert_close(out["image_features"], model.encode_image(images))
    torch.testing.assert_close(out["text_features"], model.encode_text(tokens))


def test_keeping_all_patches_is_leaving_none_out():
    model, (images, _) = small(), pairs()
    keep = torch.arange(16).expand(4, 16)
    torch.testing.assert_close(model.encode_image(images, keep=keep), model.encode_image(images))
    torch.testing.assert_close(model.class_logits(images, keep), model.class_logits(images))


def test_keeping_some_patches_equals_open_clips_patch_dropout():
    model, (images, tokens) = small(), pairs()
    keep = torch.stack([torch.randperm(16)[:5] for _ in range(4)])
    other = open_clip_of(model)
    other.visual.patch_dropout.register_forward_hook(  # class token, then the kept patches
        lambda _, args, x: torch.stack([torch.cat([x[i, :1], x[i, 1:][keep[i]]]) for i in range(4)])
    )
    close(model.encode_image(images, keep=keep), other.encode_image(images, normalize=True))
    with_keep = model(images, tokens, keep=keep)["image_features"]
    torch.testing.assert_close(with_keep, model.encode_image(images, keep=keep))


def test_the_head_reads_the_mean_of_the_patches_without_the_class_token():
    """Logits against the formula: linear(layer_norm(mean of tokens 1 to P))."""
    model, (images, _) = small(), pairs()
    x = model.visual(images)[:, 1:]
    x = F.layer_norm(x.sum(dim=1) / 16, (128,), model.head.ln.weight, model.head.ln.bias)
    expected = x @ model.head.linear.weight.T + model.head.linear.bias
    close(model.class_logits(images), expected)


def test_cls_weight_0_is_exactly_clip():
    """No head, the tensors of open_clip's CLIP, its loss alone. From one seed, the towers are those
    of the model with a head, bit for bit."""
    torch.manual_seed(1)
    clip = SuperCLIP(SuperCLIPConfig(**SMALL, cls_weight=0))
    torch.manual_seed(1)
    superclip = SuperCLIP(SuperCLIPConfig(**SMALL))
    other = open_clip.model.CLIP(**open_clip_config(clip.config))
    assert clip.head is None
    assert open_clip_state(clip).keys() == other.state_dict().keys()
    images, tokens = pairs()
    out = clip.train()(images, tokens)
    assert torch.equal(out["loss"], out["contrastive_loss"]) and out["classification_loss"] == 0
    contrastive = superclip(images, tokens)["contrastive_loss"]
    torch.testing.assert_close(out["contrastive_loss"], contrastive, rtol=0, atol=0)
    with pytest.raises(InputError, match="no word head"):
        clip.class_logits(images)


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_the_residual_stream_has_one_dtype_under_autocast(tower, monkeypatch):
    """Input and output of every block, and of every layer norm in it, are bfloat16. CUDA's autocast
    returns float32 from layer_norm. Here the CPU's does the same."""
    layer_norm, dtypes = F.layer_norm, []
    monkeypatch.setattr(F, "layer_norm", lambda x, *args: layer_norm(x.float(), *args))
    model, (images, tokens) = small(), pairs()

    def keep_dtypes(module, args, out):
        dtypes.extend((args[0].dtype, out.dtype))

    for block in getattr(model, tower).transformer.resblocks:
        for module in (block, block.ln_1, block.ln_2):
            module.register_forward_hook(keep_dtypes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.layer_norm(torch.zeros(2, 2).bfloat16(), (2,)).dtype == torch.float32
        model(images, tokens)
    assert dtypes == [torch.bfloat16] * 12  # 2 blocks, 3 modules, input and output


# -----------------------------------------------------------------------------
# Sizes, against the paper and open_clip


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_the_papers():
    """Also the head's share of CLIP's parameters: 12 % in ViT-L, 25 % in ViT-B."""
    with torch.device("meta"):
        base = SuperCLIP(SuperCLIPConfig.preset("ViT-B-16"))
        large = SuperCLIP(SuperCLIPConfig.preset("ViT-L-16"))
    assert count(base.visual) == 86_192_640
    assert count(base.text) == 63_428_096
    assert count(base.head) == 37_996_288
    assert count(base) == 187_617_025 == 86_192_640 + 63_428_096 + 37_996_288 + 1
    assert count(large) == 478_384_641
    assert count(large.head) / (count(large) - count(large.head)) == pytest.approx(0.12, abs=0.005)
    assert count(base.head) / (count(base) - count(base.head)) == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_open_clips_model_of_that_name(name):
    """Names and shapes of all tensors, and the number of heads."""
    ours, theirs = SuperCLIPConfig.preset(name), open_clip.get_model_config(name)
    with torch.device("meta"):
        model = SuperCLIP(ours)
        mine = open_clip_config(model.config)
        if theirs is None:
            assert name == "tiny"
            return
        other = open_clip.model.CLIP(**theirs)
        shapes = {k: v.shape for k, v in other.state_dict().items()}
    assert {k: v.shape for k, v in open_clip_state(model).items()} == shapes
    heads = theirs["text_cfg"]["heads"], theirs["vision_cfg"].get("head_width", 64)
    assert (mine["text_cfg"]["heads"], mine["vision_cfg"]["head_width"]) == heads


def test_an_impossible_configuration_is_an_input_error():
    with pytest.raises(InputError, match="unknown model 'ViT-X'.*ViT-B-16"):
        SuperCLIPConfig.preset("ViT-X")
    for wrong in (dict(image_size=30), dict(vision_heads=3), dict(text_heads=5), dict(loss="mse")):
        with pytest.raises(InputError):
            SuperCLIPConfig(**{**SMALL, **wrong})


# -----------------------------------------------------------------------------
# Against open_clip


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_small_towers_equal_open_clips(quick_gelu):
    """Features, also before normalisation. With the other activation they differ."""
    model = small(quick_gelu=quick_gelu, patch_size=16)
    other = open_clip_of(model)
    same_features(model, other)
    same_features(model, other, normalize=False)
    same_features(model, other, T=16)  # the whole context
    wrong = small(quick_gelu=not quick_gelu, patch_size=16)
    wrong.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError):
        same_features(wrong, other)


@pytest.fixture(scope="module")
def weights():
    """Those of a ViT-B-32: 151 million random numbers take a second."""
    return stir(SuperCLIP(SuperCLIPConfig.preset("ViT-B-32", cls_weight=0))).state_dict()


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_full_vit_b_32_equals_open_clips(quick_gelu, weights):
    """Features of the model that open_clip builds from its own configuration of that name."""
    with torch.device("meta"):
        config = SuperCLIPConfig.preset("ViT-B-32", quick_gelu=quick_gelu, cls_weight=0)
        model = SuperCLIP(config).eval()
        name = "ViT-B-32-quickgelu" if quick_gelu else "ViT-B-32"
        other = open_clip.model.CLIP(**open_clip.get_model_config(name))
    model.load_state_dict(weights, assign=True)
    other.load_state_dict(open_clip_state(model), strict=True, assign=True)
    other.attn_mask = torch.full((77, 77), -torch.inf).triu(1)  # the buffer was on meta
    same_features(model, other.eval(), B=1, T=77)
