"""SuperCLIP: CLIP plus one linear layer that names the words of the caption (arXiv 2512.14480).

CLIP pulls an image and its caption together and pushes the other pairs of the batch apart. That
asks of a batch only what tells its pairs from each other, so small batches teach little. SuperCLIP
adds a second question that needs no other pair: *which words does the caption contain?* It is asked
of the mean of the image's patch tokens, through one linear layer, with rare words counting for
more.

                  .-> mean of patches -> LayerNorm -> Linear(V) -> classification loss -.
    image -> ViT -+                                                                      +-> loss
                  '-> class token -> proj ------------.                                 /
                                                       >-> contrastive loss -----------'
    caption -> text transformer -> end token -> proj -'

Read on from here in that order: configuration, the transformer that both towers share, the two
towers, the head, the losses, the model that joins them, and weights in and out.

Axes: B pairs, P patches (K of them kept), T tokens, D width, H heads, E embedding, V vocabulary;
S pixels a side.

`python superclip.py` follows one pair through the model and prints every shape.
"""

import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  (all_gather with gradients)
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

# Mean and std of the RGB channels of CLIP's own training set: every published CLIP expects them.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
PAD = 0  # token id that fills short captions up; in CLIP's vocabulary it is also the byte "!"


class InputError(ValueError):
    """Something the user gave cannot work. The message says what, in one sentence."""


# -----------------------------------------------------------------------------
# Configuration


@dataclass
class SuperCLIPConfig:
    """Everything that fixes the model's shape and its loss; it travels inside every checkpoint."""

    image_size: int = 224  # pixels; images are square
    patch_size: int = 16  # pixels; P = (image_size / patch_size) ** 2
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 0  # 0: width / 64, as in every published CLIP
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 0  # 0: width / 64
    embed_dim: int = 512  # E, where images and texts meet
    context_length: int = 77  # tokens that the text tower sees; the labels see the whole caption
    vocab_size: int = 49408  # V; ids V-2 and V-1 are start and end of text
    quick_gelu: bool = False  # x * sigmoid(1.702 x), for OpenAI's weights only
    loss: str = "softmax"  # contrastive loss: softmax (CLIP) or sigmoid (SigLIP)
    cls_weight: float = 1.0  # lambda; 0 builds no head, and what is left is exactly CLIP

    def __post_init__(self):
        self.vision_heads = self.vision_heads or max(1, self.vision_width // 64)
        self.text_heads = self.text_heads or max(1, self.text_width // 64)
        if self.image_size % self.patch_size:
            raise InputError(
                f"image size {self.image_size} is no multiple of the patch size {self.patch_size}"
            )
        if self.vision_width % self.vision_heads or self.text_width % self.text_heads:
            raise InputError("the width of a tower must be a multiple of its number of heads")
        if self.loss not in ("softmax", "sigmoid"):
            raise InputError(f"loss is softmax or sigmoid, not {self.loss!r}")

    @classmethod
    def preset(cls, name, **changes):
        """The configuration of that name in PRESETS, with fields replaced by `changes`."""
        if name not in PRESETS:
            raise InputError(f"unknown model {name!r}: choose from {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})


# fmt: off
SHAPE = ("image_size", "patch_size", "vision_width", "vision_layers",
         "text_width", "text_layers", "embed_dim")
PRESETS = {
    "tiny":     dict(zip(SHAPE, ( 72, 12,  128,  4, 128,  2, 128)), vision_heads=4, text_heads=4),
    "ViT-S-16": dict(zip(SHAPE, (224, 16,  384, 12, 384, 12, 384))),
    "ViT-B-32": dict(zip(SHAPE, (224, 32,  768, 12, 512, 12, 512))),
    "ViT-B-16": dict(zip(SHAPE, (224, 16,  768, 12, 512, 12, 512))),
    "ViT-L-16": dict(zip(SHAPE, (224, 16, 1024, 24, 768, 12, 768))),
    "ViT-L-14": dict(zip(SHAPE, (224, 14, 1024, 24, 768, 12, 768))),
}
# fmt: on


# -----------------------------------------------------------------------------
# One transformer for both towers


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU. Their weights need it; new models have no reason to."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention. Parameters are named as in nn.MultiheadAttention: weights load."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)  # torch's default; CLIP's image tower keeps it
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal):
        B, T, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3D)
        qkv = qkv.view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
        # is_causal and no mask tensor: a mask would shut out the flash kernels
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Pre-norm residual block: tokens exchange information, then each is transformed alone."""

    def __init__(self, width, heads, quick_gelu):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU() if quick_gelu else nn.GELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )

    def forward(self, x, causal):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks. The image tower looks everywhere, the text tower only back (causal)."""

    def __init__(self, width, layers, heads, quick_gelu, causal):
        super().__init__()
        self.causal = causal
        self.resblocks = nn.ModuleList(Block(width, heads, quick_gelu) for _ in range(layers))
        # Trades time for memory: blocks are computed again in the backward pass.
        self.grad_checkpointing = False

    def forward(self, x):
        for block in self.resblocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, self.causal, use_reentrant=False)
            else:
                x = block(x, self.causal)
        return x


