"""SuperCLIP: CLIP plus one linear layer that predicts the caption's words (arXiv 2512.14480).

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
towers, the word head, the losses, and the model that joins them, whose `forward` is the method.
After this file read train.py, then tokenizer.py, data.py and eval.py.

Axes: B pairs of this process, N of all processes, P patches (K of them kept), T tokens, D width,
H heads, E embedding, V vocabulary, S pixels a side.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

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
    vision_heads: int = 0  # 0 means width / 64, as in most published models
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
    # lambda, the weight of the classification loss. With 0 there is no head: the model is CLIP.
    cls_weight: float = 1.0

    def __post_init__(self):
        if self.vision_heads == 0:
            self.vision_heads = max(1, self.vision_width // 64)
        if self.text_heads == 0:
            self.text_heads = max(1, self.text_width // 64)
        if self.image_size % self.patch_size != 0:
            raise ValueError("patch_size must divide image_size")
        if self.vision_width % self.vision_heads != 0:
            raise ValueError("vision_heads must divide vision_width")
        if self.text_width % self.text_heads != 0:
            raise ValueError("text_heads must divide text_width")
        if self.loss not in ("softmax", "sigmoid"):
            raise ValueError(f"loss is softmax or sigmoid, not {self.loss!r}")


# What a preset does not name is the default above, so ViT-B-16 names nothing.
# SuperCLIPConfig(**PRESETS["tiny"], vocab_size=560) is a configuration.
LARGE = dict(vision_width=1024, vision_layers=24, text_width=768, embed_dim=768)
PRESETS = {
    "tiny": dict(
        image_size=72, patch_size=12, vision_width=128, vision_layers=4, vision_heads=4,
        text_width=128, text_layers=2, text_heads=4, embed_dim=128,
    ),
    "ViT-S-16": dict(vision_width=384, text_width=384, embed_dim=384),
    "ViT-B-32": dict(patch_size=32),
    "ViT-B-16": dict(),
    "ViT-L-16": LARGE,
    "ViT-L-14": dict(patch_size=14, **LARGE),
}  # fmt: skip


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
        nn.init.xavier_uniform_(self.in_proj_weight)  # as torch does; TextTransformer does not
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal):
        B, T, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3D)
        qkv = qkv.view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
        if x.device.type == "cpu":
            # torch's attention on a CPU is five times slower in bfloat16 than in float32.
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False):  # it would cast them back; CUDA's is unchanged
            # is_causal instead of a mask tensor, because a mask would rule out the flash kernels
            x = F.scaled_dot_product_attention(q, k, v, is_causal=causal).to(qkv.dtype)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Pre-norm residual block: tokens exchange information, then each is transformed alone."""

    def __init__(self, width, heads, gelu):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )
        self.gelu = gelu

    def forward(self, x, causal):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp.c_proj(self.gelu(self.mlp.c_fc(self.ln_2(x))))


class Transformer(nn.Module):
    """A stack of blocks. In the image tower every token sees all others. In the text tower it sees
    itself and those before it (causal)."""

    def __init__(self, width, layers, heads, gelu, causal):
        super().__init__()
        self.causal = causal
        self.resblocks = nn.ModuleList(Block(width, heads, gelu) for _ in range(layers))

    def forward(self, x):
        # Embeddings are float32 even under autocast. They are cast once, here, so that the residual
        # stream has one dtype from the first block to the last.
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.resblocks:
            x = block(x, self.causal)
        return x


# -----------------------------------------------------------------------------
# The towers


