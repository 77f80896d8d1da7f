"""SuperCLIP: CLIP plus one linear layer that names the words of the caption (arXiv 2512.14480).

CLIP trains an image encoder and a text encoder so that an image and its caption end up close
together. Each image must find its caption among those of the batch, so the model learns what tells
the pairs of a batch apart, and in a small batch very little is enough. SuperCLIP adds a question
that needs no other pair: *which words does the caption contain?* One linear layer answers it from
the mean of the image's patch tokens, and rare words count more than common ones.

                  .-> mean of patches -> LayerNorm -> Linear -> classification loss --.
    image -> ViT -+                                                                   +-> loss
                  '-> class token -> proj -----------.                               /
                                                      >-> contrastive loss ---------'
    caption -> text transformer -> end token -> proj -'

The file reads from top to bottom: configuration, the transformer that both towers share, the two
towers, the word head, the losses, and the model that joins them. Its `forward` is train.py's step.
`python -m scripts.walk` follows one pair through it and prints every shape.

To try a term of your own, add it in `word_loss`, if it is about the words, or in `pair_loss`, if it
compares pairs. There it is right with micro-batches and with many processes, too, as long as the
mean of what the processes return is the term of the whole batch. A field of the configuration, with
a default that changes nothing, gives it a strength. An option of the same name in train.py sets
that field, a key of that name in RUN of study/run.py compares its values, and a line in CONFIGS of
tests/test_step.py checks its gradient. The log shows the sum with the term that it was added to.

Axes: B pairs of this process, N of all processes, P patches (K of them kept), T tokens, D width,
H heads, E embedding, V vocabulary, S pixels a side.
"""

import argparse
import errno
import math
import re
import sys
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

PAD = 0  # token id that fills up short captions; in CLIP's vocabulary it is also the byte "!"


# -----------------------------------------------------------------------------
# Configuration


@dataclass
class SuperCLIPConfig:
    """Everything that defines the model and its loss. Every checkpoint carries it."""

    image_size: int = 224  # pixels; images are square
    patch_size: int = 16  # pixels; P = (image_size / patch_size) ** 2
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 0  # 0 means width / 64, as in every published CLIP
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 0  # 0 means width / 64
    embed_dim: int = 512  # E, the space in which images and texts meet
    context_length: int = 77  # tokens that the text tower sees; labels use the whole caption
    vocab_size: int = 49408  # V; the last two ids are start and end of text
    quick_gelu: bool = False  # x * sigmoid(1.702 x): OpenAI's weights need it
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # of R, G, B in 0..1, CLIP's by default
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)  # and their standard deviations
    loss: str = "softmax"  # how pairs are contrasted: softmax (CLIP) or sigmoid (SigLIP)
    cls_weight: float = 1.0  # lambda, the weight of the word loss; 0 builds no head: plain CLIP

    def __post_init__(self):
        self.vision_heads = self.vision_heads or max(1, self.vision_width // 64)
        self.text_heads = self.text_heads or max(1, self.text_width // 64)
        check(self.image_size % self.patch_size == 0, "patch_size must divide image_size")
        check(self.vision_width % self.vision_heads == 0, "vision_heads must divide vision_width")
        check(self.text_width % self.text_heads == 0, "text_heads must divide text_width")
        check(self.loss in ("softmax", "sigmoid"), f"loss is softmax or sigmoid, not {self.loss!r}")


# SuperCLIPConfig(**PRESETS["tiny"], vocab_size=560) is a configuration.
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


class LayerNorm(nn.LayerNorm):
    """Layer norm that returns the dtype it was given, because CUDA's autocast returns float32."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


def quick_gelu(x):
    """OpenAI's approximation of GELU, which weights that were trained with it need."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention. Its parameters are named as those of nn.MultiheadAttention, so
    that published weights load."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)  # torch's default; text replaces it
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal):
        B, T, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3D)
        qkv = qkv.view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
        # is_causal instead of a mask tensor, because a mask would rule out the flash kernels
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Pre-norm residual block: tokens exchange information, then each is transformed alone."""

    def __init__(self, width, heads, quick):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        wider, back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.ModuleDict({"c_fc": wider, "c_proj": back})
        self.gelu = quick_gelu if quick else F.gelu

    def forward(self, x, causal):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp.c_proj(self.gelu(self.mlp.c_fc(self.ln_2(x))))


class Transformer(nn.Module):
    """A stack of blocks. In the image tower every token sees all others. In the text tower it sees
    only those before it (causal)."""

    def __init__(self, width, layers, heads, quick, causal):
        super().__init__()
        self.causal = causal
        self.resblocks = nn.ModuleList(Block(width, heads, quick) for _ in range(layers))
        self.grad_checkpointing = False  # recompute blocks in the backward pass to save memory

    def forward(self, x):
        # Embeddings are float32 even under autocast. They are cast once, here, so that the residual
        # stream has one dtype from the first block to the last.
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        for block in self.resblocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, self.causal, use_reentrant=False)
            else:
                x = block(x, self.causal)
        return x


# -----------------------------------------------------------------------------
# The towers


class VisionTransformer(nn.Module):
    """Image -> one token per patch, and a class token that stands for the whole image."""

    def __init__(self, config):
        super().__init__()
        width, layers, heads = config.vision_width, config.vision_layers, config.vision_heads
        self.grid = config.image_size // config.patch_size  # patches per side
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(self.grid**2 + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, config.quick_gelu, causal=False)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        for name, value in (("mean", config.image_mean), ("std", config.image_std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def forward(self, images, keep=None):
        """images (B, 3, S, S), uint8 or already normalised floats -> tokens (B, 1 + K, D), the
        class token first. keep (B, K): indices of the patches to look at; None means all."""
        if images.dtype == torch.uint8:
            images = (images / 255 - self.mean) / self.std
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, P, D)
        x = x + self.positional_embedding[1:]
        if keep is not None:  # dropped patches never enter the transformer, so they cost nothing
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))  # (B, K, D)
        cls = self.class_embedding + self.positional_embedding[0]
        x = torch.cat([cls.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + K, D)
        return self.ln_post(self.transformer(self.ln_pre(x)))


class TextTransformer(nn.Module):
    """Caption -> one feature, read at the end token, the only one that has seen the whole text."""

    def __init__(self, config):
        super().__init__()
        width, layers, heads = config.text_width, config.text_layers, config.text_heads
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.transformer = Transformer(width, layers, heads, config.quick_gelu, causal=True)
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        # CLIP's choice: the deeper the tower, the less each block adds to the residual stream.
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def forward(self, tokens):
        """tokens (B, T), T <= context_length -> (B, E). What follows the end token changes nothing,
        because attention is causal, so captions may be trimmed to any length that holds it."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B, T, D)
        x = self.transformer(x)
        # The end token has the largest id, so argmax finds it, or the first one if there are two.
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]  # (B, D)
        return self.ln_final(x) @ self.text_projection


