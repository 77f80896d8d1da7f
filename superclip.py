"""SuperCLIP: CLIP plus one linear layer that predicts the caption's words (arXiv 2512.14480).

CLIP trains an image encoder and a text encoder so that an image and its caption end up close
together. Each image must find its caption among those of the batch, so the model learns what tells
the pairs of a batch apart. In a small batch a coarse hint, such as the main colour, is enough for
that. SuperCLIP adds a second question: *which words does the caption contain?* One linear layer
answers it from the mean of the image's patch tokens. Its loss compares an image with its own
caption, and with no other. Rare words count more than common ones.

    caption -> its words, weighted: the label -----------------.
                                                                >-> classification loss -.
                  .-> mean of patches -> LayerNorm -> Linear --'                          |
    image -> ViT -+                                                                       +-> loss
                  '-> class token -> proj -----------.                                    |
                                                      >-> contrastive loss --------------'
    caption -> text transformer -> end token -> proj -'

After the configuration the method comes first: the word head with its loss, CLIP's loss, and the
model, whose `forward` adds both. Then come CLIP's two towers, and the class from which each of them
makes its own transformer. At the end is what a first reader can skip. After this file read
train.py, data.py and eval.py.

Axes: B pairs, P patches, T tokens, D width, E embedding, V vocabulary. Images have S x S pixels.
Captions that are not cut have T' tokens.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

PAD = 0  # the token id that fills up short captions


# -----------------------------------------------------------------------------
# Configuration


@dataclass
class SuperCLIPConfig:
    """Hold everything that defines the model and its loss. Every checkpoint carries it."""

    image_size: int = 224  # S, in pixels; images are square
    patch_size: int = 16  # in pixels, a divisor of S; P = (image_size / patch_size) ** 2
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 0  # 0 means width / 64, as in most published models
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 0  # 0 means width / 64
    embed_dim: int = 512  # E, the space in which images and texts meet
    context_length: int = 77  # the most tokens that the text tower can read
    vocab_size: int = 49408  # V, the number of tokens that captions are made of
    quick_gelu: bool = False  # x * sigmoid(1.702 x): OpenAI's weights need it
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # CLIP's R, G, B, between 0 and 1
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)  # CLIP's standard deviations
    loss: str = "softmax"  # the contrastive loss: softmax (CLIP) or sigmoid (SigLIP)
    cls_weight: float = 1.0  # the paper's lambda; 0 builds no word head, which leaves plain CLIP

    def __post_init__(self):
        if self.vision_heads == 0:
            self.vision_heads = max(1, self.vision_width // 64)
        if self.text_heads == 0:
            self.text_heads = max(1, self.text_width // 64)
        assert self.loss in ("softmax", "sigmoid"), f"there is no loss {self.loss}"
        fits = self.image_size % self.patch_size == 0
        assert fits, f"image_size must be a multiple of the patch_size {self.patch_size}"
        assert self.vision_width % self.vision_heads == 0, "vision_heads must divide vision_width"
        assert self.text_width % self.text_heads == 0, "text_heads must divide text_width"


# Each size names what differs from the defaults above, which are those of ViT-B-16.
# Example: SuperCLIPConfig(**PRESETS["tiny"], vocab_size=560), for the drawn scenes
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
# What SuperCLIP adds to CLIP: a head that must predict the words of the caption. A word is a token
# of the vocabulary, but not padding, start or end. The README has the same in five lines.


class WordHead(nn.Module):
    """Predict the words of the caption: mean of the patch tokens -> LayerNorm -> one logit for each
    token of the vocabulary. These are all the parameters that SuperCLIP adds to CLIP.

    The paper speaks of a linear layer. The authors' code puts a LayerNorm before it, and so do we.
    Patch tokens that point in different directions have a short mean. Without the norm it would
    give weak logits.
    """

    def __init__(self, width, vocab_size):
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.linear = nn.Linear(width, vocab_size)
        nn.init.normal_(self.linear.weight, std=width**-0.5)  # logits of variance 1
        nn.init.zeros_(self.linear.bias)

    def forward(self, patches):
        """Return logits (B, V). patches (B, P, D): the patch tokens of the image tower."""
        return self.linear(self.ln(patches.mean(dim=1)))


def idf(num_captions, token_counts):
    """Return the weight of each token (V,). Rare words count more (paper, section 3.2).

    num_captions: captions seen so far; token_counts (V,): how many of them contain each token. The
    formula is that of the authors' code, in which the counts grow during the training, too.
    """
    return ((num_captions + 1) / (token_counts + 1)).log()


def multi_hot(tokens, vocab_size):
    """Return (B, V): 1 for each word that a caption contains, once or more often, and 0 for the
    others. tokens (B, T): the ids of the captions."""
    words = torch.zeros(len(tokens), vocab_size, device=tokens.device)
    words.scatter_(1, tokens, 1.0)
    # Padding, start and end of text are no words. Start and end have the last two ids. PAD is also
    # CLIP's id of a "!" inside a word, so that goes, too. A "!" alone has another id.
    for i in (PAD, vocab_size - 2, vocab_size - 1):
        words[:, i] = 0.0
    return words


def caption_label(tokens, token_weights):
    """Return what the head should predict, (B, V): the share of each word in its caption.

    tokens (B, T): the ids of the captions; token_weights (V,): from `idf`. Shares are proportional
    to weights, and their sum is 1. If "a" has weight 0.5, "red" 2 and "heart" 2.5, the caption "a
    red heart" has the shares 0.1, 0.4 and 0.5. If no word of a caption has weight, all its shares
    are 0.
    """
    words = multi_hot(tokens, len(token_weights))  # (B, V)
    return F.normalize(words * token_weights, p=1, dim=1)


def classification_loss(logits, tokens, token_weights):
    """Return SuperCLIP's loss, a scalar: softmax cross-entropy between the head's prediction and
    the words of the caption (paper, equations 2 to 4).

    logits (B, V): from the head; tokens (B, T): the ids of the captions; token_weights (V,): from
    `idf`. A caption whose words have no weight adds 0. The loss begins near ln V + 1/2: equal
    logits would give ln V, and logits of variance 1 give 1/2 more.
    """
    label = caption_label(tokens, token_weights)  # (B, V)
    return F.cross_entropy(logits.float(), label)


# -----------------------------------------------------------------------------
# What CLIP has: images and captions that must find each other


def contrastive_loss(image_features, text_features, scale):
    """Return CLIP's loss, a scalar: each image must pick its caption out of the batch, and each
    caption its image.

    image_features, text_features (B, E): normalised to length 1; scale: the inverse temperature, a
    scalar that train.py keeps between 1 and 100. The loss begins a little above ln B, because an
    untrained tower gives nearly the same feature to everything. B counts the pairs of all
    processes.
    """
    # Compute in float32 even under autocast: near 100, numbers of bfloat16 are 0.5 apart.
    with torch.autocast(image_features.device.type, enabled=False):
        logits = scale * image_features.float() @ text_features.float().T  # (B, B)
    target = torch.arange(len(logits), device=logits.device)  # image i belongs to caption i
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# -----------------------------------------------------------------------------
# The model


class SuperCLIP(nn.Module):
    """Join both towers, the word head, and the counts that give its words their weights."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config)
        self.text = TextTransformer(config)
        self.head = None
        if config.cls_weight:
            self.head = WordHead(config.vision_width, config.vocab_size)
            # The model counts the words of its captions: how many captions contained each one, and
            # how many captions there were. Integers, because float32 stops counting at 2**24.
            self.register_buffer("token_counts", torch.zeros(config.vocab_size, dtype=torch.long))
            self.register_buffer("num_captions", torch.zeros((), dtype=torch.long))
        # The parameter is the logarithm of the scale, so that the scale stays positive.
        if config.loss == "softmax":
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start
            self.logit_bias = None
        else:  # SigLIP's start
            self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images, tokens, label_tokens=None, keep=None, micro_batch_size=None):
        """Return a dict of scalars: the loss of a batch, and its terms. This is the whole method.

        images (B, 3, S, S) and tokens (B, T): images and their captions; label_tokens (B, T'): the
        captions whose words the head predicts, usually the same ones, but not cut. By default they
        are the tokens.

        On several processes, the mean of what they return is the loss of the whole batch. Only
        training counts captions. In a model that has counted none, classification_loss is 0.

        keep (B, K): indices of the patches to look at, to save time. By default all P.
        micro_batch_size: pairs that go through the towers at once, to save memory. By default all.
        """
        if label_tokens is None:
            label_tokens = tokens

        # Count first, so that the weights of the words know this batch, as in the authors' code.
        token_weights = None
        if self.head is not None:
            if self.training:
                self.count_tokens(label_tokens)
            token_weights = idf(self.num_captions, self.token_counts)  # (V,)

        # What needs one pair at a time: two features, and the loss of the head.
        pairs = {"images": images, "tokens": tokens, "label_tokens": label_tokens, "keep": keep}
        encode = partial(self.encode_pairs, token_weights=token_weights)
        if micro_batch_size is None:
            features, terms = encode(**pairs)
        else:  # the same, with less memory
            features, terms = in_micro_batches(encode, pairs, micro_batch_size)

        # What needs all pairs: each image must find its caption among those of all processes. Only
        # training gathers them, because an evaluation may run on process 0 alone.
        if self.training:
            features = {name: gather(x) for name, x in features.items()}
        contrastive = self.pair_loss(features["image"], features["text"])
        terms = {"contrastive_loss": contrastive, **terms}

        # The sum. A term of your own is added here.
        total = contrastive
        if self.head is not None:
            total = total + self.config.cls_weight * terms["classification_loss"]
        return {"loss": total, **terms}

    def count_tokens(self, label_tokens):
        """Count the captions (B, T') of a batch, and how many of them contain each token. The
        batches of all processes are counted."""
        num_captions = len(label_tokens)
        counts = torch.zeros_like(self.token_counts)  # (V,)
        for part in label_tokens.split(1024):  # the memory of a part, as in micro-batches
            counts += multi_hot(part, self.config.vocab_size).sum(dim=0).long()
        if dist.is_initialized():
            num_captions *= dist.get_world_size()  # every process has as many
            dist.all_reduce(counts)
        self.num_captions += num_captions
        self.token_counts += counts

    def encode_pairs(self, images, tokens, label_tokens, token_weights, keep=None):
        """Return two dicts: the features of the images and of the texts, (B, E) each, and the terms
        of the loss that need one pair at a time, each a mean over the pairs. Plain CLIP has no such
        term. The arguments are those of `forward`, and token_weights (V,), from `idf`."""
        image_features, patches = self.visual(images, keep)  # (B, E) and (B, P, D)
        features = {
            "image": F.normalize(image_features.float(), dim=-1),
            "text": self.encode_text(tokens),
        }
        terms = {}
        if self.head is not None:
            logits = self.head(patches)  # (B, V)
            terms["classification_loss"] = classification_loss(logits, label_tokens, token_weights)
        return features, terms

    def pair_loss(self, image_features, text_features):
        """Return the contrastive loss of features (B, E): CLIP's, or SigLIP's."""
        scale = self.logit_scale.exp()
        if self.config.loss == "softmax":
            return contrastive_loss(image_features, text_features, scale)
        return sigmoid_loss(image_features, text_features, scale, self.logit_bias)

    def encode_image(self, images):
        """Return features (B, E) of length 1. images (B, 3, S, S): uint8, as our data has them, or
        floats that are already normalised, as other code has them."""
        features, _ = self.visual(images)
        return F.normalize(features.float(), dim=-1)

    def encode_text(self, tokens):
        """Return features (B, E) of length 1. tokens (B, T): the ids of captions."""
        return F.normalize(self.text(tokens).float(), dim=-1)

    def word_logits(self, images, keep=None):
        """Return a logit for each token of the vocabulary (B, V): which words would a caption of
        these images use? The arguments are those of `forward`."""
        assert self.head is not None, "this model is plain CLIP, which has no word head"
        _, patches = self.visual(images, keep)
        return self.head(patches)


