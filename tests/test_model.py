"""The model: the two towers against open_clip's, the word head, and the sizes of the presets."""

import open_clip
import open_clip.model
import pytest
import torch
import torch.nn.functional as F
import torchvision
from material import SMALL, close, open_clip_of, pairs, same_towers, small

from scripts.convert import open_clip_state
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_small_towers_equal_open_clips(quick_gelu):
    """With captions of 10 tokens and of the whole context."""
    model = small(quick_gelu=quick_gelu, text_heads=4)
    other = open_clip_of(model)
    same_towers(model, other)
    same_towers(model, other, T=16)


def test_kept_patches_equal_open_clips_patch_dropout():
    model = small()
    images, tokens = pairs(model)
    keep = torch.stack([torch.randperm(16)[:5] for _ in range(4)])
    other = open_clip_of(model)
    other.visual.patch_dropout.register_forward_hook(  # class token, then the kept patches
        lambda _, args, x: torch.stack([torch.cat([x[i, :1], x[i, 1:][keep[i]]]) for i in range(4)])
    )
    close(model.encode_image(images, keep=keep), other.encode_image(images, normalize=True))
    out = model(images, tokens, keep=keep)
    torch.testing.assert_close(out["image_features"], model.encode_image(images, keep=keep))
    torch.testing.assert_close(out["text_features"], model.encode_text(tokens))


def test_uint8_images_are_normalised_by_the_configuration():
    default = SuperCLIPConfig()
    assert default.image_mean == open_clip.constants.OPENAI_DATASET_MEAN
    assert default.image_std == open_clip.constants.OPENAI_DATASET_STD
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    model = small(image_mean=mean, image_std=std)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    floats = torchvision.transforms.functional.normalize(images / 255, mean, std)
    torch.testing.assert_close(model.encode_image(images), model.encode_image(floats))
    torch.testing.assert_close(model.class_logits(images), model.class_logits(floats))


def test_the_residual_stream_has_one_dtype_under_autocast(monkeypatch):
    """Input and output of every block, and of every layer norm in it, are bfloat16. CUDA's autocast
    returns float32 from layer_norm. There is no GPU here, so the CPU's is made to do the same."""
    layer_norm, dtypes = F.layer_norm, []
    monkeypatch.setattr(F, "layer_norm", lambda x, *args: layer_norm(x.float(), *args))
    model = small()
    for block in [*model.visual.transformer.resblocks, *model.text.transformer.resblocks]:
        for module in (block, block.ln_1, block.ln_2):
            module.register_forward_hook(lambda _, x, y: dtypes.extend((x[0].dtype, y.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*pairs(model))
    assert dtypes == [torch.bfloat16] * 24  # 4 blocks, 3 modules, input and output


def test_the_head_reads_the_mean_of_the_patches_without_the_class_token():
    """Logits against the formula: linear(layer_norm(mean of the kept patches))."""
    model = small()
    images, _ = pairs(model)
    for keep in (None, torch.tensor([[3, 1, 9]]).expand(4, 3)):
        x = model.visual(images, keep)[:, 1:]
        x = F.layer_norm(x.sum(dim=1) / x.shape[1], (128,), *model.head.ln.parameters())
        weight, bias = model.head.linear.parameters()
        close(model.class_logits(images, keep), x @ weight.T + bias)


def test_cls_weight_0_is_exactly_clip():
    """No head, the tensors of open_clip's CLIP, its loss alone. From one seed, the towers are those
    of the model with a head, bit for bit."""
    torch.manual_seed(1)
    clip = SuperCLIP(SuperCLIPConfig(**SMALL, cls_weight=0)).train()
    torch.manual_seed(1)
    superclip = SuperCLIP(SuperCLIPConfig(**SMALL))
    names = {name.removeprefix("text.") for name in clip.state_dict()}
    assert names == open_clip_of(clip).state_dict().keys()
    images, tokens = pairs(clip)
    out = clip(images, tokens)
    assert torch.equal(out["loss"], out["contrastive_loss"]) and "classification_loss" not in out
    assert torch.equal(out["loss"], superclip(images, tokens)["contrastive_loss"])
    with pytest.raises(ValueError, match="cls_weight 0"):
        clip.class_logits(images)


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"tiny"}))
def test_a_preset_is_open_clips_model_of_that_name(name):
    """Names and shapes of all tensors, and the number of heads, which no shape tells."""
    theirs = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = SuperCLIP(SuperCLIPConfig(**PRESETS[name]))
        other = open_clip.model.CLIP(**theirs)
    shapes = {k: v.shape for k, v in other.state_dict().items()}
    assert {k: v.shape for k, v in open_clip_state(model).items()} == shapes
    assert model.config.text_heads == theirs["text_cfg"]["heads"]
    head_width = theirs["vision_cfg"].get("head_width", 64)
    assert model.config.vision_heads == model.config.vision_width // head_width