class WordHead(nn.Module):
    """All that SuperCLIP adds: mean of the patch tokens -> LayerNorm -> one logit per token.

    The paper speaks of a linear layer. The authors' code puts a LayerNorm before it, and so do we:
    the less the patches of an image agree, the shorter their mean is, and without the norm such an
    image would get weak logits whatever is in it.
    """

    def __init__(self, width, vocab_size):
        super().__init__()
        self.ln = LayerNorm(width)
        self.linear = nn.Linear(width, vocab_size)
        nn.init.normal_(self.linear.weight, std=width**-0.5)  # so logits start with variance 1
        nn.init.zeros_(self.linear.bias)

    def forward(self, image_tokens):
        patches = image_tokens[:, 1:].mean(dim=1)  # (B, D), without the class token
        return self.linear(self.ln(patches))  # (B, V)


# -----------------------------------------------------------------------------
# The losses: free functions of tensors


def contrastive_loss(image_features, text_features, logit_scale, local=slice(None)):
    """CLIP's loss: each image must pick its caption out of the batch, and each caption its image.

    image_features, text_features (N, E), of length 1, of the global batch; logit_scale: inverse
    temperature, a scalar; local: the slice of the N pairs that this process scores, by default all.
    Starts near ln N, because a model that knows nothing gives each candidate 1/N.
    """
    # float32 even under autocast: near 100, the largest logit, bfloat16 numbers are 0.5 apart
    images, texts = image_features.float(), text_features.float()
    target = torch.arange(len(images), device=images.device)[local]
    with torch.autocast(images.device.type, enabled=False):
        per_image = logit_scale * images[local] @ texts.T  # (B, N)
        per_text = logit_scale * texts[local] @ images.T
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