# -----------------------------------------------------------------------------
# The towers


class VisionTransformer(nn.Module):
    """Turn an image into one token for each patch, and into one feature, which is a projection of
    the class token."""

    def __init__(self, config):
        super().__init__()
        width, layers, heads = config.vision_width, config.vision_layers, config.vision_heads
        self.patch_size = config.patch_size
        self.grid = config.image_size // config.patch_size  # patches per side
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(self.grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, config.quick_gelu, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        mean = torch.tensor(config.image_mean).view(3, 1, 1)
        std = torch.tensor(config.image_std).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images, keep=None):
        """Return features (B, E), and patch tokens (B, P, D), or (B, K, D) with `keep`. The
        arguments are those of `class_and_patches`."""
        x = self.class_and_patches(images, keep)  # (B, 1 + P, D)
        return x[:, 0] @ self.proj, x[:, 1:]

    def class_and_patches(self, images, keep=None):
        """Return the class token, and after it the patch tokens: (B, 1 + P, D), or (B, 1 + K, D)
        with `keep`. images (B, 3, S, S): uint8, as our data has them, or floats that are already
        normalised; keep (B, K): indices of the patches to look at, by default all."""
        if images.dtype == torch.uint8:  # normalise them
            # Work in place on the new float tensor, because copying a batch is slow on a CPU.
            images = images.float().div_(255).sub_(self.mean).div_(self.std)
        # The next three lines are self.conv1(images): a convolution that moves by whole patches
        # applies one linear layer to each patch. Written like this, a step on a CPU takes a fifth
        # less time. conv1 is a Conv2d so that published weights load.
        x = F.pixel_unshuffle(images, self.patch_size)  # (B, 3pp, S/p, S/p), p: the patch size
        x = x.flatten(2).transpose(1, 2)  # (B, P, 3pp), the pixels of each patch
        x = F.linear(x, self.conv1.weight.flatten(1))  # (B, P, D)
        x = x + self.positional_embedding[1:]
        if keep is not None:  # the other patches never enter the transformer, which saves time
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))  # (B, K, D)
        class_token = self.class_embedding + self.positional_embedding[0]  # (D,)
        x = torch.cat([class_token.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + P, D)
        # CLIP normalises the class token alone. Here the word head reads the patches, too.
        return self.ln_post(self.transformer(self.ln_pre(x)))


class TextTransformer(nn.Module):
    """Turn a caption into one feature, which is a projection of its end token. That is the first
    token that has seen the whole text."""

    def __init__(self, config):
        super().__init__()
        width, layers, heads = config.text_width, config.text_layers, config.text_heads
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.transformer = Transformer(width, layers, heads, config.quick_gelu, causal=True)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        # CLIP's choice for its text tower: the deeper the tower, the smaller are the weights whose
        # output is added to the tokens (out_proj, c_proj). Its image tower has torch's defaults.
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def forward(self, tokens):
        """Return features (B, E). tokens (B, T): T is at most context_length. Tokens after the end
        token change nothing, because attention is causal, so captions may be trimmed after it."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B, T, D)
        x = self.transformer(x)
        # argmax finds the end token, which has the largest id. Of two it finds the first one.
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]  # (B, D)
        return self.ln_final(x) @ self.text_projection


# -----------------------------------------------------------------------------
# One transformer for both towers


class Attention(nn.Module):
    """Let tokens exchange information: multi-head self-attention. The parameters have the names of
    nn.MultiheadAttention, so that published weights load."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)  # torch's choice; TextTransformer has another
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x):
        B, T, D = x.shape  # T: tokens in either tower
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3D)
        qkv = qkv.view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each, with H heads
        # attend is torch's scaled_dot_product_attention, but fast on a CPU, too. It takes is_causal
        # instead of a mask tensor, because a mask would rule out the flash kernels.
        x = attend(q, k, v, is_causal=self.causal)  # (B, H, T, D/H)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Compute something new from each token alone."""

    def __init__(self, width, quick_gelu):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        self.quick_gelu = quick_gelu

    def forward(self, x):
        x = self.c_fc(x)
        if self.quick_gelu:  # OpenAI's approximation, which weights that were trained with it need
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = F.gelu(x)
        return self.c_proj(x)


