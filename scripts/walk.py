"""Follow one picture and its caption through an untrained SuperCLIP, and print every shape:

    python -m scripts.walk

Read it beside superclip.py. It takes seconds on a CPU and needs no data, because it draws its own
scenes. At the end it compares both losses with what theory says of a model that knows nothing yet.
If you change the model and a loss starts elsewhere, look for a mistake.

The axes are those of superclip.py: B pairs, P patches, T tokens, D width, V vocabulary, S pixels.
"""

import math
import random

import torch

import data
from cli import run_command
from scripts.scenes import COMBINATIONS, describe, draw, make_scene, vocabulary
from superclip import PAD, PRESETS, SuperCLIP, SuperCLIPConfig

B = 256  # pairs in the batch whose losses are compared with theory


def show(name, x):
    print(f"  {name:44s}{str(tuple(x.shape)):16s}{str(x.dtype).removeprefix('torch.')}")


def walk_pair(model, image, tokens):
    """Take one pair through both towers and the head. image (1, 3, S, S) uint8; tokens (1, T)."""
    show("image", image)
    show("tokens: start, words, end, padding", tokens)
    print("image tower")
    pixels = (image / 255 - model.visual.mean) / model.visual.std
    show("patches: one vector each", model.visual.conv1(pixels))  # (1, D, S / 12, S / 12)
    image_tokens = model.visual(image)  # (1, 1 + P, D)
    show("class token and patch tokens", image_tokens)
    show("image feature: class token x proj", model.encode_image(image))
    print("text tower")
    show("embedded tokens", model.text.token_embedding(tokens))
    show("text feature: end token x text_projection", model.encode_text(tokens))
    print("word head")
    show("mean of the patch tokens", image_tokens[:, 1:].mean(dim=1))
    show("a logit for every token of the vocabulary", model.class_logits(image))


def show_label(model, tokenizer, tokens):
    """Print the label of a caption, given as a list of token ids: the *set* of its tokens, weighted
    by IDF."""
    names = {PAD: "padding", tokenizer.start: "start", tokenizer.end: "end"}
    ids, weights = list(dict.fromkeys(tokens)), model.token_weights()
    print("\nthe label: token, id, IDF, share of the label")
    for i in ids:
        share = weights[i] / weights[ids].sum()
        name = names.get(i) or tokenizer.decode([i])
        print(f"  {name:12s}{i:6d}{weights[i]:8.2f}{share:8.3f}")


@torch.no_grad()
def main(argv):
    rng = random.Random(1)
    torch.manual_seed(0)
    scenes = [make_scene(rng, COMBINATIONS) for _ in range(B)]
    captions = [describe(scene, rng)[1] for scene in scenes]
    tokenizer = data.Tokenizer(vocabulary())
    tokens, V = tokenizer(captions), tokenizer.vocab_size
    model = SuperCLIP(SuperCLIPConfig(**PRESETS["tiny"], vocab_size=V))
    size = model.config.image_size
    images = torch.stack([data.load_image(draw(scene, size), size) for scene in scenes])
    print(f'the pair: a picture of "{captions[0]}"')
    walk_pair(model, images[:1], tokens[:1])

    # IDF needs statistics, so a model in training mode counts a batch before it computes the loss.
    out = model.train()(images, tokens)
    show_label(model, tokenizer, tokens[0].tolist())
    print(f"\nlosses of {B} pairs at step 0, and what they are if the model knows nothing")
    print(f"  contrastive      {out['contrastive_loss']:.3f}   ln B       {math.log(B):.3f}")
    print(
        f"  classification   {out['classification_loss']:.3f}   ln V + 1/2 {math.log(V) + 0.5:.3f}"
    )


if __name__ == "__main__":
    run_command(main)