def sigmoid_loss(image_features, text_features, logit_scale, logit_bias, local=slice(None)):
    """SigLIP's loss (arXiv 2303.15343): do this image and this caption belong together, yes or no?

    Arguments are those of contrastive_loss. The answers for an image are summed over all captions,
    and the sums averaged over the images, as in the paper.
    """
    images, texts = image_features.float(), text_features.float()
    with torch.autocast(images.device.type, enabled=False):
        logits = logit_scale * images[local] @ texts.T + logit_bias  # (B, N)
    answers = F.one_hot(torch.arange(len(texts), device=logits.device)[local], len(texts)).float()
    return F.binary_cross_entropy_with_logits(logits, answers, reduction="sum") / len(logits)


def token_sets(label_tokens):
    """Captions (B, T) -> their tokens, sorted, and False where a token repeats the one before it,
    both (B, T). Whoever counts only the True ones counts every token of a caption once."""
    tokens = label_tokens.sort(dim=1).values
    return tokens, F.pad(tokens[:, 1:] != tokens[:, :-1], (1, 0), value=True)


def classification_loss(logits, label_tokens, token_weights):
    """SuperCLIP's loss: softmax cross-entropy against the caption's words (paper, eq. 2-4).

    logits (B, V) from the head; label_tokens (B, T), the whole captions; token_weights (V,), the
    IDF, which is 0 for tokens that are not words. A label is the *set* of the caption's tokens,
    weighted and normalised to sum 1. A caption without any weight adds 0. Starts near ln V + 1/2.
    """
    # A label has at most T entries, so it stays (B, T), and no dense (B, V) label is ever made.
    tokens, is_new = token_sets(label_tokens)
    label = token_weights[tokens] * is_new  # (B, T)
    label = label / label.sum(dim=1, keepdim=True).clamp_min(1e-8)
    logits = logits.float()
    log_probs = logits.gather(1, tokens) - logits.logsumexp(dim=1, keepdim=True)  # (B, T)
    return -(label * log_probs).sum(dim=1).mean()


# -----------------------------------------------------------------------------
# The model