class Block(nn.Module):
    """Add to each token what it learns from the others, and then what an MLP makes of it alone."""

    def __init__(self, width, heads, quick_gelu, causal):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, quick_gelu)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Stack blocks. In the image tower every token sees all others. In the text tower (causal) a
    token sees itself and the tokens before it."""

    def __init__(self, width, layers, heads, quick_gelu, causal):
        super().__init__()
        blocks = [Block(width, heads, quick_gelu, causal) for _ in range(layers)]
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x):
        # Embeddings and positions are float32 even under autocast. Cast their sum once, here, so
        # that the residual stream has one dtype from the first block to the last.
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.resblocks:
            x = block(x)
        return x


# -----------------------------------------------------------------------------
# A first reader can skip the rest: SigLIP's loss, which can replace CLIP's, then several processes,
# batches that would not fit into memory, and attention on a CPU.


def sigmoid_loss(image_features, text_features, scale, logit_bias):
    """Return SigLIP's loss (arXiv 2303.15343), a scalar: is this the caption of the image?

    The arguments are those of contrastive_loss, and logit_bias, a scalar that is learned. It starts
    at -10, so that most answers are "no" at first. That is right, because only one of the B
    captions belongs to an image. The loss of an image is the sum over all captions. The result is
    the mean over the images, as in the paper.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        logits = scale * image_features.float() @ text_features.float().T + logit_bias  # (B, B)
    answers = torch.eye(len(logits), device=logits.device)  # yes on the diagonal, else no
    return F.binary_cross_entropy_with_logits(logits, answers, reduction="sum") / len(logits)


