"""Make models, and open_clip's models with the same weights, for tests that compare the two."""

import open_clip.model
import torch
import torch.nn.functional as F

from superclip import SuperCLIP, SuperCLIPConfig

SMALL = dict(
    image_size=32,
    patch_size=8,
    vision_width=128,
    vision_layers=2,
    text_width=128,
    text_layers=2,
    embed_dim=24,
    context_length=16,
    vocab_size=60,
)


@torch.no_grad()
def make_random_model(**changes):
    """Return a model in which biases and norms are random, too. With their initial zeros and ones,
    a bias in the wrong place would change nothing."""
    model = SuperCLIP(SuperCLIPConfig(**{**SMALL, **changes})).eval()
    for name, p in model.named_parameters():
        if p.ndim == 1 and "class_embedding" not in name:
            p += 0.1 * torch.randn_like(p)
    return model


def make_pairs(model, B=4, T=10):
    """Return random images (B, 3, S, S), and random captions (B, T) with start and end tokens."""
    V = model.config.vocab_size
    S = model.config.image_size
    tokens = torch.randint(1, V - 2, (B, T))
    tokens[:, 0] = V - 2
    tokens[:, -1] = V - 1
    return torch.randn(B, 3, S, S), tokens


def assert_near(ours, theirs):
    """Assert that no element differs by more than 1e-5 of the largest element."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def arguments_of(c):
    """Return the arguments with which open_clip builds the same towers. c: a SuperCLIPConfig."""
    vision = {
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "layers": c.vision_layers,
        "width": c.vision_width,
        "head_width": c.vision_width // c.vision_heads,
    }
    text = {
        "context_length": c.context_length,
        "vocab_size": c.vocab_size,
        "layers": c.text_layers,
        "width": c.text_width,
        "heads": c.text_heads,
    }
    more = {"embed_dim": c.embed_dim, "quick_gelu": c.quick_gelu}
    return {"vision_cfg": vision, "text_cfg": text, **more}


def state_of(model):
    """Return the weights of the towers, and the scale, under open_clip's names."""
    towers = {name: x for name, x in model.state_dict().items() if name.startswith("visual.")}
    for name, x in model.text.state_dict().items():
        towers[name] = x
    return {**towers, "logit_scale": model.logit_scale.data}


def open_clip_of(model, custom_text=False):
    """Return open_clip's CLIP with the same weights. It has two layouts. custom_text: whether to
    use the one in which the text tower is a separate module."""
    state = state_of(model)
    kind = open_clip.model.CLIP
    if custom_text:
        state = open_clip.model.convert_to_custom_text_state_dict(state)
        kind = open_clip.model.CustomTextCLIP
    other = kind(**arguments_of(model.config)).eval()
    other.load_state_dict(state, strict=True)
    return other


@torch.no_grad()
def assert_same_towers(model, other, T=10):
    """Assert that image and text features of our model equal those of open_clip's model. Our model
    gets trimmed captions, and open_clip's the same captions, padded to its context length."""
    images, tokens = make_pairs(model, T=T)
    padded = F.pad(tokens, (0, other.context_length - T))
    assert_near(model.encode_image(images), other.encode_image(images, normalize=True))
    assert_near(model.encode_text(tokens), other.encode_text(padded, normalize=True))