class Gather(torch.autograd.Function):
    """Features (B, E) of this process -> those of all processes (N, E), in the order of the ranks.

    The loss of each process depends on the features of all of them. So backward adds up what all
    the losses say about a feature, and each process takes the sum for its own.
    """

    @staticmethod
    def forward(ctx, features):
        gathered = features.new_empty(dist.get_world_size() * len(features), features.shape[1])
        dist.all_gather([*gathered.chunk(dist.get_world_size())], features.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class SuperCLIP(nn.Module):
    """Both towers, the word head, and the statistics that weight its words."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config)
        self.text = TextTransformer(config)
        self.head = WordHead(config.vision_width, config.vocab_size) if config.cls_weight else None
        # CLIP starts at temperature 0.07. SigLIP's 10 and -10 make most answers "no" at first,
        # because most are: of the N captions, one belongs to an image.
        sigmoid = config.loss == "sigmoid"
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10 if sigmoid else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None
        if self.head is not None:
            # n_c and N in the paper; integers, because float32 stops counting at 2**24
            self.register_buffer("token_counts", torch.zeros(config.vocab_size, dtype=torch.long))
            self.register_buffer("num_captions", torch.zeros((), dtype=torch.long))

    def encode_image(self, images, normalize=True, keep=None):
        """images (B, 3, S, S), uint8 or already normalised floats -> features (B, E), of length 1
        if `normalize`. keep (B, K): indices of the patches to look at."""
        features = self.visual(images, keep)[:, 0] @ self.visual.proj
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, tokens, normalize=True):
        """tokens (B, T) from a Tokenizer -> features (B, E), of length 1 if `normalize`."""
        features = self.text(tokens)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def class_logits(self, images, keep=None):
        """images, keep as in encode_image -> logits (B, V): which words would a caption use?"""
        check(self.head is not None, "this model is plain CLIP (cls_weight 0) and has no word head")
        return self.head(self.visual(images, keep))

    def count_tokens(self, label_tokens):
        """Add the captions (B, T) of a batch, summed over all processes, to the statistics."""
        if self.head is None:  # plain CLIP keeps none
            return
        tokens, is_new = token_sets(label_tokens)
        counts = torch.zeros(len(self.token_counts) + 1, dtype=torch.long, device=tokens.device)
        # Padding is not counted: how much there is depends on how the batch was put together.
        counts.scatter_add_(0, tokens.flatten(), (is_new & (tokens != PAD)).flatten().long())
        counts[-1] = len(tokens)  # travels with the counts, so that one all_reduce serves both
        if dist.is_initialized():
            dist.all_reduce(counts)
        self.token_counts += counts[:-1]
        self.num_captions += counts[-1]

    def token_weights(self):
        """IDF of every token, (V,): log((N + 1) / (n_c + 1)), and 0 for start, end and padding."""
        weights = ((self.num_captions + 1) / (self.token_counts + 1)).log()
        ids = torch.arange(len(weights), device=weights.device)
        return weights.masked_fill((ids == PAD) | (ids >= len(weights) - 2), 0.0)

    def word_loss(self, image_tokens, label_tokens):
        """What the head makes of the patches of the images, against the words of their captions."""
        return classification_loss(self.head(image_tokens), label_tokens, self.token_weights())

    def pair_loss(self, image_features, text_features, local):
        """The contrastive loss that the configuration names. Arguments as in contrastive_loss."""
        scale = self.logit_scale.exp()
        if self.logit_bias is None:
            return contrastive_loss(image_features, text_features, scale, local)
        return sigmoid_loss(image_features, text_features, scale, self.logit_bias, local)

    def features_and_word_loss(self, images, tokens, label_tokens, keep=None):
        """The part of a step that looks at each pair alone: image and text features (B, E), of
        length 1, and the word loss, which is 0 in plain CLIP."""
        image_tokens = self.visual(images, keep)  # (B, 1 + K, D)
        image_features = F.normalize((image_tokens[:, 0] @ self.visual.proj).float(), dim=-1)
        text_features = self.encode_text(tokens)
        if self.head is None:
            return image_features, text_features, image_features.new_zeros(())
        return image_features, text_features, self.word_loss(image_tokens, label_tokens)

    def compare(self, image_features, text_features):
        """The part of a step that compares pairs: the contrastive loss of features (B, E).

        In training the features of all processes are gathered, and each process scores its own
        pairs against all of them. The mean over the processes is the loss of the global batch.
        """
        rank, B = 0, len(image_features)
        if self.training and dist.is_initialized():
            rank = dist.get_rank()
            image_features, text_features = map(Gather.apply, (image_features, text_features))
        return self.pair_loss(image_features, text_features, slice(rank * B, (rank + 1) * B))

    def forward(self, images, tokens, label_tokens=None, keep=None):
        """The whole method on one batch of pairs, the one of this process.

        images (B, 3, S, S); tokens (B, T); label_tokens (B, T'): captions to take the labels from,
        by default the tokens; keep (B, K): patches to look at. In training mode the batch is first
        counted into the token statistics. Returns a dict with loss = contrastive_loss +
        cls_weight * classification_loss, its two terms, and image_features, text_features (B, E).
        """
        label_tokens = tokens if label_tokens is None else label_tokens
        if self.training:
            self.count_tokens(label_tokens)
        image, text, word_loss = self.features_and_word_loss(images, tokens, label_tokens, keep)
        pair_loss = self.compare(image, text)
        return {
            # train.py forms this sum, too: in grad_cache_step and for the log.
            "loss": pair_loss + self.config.cls_weight * word_loss,
            "contrastive_loss": pair_loss,
            "classification_loss": word_loss,
            "image_features": image,
            "text_features": text,
        }


# -----------------------------------------------------------------------------
# Not the method: how every command of this project treats a user's mistakes


class InputError(Exception):
    """What the user gave cannot work. The message says why, in one sentence."""


def check(condition, message):
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def number(kind, low, high=10**12):
    """A type for argparse: an int or a float, from low to high."""

    def parse(text):
        if not low <= (value := kind(text)) <= high:  # false for NaN, too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse uses it in its own messages
    return parse


def cli(main):
    """Run a command. A user's mistake ends it with a sentence and exit code 2, Ctrl-C with a
    sentence and code 130. A mistake of ours keeps its trace."""
    try:
        # A caption must not end a run on an odd terminal. Stdout may be closed.
        (sys.stdout or sys.stderr).reconfigure(errors="replace")
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        sys.stdout = None
    except (InputError, OSError, KeyboardInterrupt) as error:
        # The system's error is a user's mistake if it names a file, or says that the disk is full
        # or broken, or that too many files are open.
        resources = errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE
        if not getattr(error, "filename", True) and error.errno not in resources:
            raise
        # The frames of the first error hold loading processes, which end at once without them.
        traceback.clear_frames((error.__context__ or error).__traceback__)
        # Drop the trace from a worker's message, and the number from the system's.
        message = re.sub(r"(?s).*InputError: |^\[Errno \d+\] ", "", str(error)).strip()
        # Without escapes, so that the name of a file gives no orders to the terminal
        print("error:", message.replace("\x1b", "?") or "stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