def gather(features):
    """Return the features (B, E) of all processes, in the order of their ranks.

    Each process computes the loss of the whole batch, but only its own features carry gradients.
    DistributedDataParallel then takes the mean over the processes where the sum would be right. So
    multiply the gradient of the features by the number of processes. That of logit_scale needs no
    factor, because each process has all of it.

    For example, process 0 has the features a, and process 1 has b. Of the gradient of L(a, b),
    process 0 has the part that comes through a, and process 1 the part that comes through b. Their
    sum is right, and their mean is half of it. So each part is doubled.
    """
    if not dist.is_initialized():
        return features
    world = dist.get_world_size()
    constant = features.detach()
    gathered = [torch.empty_like(constant) for _ in range(world)]
    dist.all_gather(gathered, constant)
    # The difference is 0, so this has the value of the features, and `world` times their gradient.
    gathered[dist.get_rank()] = constant + world * (features - constant)
    return torch.cat(gathered)


def in_micro_batches(encode_pairs, pairs, size):
    """Return what encode_pairs(**pairs) returns, but with the memory of `size` pairs (GradCache,
    arXiv 2101.06983). pairs: a dict of its arguments, each a tensor with B rows, or None.

    The loss needs the features of all pairs at once, but the towers do not. For each micro-batch
    torch's checkpoint keeps the inputs and the features, and forgets all that the towers have
    computed in between. The backward pass computes that again, one micro-batch after the other,
    which takes a third more time.
    """
    B = len(pairs["images"])
    if size >= B:
        return encode_pairs(**pairs)
    assert B % size == 0, f"{B} pairs are no multiple of {size}, so parts would not count equally"
    parts = []
    for start in range(0, B, size):
        part = {name: x[start : start + size] for name, x in pairs.items() if x is not None}
        # use_reentrant=False: the older kind wants inputs that require gradients.
        results = torch.utils.checkpoint.checkpoint(encode_pairs, **part, use_reentrant=False)
        parts.append(results)
    all_features, all_terms = zip(*parts)
    features = {}
    for name in all_features[0]:
        features[name] = torch.cat([x[name] for x in all_features])
    terms = {}
    for name in all_terms[0]:
        terms[name] = torch.stack([x[name] for x in all_terms]).mean()
    return features, terms


def attend(q, k, v, is_causal):
    """Return torch's scaled_dot_product_attention. On a CPU that is five times slower in bfloat16,
    so compute in float32 there."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    with torch.autocast("cpu", enabled=False):  # autocast would cast back to bfloat16
        x = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=is_causal)
    return x.to(q.dtype)