# -----------------------------------------------------------------------------
# The towers


class VisionTransformer(nn.Module):
    """Image -> one token per patch, and a class token that speaks for the whole image."""

    def __init__(self, config):
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        self.grid = config.image_size // patch  # patches per side
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(self.grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, config.vision_layers, config.vision_heads, config.quick_gelu, causal=False
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(self, images, keep=None):
        """images (B, 3, S, S), uint8 or float that is already normalised -> tokens (B, 1 + K, D).
        keep (B, K): which patches to look at, as indices in reading order; None is all of them."""
        if images.dtype == torch.uint8:
            images = (images / 255 - self.mean) / self.std
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, P, D)
        x = x + self.positional_embedding[1:].to(x.dtype)  # else autocast is undone
        if keep is not None:  # dropped patches cost nothing: they never enter the transformer
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))  # (B, K, D)
        cls = (self.class_embedding + self.positional_embedding[0]).to(x.dtype)
        x = torch.cat([cls.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + K, D)
        return self.ln_post(self.transformer(self.ln_pre(x)))


class TextTransformer(nn.Module):
    """Caption -> one feature, read at the end token, the only one that has seen all of it."""

    def __init__(self, config):
        super().__init__()
        width, layers = config.text_width, config.text_layers
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.transformer = Transformer(
            width, layers, config.text_heads, config.quick_gelu, causal=True
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        # CLIP's: the deeper the tower, the smaller what a block adds to the residual stream.
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def forward(self, tokens):
        """tokens (B, T), T <= context_length. Columns after the end token change nothing: attention
        is causal. Returns (B, E)."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B, T, D)
        x = self.transformer(x)
        # The end token is the largest id, so argmax finds it (the first, if there are two).
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]  # (B, D)
        return self.ln_final(x) @ self.text_projection


class WordHead(nn.Module):
    """All that SuperCLIP adds: mean of the patch tokens -> LayerNorm -> one logit per token of V.

    The paper says "a linear layer"; the authors' code has the LayerNorm before it, and so have we.
    """

    def __init__(self, width, vocab_size):
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.linear = nn.Linear(width, vocab_size)
        nn.init.normal_(self.linear.weight, std=width**-0.5)  # logits of variance 1 at the start
        nn.init.zeros_(self.linear.bias)

    def forward(self, image_tokens):
        patches = image_tokens[:, 1:].mean(dim=1)  # (B, D): the class token is left out
        return self.linear(self.ln(patches))  # (B, V)


# -----------------------------------------------------------------------------
# The losses: free functions of tensors


def gather(features):
    """(B, E) -> the features of all processes in rank order (world * B, E), with gradients, and the
    row where this process's own begin."""
    if not (dist.is_available() and dist.is_initialized()):
        return features, 0
    everyone = torch.cat(dist.nn.functional.all_gather(features.contiguous()))
    return everyone, dist.get_rank() * len(features)


def contrastive_loss(image_features, text_features, logit_scale):
    """CLIP's loss: each image must pick its caption out of the batch, each caption its image.

    image_features, text_features (B, E) of length 1; logit_scale: inverse temperature, a scalar.
    With several processes each computes its own B rows against everybody's columns, and the mean of
    the processes' losses is the loss of the global batch. At the start it is near ln(global batch).
    """
    # fp32 whatever the autocast: bf16 spaces numbers near the largest logit, 100, by 0.5
    image_features, text_features = image_features.float(), text_features.float()
    all_images, _ = gather(image_features)
    all_texts, first = gather(text_features)
    target = first + torch.arange(len(image_features), device=image_features.device)
    with torch.autocast(image_features.device.type, enabled=False):
        logits_per_image = logit_scale * image_features @ all_texts.T  # (B, world * B)
        logits_per_text = logit_scale * text_features @ all_images.T
    image_loss = F.cross_entropy(logits_per_image, target)
    text_loss = F.cross_entropy(logits_per_text, target)
    return (image_loss + text_loss) / 2


def sigmoid_loss(image_features, text_features, logit_scale, logit_bias):
    """SigLIP's loss (arXiv 2303.15343): every image-caption combination is a yes/no question.

    Shapes as in contrastive_loss. Summed over a row and averaged over rows, as in the paper.
    """
    image_features, text_features = image_features.float(), text_features.float()
    all_texts, first = gather(text_features)
    with torch.autocast(image_features.device.type, enabled=False):
        logits = logit_scale * image_features @ all_texts.T + logit_bias  # (B, world * B)
    yes = torch.zeros_like(logits)
    yes.diagonal(first).fill_(1)
    return F.binary_cross_entropy_with_logits(logits, yes, reduction="sum") / len(logits)


def token_sets(label_tokens):
    """Captions (B, T) -> their tokens, sorted, and True at the first of equal ones, both (B, T)."""
    tokens = label_tokens.sort(dim=1).values
    return tokens, F.pad(tokens[:, 1:] != tokens[:, :-1], (1, 0), value=True)


def classification_loss(logits, label_tokens, token_weights):
    """SuperCLIP's loss: softmax cross-entropy against the caption's words (paper, eq. 2-4).

    logits (B, V) from the head; label_tokens (B, T), the whole captions; token_weights (V,), the
    IDF, 0 for tokens that are no words. The label of a caption is its *set* of tokens, weighted and
    normalised to sum 1. A caption without weight adds 0. At the start the loss is near ln V + 1/2.
    """
    # The label has at most T entries a row, so it stays (B, T): a dense (B, V) label is never made.
    tokens, first = token_sets(label_tokens)
    label = token_weights[tokens] * first  # (B, T): a word that comes twice counts once
    label = label / label.sum(dim=1, keepdim=True).clamp_min(1e-8)
    logits = logits.float()
    log_probs = logits.gather(1, tokens) - logits.logsumexp(dim=1, keepdim=True)  # (B, T)
    return -(label * log_probs).sum(dim=1).mean()


# -----------------------------------------------------------------------------
# The model

HEAD_STATE = ("head.", "token_counts", "num_captions")  # what plain CLIP's weights do not have


class SuperCLIP(nn.Module):
    """Both towers, the head, and the statistics that weight its words."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config)
        self.text = TextTransformer(config)
        self.head = WordHead(config.vision_width, config.vocab_size) if config.cls_weight else None
        # Start at CLIP's temperature 0.07; SigLIP's 10 and -10 make most answers "no" at first.
        sigmoid = config.loss == "sigmoid"
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10 if sigmoid else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None
        if self.head is not None:
            # Integers, so that no precision ever stops them from counting. n_c and N in the paper.
            self.register_buffer("token_counts", torch.zeros(config.vocab_size, dtype=torch.long))
            self.register_buffer("num_captions", torch.zeros((), dtype=torch.long))

    def encode_image(self, images, normalize=True, keep=None):
        """images (B, 3, S, S) uint8, or float already normalised -> features (B, E), length 1 if
        `normalize`. keep (B, K): indices of the patches to look at."""
        features = self.visual(images, keep)[:, 0] @ self.visual.proj
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, tokens, normalize=True):
        """tokens (B, T) from a Tokenizer -> features (B, E), of length 1 if `normalize`."""
        features = self.text(tokens)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def class_logits(self, images, keep=None):
        """images, keep as in encode_image -> logits (B, V): which words would a caption use?"""
        if self.head is None:
            raise InputError("this model is plain CLIP (cls_weight 0): it has no word head")
        return self.head(self.visual(images, keep))

    def count_tokens(self, label_tokens):
        """Add captions (B, T), of all processes together, to the token statistics."""
        tokens, first = token_sets(label_tokens)
        seen = torch.zeros(len(self.token_counts) + 1, dtype=torch.long, device=tokens.device)
        seen.scatter_add_(0, tokens.flatten(), first.flatten().long())
        seen[-1] = len(tokens)  # rides along: one all_reduce for both
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(seen)
        self.token_counts += seen[:-1]
        self.num_captions += seen[-1]

    def token_weights(self):
        """IDF of every token, (V,): log((N + 1) / (n_c + 1)); 0 for start, end and padding."""
        weights = ((self.num_captions + 1) / (self.token_counts + 1)).log()
        ids = torch.arange(len(weights), device=weights.device)
        return weights.masked_fill((ids == PAD) | (ids >= len(weights) - 2), 0.0)

    def encode_pairs(self, images, tokens, label_tokens=None, token_weights=None, keep=None):
        """The part of a step that needs no other pair: features of both (B, E), and word loss."""
        image_tokens = self.visual(images, keep)  # (B, 1 + K, D)
        image_features = F.normalize((image_tokens[:, 0] @ self.visual.proj).float(), dim=-1)
        text_features = self.encode_text(tokens)
        if self.head is None or label_tokens is None:  # plain CLIP, or features alone are wanted
            return image_features, text_features, image_features.new_zeros(())
        word_loss = classification_loss(self.head(image_tokens), label_tokens, token_weights)
        return image_features, text_features, word_loss

    def pair_loss(self, image_features, text_features):
        """The part of a step that needs all pairs: the contrastive loss over the global batch."""
        scale = self.logit_scale.exp()
        if self.logit_bias is None:
            return contrastive_loss(image_features, text_features, scale)
        return sigmoid_loss(image_features, text_features, scale, self.logit_bias)

    def forward(self, images, tokens, label_tokens=None, keep=None):
        """One batch of pairs through the whole method.

        images (B, 3, S, S), tokens (B, T), label_tokens (B, T'): the captions that give the labels,
        if not the same as the tokens; keep (B, K), patches to look at. In training mode the batch
        is counted into the token statistics first. Returns a dict of loss = contrastive_loss +
        cls_weight * classification_loss, the two, and image_features, text_features (B, E)."""
        label_tokens = tokens if label_tokens is None else label_tokens
        token_weights = None
        if self.head is not None:
            if self.training:
                self.count_tokens(label_tokens)
            token_weights = self.token_weights()
        image_features, text_features, classification = self.encode_pairs(
            images, tokens, label_tokens, token_weights, keep
        )
        contrastive = self.pair_loss(image_features, text_features)
        return {
            "loss": contrastive + self.config.cls_weight * classification,
            "contrastive_loss": contrastive,
            "classification_loss": classification,
            "image_features": image_features,
            "text_features": text_features,
        }

    # ---- weights in and out

    @classmethod
    def from_pretrained(cls, path, **changes):
        """A model with the weights of a file: a checkpoint of this project, of the authors'
        SuperCLIP, of open_clip, or OpenAI's CLIP as a state dict; .pt or .safetensors.

        The configuration is read off the tensors. `changes` replaces fields of it: another
        image_size interpolates the positions. Tell heads that are not 64 wide. Raises InputError.
        """
        state, config = read_weights(path)
        model = cls(SuperCLIPConfig(**{**config, **changes}))
        model.load_weights(state, path)
        return model

    def load_weights(self, state, source):
        """Copy a state dict of read_weights into the model. A head that is missing there stays new
        and positions are fitted to this model's sizes; what else differs is an InputError."""
        own = self.state_dict()
        if self.head is None:
            state = {k: v for k, v in state.items() if not k.startswith(HEAD_STATE)}
        elif "head.linear.weight" not in state:
            print(f"{source} has no word head: a new one starts from random weights")
            state = {**state, **{k: v for k, v in own.items() if k.startswith(HEAD_STATE)}}
        if self.logit_bias is None:
            state = {k: v for k, v in state.items() if k != "logit_bias"}
        elif "logit_bias" not in state:
            print(f"{source} was not trained with the sigmoid loss: scale and bias start anew")
            state = {**state, "logit_bias": own["logit_bias"], "logit_scale": own["logit_scale"]}
        for name in sorted(own.keys() | state.keys()):
            if name not in state:
                raise InputError(f"{source} does not fit: it has no tensor {name}")
            if name not in own:
                raise InputError(f"{source} does not fit: this model has no tensor {name}")
            value = state[name]
            if name == "visual.positional_embedding" and value.shape != own[name].shape:
                value = resize_positions(value, self.visual.grid)
            if name == "text.positional_embedding":  # a shorter context is a part of the longer one
                value = value[: self.config.context_length]
            if value.shape != own[name].shape:
                raise InputError(
                    f"{source} does not fit: {name} is {tuple(value.shape)} there, "
                    f"{tuple(own[name].shape)} in this model"
                )
            own[name].copy_(value)  # state_dict() shares memory with the model

    def state_dict_open_clip(self):
        """The towers' weights under the names of open_clip's CLIP, which knows no word head."""
        state = {k: v for k, v in self.state_dict().items() if not k.startswith(HEAD_STATE)}
        return {k.removeprefix("text."): v for k, v in state.items()}

    def open_clip_config(self):
        """open_clip's model config (a dict) that builds the same towers."""
        c = self.config
        vision = {
            "image_size": c.image_size,
            "patch_size": c.patch_size,
            "width": c.vision_width,
            "layers": c.vision_layers,
            "head_width": c.vision_width // c.vision_heads,
        }
        text = {
            "context_length": c.context_length,
            "vocab_size": c.vocab_size,
            "width": c.text_width,
            "layers": c.text_layers,
            "heads": c.text_heads,
        }
        config = {"embed_dim": c.embed_dim, "quick_gelu": c.quick_gelu}
        if c.loss == "sigmoid":
            config["init_logit_bias"] = -10.0  # makes open_clip build a logit_bias to load into
        return {**config, "vision_cfg": vision, "text_cfg": text}

    def save_pretrained(self, path):
        """Write the towers to `path` (.pt or .safetensors) in the layout that open_clip loads, and
        open_clip's configuration beside it as .json."""
        path = Path(path)
        if not path.parent.is_dir():
            raise InputError(f"there is no folder {path.parent}")
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict_open_clip().items()}
        if path.suffix == ".safetensors":
            safetensors_torch().save_file(state, path)
        else:
            torch.save(state, path)
        path.with_suffix(".json").write_text(json.dumps(self.open_clip_config(), indent=2) + "\n")


def safetensors_torch():
    try:
        import safetensors.torch
    except ImportError:
        raise InputError("a .safetensors file needs one more package: safetensors") from None
    return safetensors.torch


def read_checkpoint(path):
    """A .pt or .safetensors file as a dict of tensors and plain values. Raises InputError."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            content = safetensors_torch().load_file(path)
        else:
            # weights_only: a pickle may run any code as it loads, and weights come from strangers
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch and safetensors raise a dozen kinds, by the kind of damage
        if "TorchScript" in str(error):
            reason = (
                "is a TorchScript archive: save torch.jit.load(path).state_dict() of it instead"
            )
        elif "GLOBAL" in str(error):  # the pickle names a class or function
            reason = "holds more than tensors and plain values, which could run code: refused"
        else:
            reason = "is no checkpoint, or a damaged one"
        raise InputError(f"{path} {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no dict of weights, but a {type(content).__name__}")
    return content


SIZES = {  # the tensors whose shapes tell the configuration, and how many axes they have
    "visual.conv1.weight": 4, "visual.positional_embedding": 2, "visual.proj": 2,
    "text.token_embedding.weight": 2, "text.positional_embedding": 2,
}  # fmt: skip


def read_weights(path):
    """Weights in any layout of the field -> (state dict in our names, config dict)."""
    checkpoint = read_checkpoint(path)
    if "config" in checkpoint and "model" in checkpoint:  # this project's own
        return checkpoint["model"], checkpoint["config"]
    state = checkpoint.get("state_dict", checkpoint)
    state = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    # OpenAI's archives are in half precision, carry three scalars, and want QuickGELU.
    scalars = [state.pop(k, None) for k in ("input_resolution", "context_length", "vocab_size")]
    openai = any(scalar is not None for scalar in scalars)
    openai |= any(v.dtype == torch.float16 for v in state.values())
    if "cap_fq" in state:
        # The authors' counters add up, over steps, the *share* of captions with the token. Times
        # their batch of 16,384 (paper, section 4) that is the number of captions, which is what we
        # count.
        state["token_counts"] = (state.pop("cap_fq").flatten() * 16384).round().long()
        state["num_captions"] = (state.pop("num_samples").flatten()[0] * 16384).round().long()
    # The text tower is at the top level in open_clip's plain layout, under "text." in its other.
    top = "token_embedding. positional_embedding transformer. ln_final. text_projection".split()
    state = {"text." + k if k.startswith(tuple(top)) else k: v for k, v in state.items()}
    authors = {"text_decoder.ln_mlp.": "head.ln.", "text_decoder.text_projection.": "head.linear."}
    for theirs, ours in authors.items():
        state = {k.replace(theirs, ours): v for k, v in state.items()}
    for name, axes in SIZES.items():
        if name not in state:
            raise InputError(f"{path} does not fit: it has no tensor {name}")
        if state[name].ndim != axes:
            raise InputError(f"{path} does not fit: {name} has {state[name].ndim} axes, not {axes}")
    layers = {
        tower: len({k.split(".")[3] for k in state if k.startswith(f"{tower}.transformer.")})
        for tower in ("visual", "text")
    }
    width, _, patch, _ = state["visual.conv1.weight"].shape
    config = dict(
        image_size=patch * math.isqrt(len(state["visual.positional_embedding"]) - 1),
        patch_size=patch,
        vision_width=width,
        vision_layers=layers["visual"],
        text_width=state["text.token_embedding.weight"].shape[1],
        text_layers=layers["text"],
        embed_dim=state["visual.proj"].shape[1],
        context_length=len(state["text.positional_embedding"]),
        vocab_size=len(state["text.token_embedding.weight"]),
        quick_gelu=openai,
        loss="sigmoid" if "logit_bias" in state else "softmax",
    )
    beside = Path(path).with_suffix(".json")
    # What shapes do not tell, as save_pretrained (and open_clip) writes it down:
    if beside.is_file():
        try:
            told = json.loads(beside.read_text())
            vision_heads = width // told["vision_cfg"].get("head_width", 64)
            config |= dict(vision_heads=vision_heads, text_heads=told["text_cfg"]["heads"])
            config["quick_gelu"] = bool(told.get("quick_gelu", False))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # some other .json
    if config["quick_gelu"] and not beside.is_file():
        print(f"{path}: taken for OpenAI's weights (QuickGELU); if not, give quick_gelu=False")
    return state, config


def resize_positions(positions, grid):
    """Positions (1 + P, D) -> (1 + grid * grid, D): the patches' are interpolated."""
    cls, patches = positions[:1], positions[1:].float()
    old = math.isqrt(len(patches))
    patches = patches.T.reshape(1, -1, old, old)  # (1, D, old, old)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([cls, patches.flatten(2)[0].T.to(cls.dtype)])


def load(checkpoint, device="cpu"):
    """A trained checkpoint, ready for inference: (model in eval mode, tokenizer, preprocess).

    model.encode_image(preprocess(pil_image)[None]), model.encode_text(tokenizer(["a dog"])).
    """
    import data  # here, since data.py imports this module

    content = read_checkpoint(checkpoint)
    if "vocab" not in content or "config" not in content:
        raise InputError(f"{checkpoint} is not a checkpoint of train.py (it carries no vocabulary)")
    config = SuperCLIPConfig(**content["config"])
    model = SuperCLIP(config)
    model.load_weights(content["model"], checkpoint)
    tokenizer = data.Tokenizer(content["vocab"], context_length=config.context_length)
    return model.to(device).eval(), tokenizer, data.Preprocess(config.image_size)


def walk():
    """One built-in pair through an untrained tiny model, with every shape on the way."""
    import random

    import data
    from scripts import shapes

    rng = random.Random(1)
    scene = shapes.make_scene(rng, count=2)
    _, caption = shapes.describe(scene, rng)
    crowd = [shapes.describe(shapes.make_scene(rng), rng)[1] for _ in range(500)]
    words = sorted({word for text in [caption, *crowd] for word in data.WORD.findall(text)})
    tokenizer = data.Tokenizer(data.vocabulary_from_words(words))
    torch.manual_seed(0)
    model = SuperCLIP(SuperCLIPConfig.preset("tiny", vocab_size=tokenizer.vocab_size))
    config = model.config
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{sum(p.numel() for p in model.head.parameters()):,} of them the head\n")  # fmt: skip

    def show(name, tensor):
        print(
            f"  {name:44s}{str(tuple(tensor.shape)):16s}{str(tensor.dtype).removeprefix('torch.')}"
        )

    with torch.no_grad():
        image = data.Preprocess(config.image_size)(shapes.draw(scene, config.image_size))[None]
        tokens = tokenizer([caption])
        print(f'the pair: a picture of "{caption}"')
        show("image", image)
        show("tokens: start, words, end, padding", tokens)
        print("image tower")
        x = model.visual.conv1((image / 255 - model.visual.mean) / model.visual.std)
        show("patches, one vector each", x)
        image_tokens = model.visual(image)
        show("class token and patch tokens", image_tokens)
        show("image feature (class token x proj)", model.encode_image(image))
        print("text tower")
        show("embedded tokens", model.text.token_embedding(tokens))
        show("text feature (end token x projection)", model.encode_text(tokens))
        print("head")
        show("mean of the patch tokens", image_tokens[:, 1:].mean(dim=1))
        logits = model.class_logits(image)
        show("a logit for every token of the vocabulary", logits)

        # Statistics need more captions than one: count a few hundred, as the first steps of
        # training do.
        model.count_tokens(tokenizer(crowd))
        weights = model.token_weights()
        label = torch.zeros(config.vocab_size).index_fill_(0, tokens[0], 1) * weights
        label /= label.sum()
        print(f"\nthe label: token, id, IDF of {len(crowd)} captions, share of the label")
        for i in dict.fromkeys(tokens[0].tolist()):
            name = {PAD: "padding", tokenizer.start: "start", tokenizer.end: "end"}.get(i)
            print(f"  {name or tokenizer.decode([i]):12s}{i:6d}{weights[i]:8.2f}{label[i]:8.3f}")

        # At step 0 nothing is known, so theory says what both losses must be.
        B = 256
        scenes = [shapes.make_scene(rng) for _ in range(B)]
        images = torch.stack(
            [data.Preprocess(config.image_size)(shapes.draw(s, config.image_size)) for s in scenes]
        )
        captions = tokenizer([shapes.describe(s, rng)[1] for s in scenes])
        out = model.train()(images, captions)
        noise = F.normalize(torch.randn(2, B, config.embed_dim), dim=-1)
        unrelated = contrastive_loss(*noise, 1 / 0.07)
        print(f"\nlosses of {B} pairs at step 0")
        print(f"  contrastive     {out['contrastive_loss']:.3f}")
        print(
            f"    theory: ln B = {math.log(B):.3f} for equal features, {unrelated:.3f} for random"
        )
        print(f"  classification  {out['classification_loss']:.3f}")
        theory = math.log(config.vocab_size) + 0.5
        print(f"    theory: ln V + 1/2 = {theory:.3f} for logits of variance 1")


if __name__ == "__main__":
    walk()