class VisionTransformer(nn.Module):
    """Image -> one token per patch, and a class token that stands for the whole image."""

    def __init__(self, config):
        super().__init__()
        width, layers, heads = config.vision_width, config.vision_layers, config.vision_heads
        self.patch_size = config.patch_size
        self.grid = config.image_size // config.patch_size  # patches per side
        # A convolution by name and initialisation, so that published weights load.
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(self.grid**2 + 1, width))
        self.ln_pre = LayerNorm(width)
        gelu = quick_gelu if config.quick_gelu else F.gelu
        self.transformer = Transformer(width, layers, heads, gelu, causal=False)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        mean = torch.tensor(config.image_mean).view(3, 1, 1)
        std = torch.tensor(config.image_std).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images, keep=None):
        """images (B, 3, S, S), uint8 or already normalised floats -> tokens (B, 1 + K, D), the
        class token first. keep (B, K): indices of the patches to look at; None means all."""
        if images.dtype == torch.uint8:
            images = (images / 255 - self.mean) / self.std
        # One linear layer for each patch is what conv1 does, and its backward pass is faster.
        pixels = F.pixel_unshuffle(images, self.patch_size)  # (B, 3pp, S/p, S/p), p: patch_size
        pixels = pixels.flatten(2).transpose(1, 2)  # (B, P, 3pp)
        x = F.linear(pixels, self.conv1.weight.flatten(1))  # (B, P, D)
        x = x + self.positional_embedding[1:]
        if keep is not None:  # dropped patches never enter the transformer, and cost little
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))  # (B, K, D)
        class_token = self.class_embedding + self.positional_embedding[0]  # (D,)
        x = torch.cat([class_token.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + K, D)
        return self.ln_post(self.transformer(self.ln_pre(x)))


class TextTransformer(nn.Module):
    """Caption -> one feature, read at the end token, the first that has seen the whole text."""

    def __init__(self, config):
        super().__init__()
        width, layers, heads = config.text_width, config.text_layers, config.text_heads
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        gelu = quick_gelu if config.quick_gelu else F.gelu
        self.transformer = Transformer(width, layers, heads, gelu, causal=True)
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        # CLIP's choice for its text tower: what adds to the residual stream (out_proj, c_proj)
        # starts smaller the deeper the tower is. Its image tower keeps torch's defaults.
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
    target = torch.arange(len(images), device=images.device)[local]  # (B,): the right one of N
    with torch.autocast(images.device.type, enabled=False):
        per_image = logit_scale * images[local] @ texts.T  # (B, N)
        per_text = logit_scale * texts[local] @ images.T  # per_image.T lacks the other images
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


def sigmoid_loss(image_features, text_features, logit_scale, logit_bias, local=slice(None)):
    """SigLIP's loss (arXiv 2303.15343): do this image and this caption belong together, yes or no?

    Arguments are those of contrastive_loss. The losses of an image are summed over all captions,
    and the sums averaged over the images, as in the paper.
    """
    images, texts = image_features.float(), text_features.float()
    with torch.autocast(images.device.type, enabled=False):
        logits = logit_scale * images[local] @ texts.T + logit_bias  # (B, N)
    answers = torch.eye(len(texts), device=logits.device)[local]  # (B, N): 1 for the right pair
    return F.binary_cross_entropy_with_logits(logits, answers, reduction="sum") / len(logits)


def multi_hot(label_tokens, vocab_size):
    """Captions (B, T) -> (B, V): 1 for each token that a caption contains, once or more often."""
    absent = torch.zeros(len(label_tokens), vocab_size, device=label_tokens.device)
    return absent.scatter(1, label_tokens, 1.0)


def idf(num_captions, token_counts):
    """The weights of all tokens, (V,): log((num_captions + 1) / (token_counts + 1)), so that rare
    words count more (paper, section 3.2). Formula and growing counts are as in the authors' code.
    Start, end and padding are no words and weigh nothing.

    num_captions: captions seen so far; token_counts (V,): how many of them contain each token.
    """
    weights = ((num_captions + 1) / (token_counts + 1)).log()
    # slices, because to write at an index is to wait for the GPU
    weights[PAD : PAD + 1] = 0.0
    weights[-2:] = 0.0  # start and end of text
    return weights


def caption_label(label_tokens, token_weights):
    """What the head should say: captions (B, T) -> the shares of their words (B, V), which are
    proportional to the weights (V,) and have the sum 1, or 0 if no word of a caption has weight."""
    words = multi_hot(label_tokens, len(token_weights))  # (B, V)
    return F.normalize(words * token_weights, p=1, dim=1)


def classification_loss(logits, label_tokens, token_weights):
    """SuperCLIP's loss: softmax cross-entropy against the caption's words (paper, eq. 2-4).

    logits (B, V) from the head; label_tokens (B, T), the whole captions; token_weights (V,) from
    `idf`. A caption without any weight adds 0. Starts near ln V + 1/2.
    """
    label = caption_label(label_tokens, token_weights)  # (B, V)
    return F.cross_entropy(logits.float(), label)


# -----------------------------------------------------------------------------
# More pairs than one process can hold, or one pass through the towers


class Gather(torch.autograd.Function):
    """Features (B, E) of this process -> those of all processes (N, E), in the order of the ranks.

    Each process has a loss of its own, which depends on the features of all. So backward sums what
    all the losses say about a feature, and each process takes the rows of its own features. The
    weights then get the gradient of the *sum* of the losses. DistributedDataParallel divides it by
    the number of processes, and the mean of the losses is the loss of the global batch.
    """

    @staticmethod
    def forward(ctx, features):
        world = dist.get_world_size()
        gathered = features.new_empty(world * len(features), features.shape[1])
        dist.all_gather(list(gathered.chunk(world)), features.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def in_micro_batches(encode_pairs, size, *batch):
    """What encode_pairs(*batch) returns, with the memory of `size` pairs (GradCache, arXiv
    2101.06983).

    The loss needs the features of all pairs at once, but the towers do not. checkpoint keeps no
    more of a micro-batch than goes in and comes out. The backward pass comes to the micro-batches
    one after the other, and computes each again, which takes a third more time.
    """
    if size is None or size >= len(batch[0]):
        return encode_pairs(*batch)
    parts = zip(*(x.split(size) for x in batch))
    # by position, because checkpoint looks there for the device
    parts = [checkpoint(encode_pairs, *part, use_reentrant=False) for part in parts]
    image_features, text_features, terms = zip(*parts)
    means = {name: torch.stack([part[name] for part in terms]).mean() for name in terms[0]}
    return torch.cat(image_features), torch.cat(text_features), means


# -----------------------------------------------------------------------------
# The model


class SuperCLIP(nn.Module):
    """Both towers, the word head, and the statistics that weight its words."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config)
        self.text = TextTransformer(config)
        self.head = None
        if config.cls_weight:
            self.head = WordHead(config.vision_width, config.vocab_size)
            # captions that contain each token, and all captions, so far. They are integers, because
            # float32 stops counting at 2**24.
            self.register_buffer("token_counts", torch.zeros(config.vocab_size, dtype=torch.long))
            self.register_buffer("num_captions", torch.zeros((), dtype=torch.long))
        # The scale is stored as its logarithm, so that it stays positive.
        if config.loss == "softmax":
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
            self.logit_bias = None
        else:
            # SigLIP's 10 and -10 make most answers "no" at first, because most are: of the N
            # captions, one belongs to an image.
            self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        self.micro_batch_size = None  # pairs that go through the towers at a time, by default all

    def forward(self, images, tokens, label_tokens=None, keep=None):
        """The whole method on one batch of pairs, the one of this process.

        images (B, 3, S, S); tokens (B, T); label_tokens (B, T'): captions to take the labels from,
        by default the tokens; keep (B, K): patches to look at. In training mode the batch is first
        counted into the token statistics. In eval mode it is not, so a model that has counted no
        captions has a classification_loss of 0: no word has a weight yet. Returns a dict with loss
        = contrastive_loss + cls_weight * classification_loss, its terms, and image_features,
        text_features (B, E). With several processes, the mean of their losses is the loss.
        """
        if label_tokens is None:
            label_tokens = tokens
        if self.training:
            self.count_tokens(label_tokens)

        # What each pair says by itself: two features, and the loss of its words
        batch = [x for x in (images, tokens, label_tokens, keep) if x is not None]
        image_features, text_features, terms = in_micro_batches(
            self.encode_pairs, self.micro_batch_size, *batch
        )

        # Which image and which caption belong together?
        all_images, all_texts, ours = self.gather(image_features, text_features)
        scale = self.logit_scale.exp()
        if self.logit_bias is None:
            contrastive = contrastive_loss(all_images, all_texts, scale, ours)
        else:
            contrastive = sigmoid_loss(all_images, all_texts, scale, self.logit_bias, ours)

        # A term of your own: compute it here from the features of all pairs, or in encode_pairs, as
        # a mean over the pairs, if it needs no other pair. Put it into `terms`, under a name that
        # ends in _loss, and add it to the loss. It is then logged, drawn, and tested with a line in
        # CONFIGS of tests/test_step.py. (docs/fork.md does all that.)
        terms = {"contrastive_loss": contrastive, **terms}
        loss = contrastive
        if self.head is not None:
            loss = loss + self.config.cls_weight * terms["classification_loss"]
        features = {"image_features": image_features, "text_features": text_features}
        return {"loss": loss, **terms, **features}

    def encode_pairs(self, images, tokens, label_tokens, keep=None):
        """All that a pair says without the others. Arguments as in `forward`. Returns image and
        text features (B, E), of length 1, and a dict of terms of the loss, each a mean over the
        pairs. Plain CLIP has none."""
        image_tokens = self.visual(images, keep)  # (B, 1 + K, D)
        image_features = self.image_features(image_tokens)  # (B, E)
        text_features = self.encode_text(tokens)  # (B, E)
        terms = {}
        if self.head is not None:
            logits = self.head(image_tokens)  # (B, V)
            weights = self.token_weights()  # (V,)
            terms["classification_loss"] = classification_loss(logits, label_tokens, weights)
        return image_features, text_features, terms

    def gather(self, image_features, text_features):
        """Features (B, E) of this process -> those of all processes (N, E), and which of them are
        ours, as a slice: each process scores its own pairs against all. In an evaluation, and with
        one process, these are all."""
        B = len(image_features)
        if not (self.training and dist.is_initialized()):
            return image_features, text_features, slice(0, B)
        first = dist.get_rank() * B
        ours = slice(first, first + B)
        return Gather.apply(image_features), Gather.apply(text_features), ours

    def count_tokens(self, label_tokens):
        """Add the captions (B, T) of a batch, summed over all processes, to the statistics."""
        if self.head is None:  # plain CLIP keeps none
            return
        counts = multi_hot(label_tokens, len(self.token_counts)).sum(dim=0)
        # Padding is not counted: how much there is depends on how the batch was put together.
        counts[PAD : PAD + 1] = 0
        # The number of captions travels with the counts, so that one all_reduce serves both.
        counts = F.pad(counts, (0, 1), value=len(label_tokens)).long()
        if dist.is_initialized():
            dist.all_reduce(counts)
        self.token_counts += counts[:-1]
        self.num_captions += counts[-1]

    def token_weights(self):
        """The IDF of every token, (V,), by the captions seen so far."""
        return idf(self.num_captions, self.token_counts)

    def encode_image(self, images, normalize=True):
        """images (B, 3, S, S), uint8 or already normalised floats -> features (B, E), of length 1
        if `normalize`."""
        return self.image_features(self.visual(images), normalize)

    def image_features(self, image_tokens, normalize=True):
        """Tokens (B, 1 + K, D) of the image tower -> features (B, E), from the class token."""
        features = image_tokens[:, 0] @ self.visual.proj
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, tokens, normalize=True):
        """tokens (B, T) from a Tokenizer -> features (B, E), of length 1 if `normalize`."""
        features = self.text(tokens)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def class_logits(self, images, keep=None):
        """images (B, 3, S, S), keep (B, K): indices of the patches to look at -> logits (B, V):
        which words would a caption use? Raises ValueError if the model is plain CLIP and has no
        word head."""
        if self.head is None:
            raise ValueError("this model is plain CLIP (cls_weight 0) and has no word head")
        return self.head(self.visual(images, keep))
