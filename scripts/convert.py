"""Convert weights: what others have trained into a checkpoint of this project, and back.

    python -m scripts.convert ViT-B-16.pt clip.pt
    python -m scripts.convert out/best.pt model.safetensors --to open_clip
    python -m scripts.convert out_fine/best.pt robust.pt --average clip.pt

The input is a .pt or .safetensors file of OpenAI's CLIP (as a state dict), of open_clip, of the
authors' SuperCLIP, or of this project. The shapes of its tensors tell most of the configuration.
The rest is not guessed: it comes from flags, or from an open_clip configuration beside the input
(here ViT-B-16.json). A file without a word head becomes plain CLIP, and train.py --init_from gives
it a new head.
"""

import argparse
import json
from contextlib import suppress
from pathlib import Path

import torch

import data
import eval as evaluation
from superclip import SuperCLIP, SuperCLIPConfig, check, cli, number

# -----------------------------------------------------------------------------
# Weights in

# The tensors whose shapes tell the configuration, and the field that each axis stands for.
AXES = {
    "visual.conv1.weight": ("vision_width", None, "patch_size", "patch_size"),
    "visual.positional_embedding": ("positions", "vision_width"),
    "visual.proj": ("vision_width", "embed_dim"),
    "text.token_embedding.weight": ("vocab_size", "text_width"),
    "text.positional_embedding": ("context_length", "text_width"),
}
# open_clip has the text tower at the top level or, in newer files, under "text." as we do.
TEXT_TOWER = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_proj")


def safetensors():
    return evaluation.optional("safetensors.torch", "safetensors")


def our_name(name):
    """The name of a tensor in any layout -> its name in this project."""
    # DistributedDataParallel adds "module.", and the authors call the word head "text_decoder".
    name = str(name).removeprefix("module.").replace("text_decoder.ln_mlp.", "head.ln.")
    name = name.replace("text_decoder.text_projection.", "head.linear.")
    return f"text.{name}" if name.startswith(TEXT_TOWER) else name


def read_weights(path):
    """A file in any layout -> (weights: dict of name -> tensor, in our names; what is known of the
    configuration, a dict; text of the vocabulary or None). Raises InputError."""
    is_safe = path.suffix == ".safetensors"
    read = safetensors().load_file if is_safe else evaluation.read_pickle
    content = evaluation.read_file(path, read)
    if isinstance(content, dict) and "config" in content:
        content = evaluation.read_checkpoint(path)
        return content["model"], content["config"], content["vocab"]
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    check(isinstance(content, dict), f"{path} holds no weights")
    weights = {our_name(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    weights = {k: v for k, v in weights.items() if not k.endswith(("attn_mask", "position_ids"))}
    # OpenAI's files, and only they, have three scalars. Those models need QuickGELU.
    scalars = [weights.pop(k, None) for k in ("input_resolution", "context_length", "vocab_size")]
    config = {} if None in scalars else {"quick_gelu": True}
    # The authors' counters add up, over steps, the *share* of captions that have the token. Times
    # their batch of 16,384 (paper, section 4), that is the number of captions, which we count.
    for theirs, ours in (("cap_fq", "token_counts"), ("num_samples", "num_captions")):
        if theirs in weights:
            weights[ours] = (weights.pop(theirs).squeeze() * 16384).round().long()
    for name, fields in AXES.items():
        shape = tuple(weights[name].shape) if name in weights else ()
        fits = len(shape) == len(fields) and min(shape) > 0
        check(fits, f"{path} does not fit: it has no tensor {name} with {len(fields)} axes")
        config |= {field: length for field, length in zip(fields, shape) if field}
    patches = config.pop("positions") - 1
    grid = int(patches**0.5)  # patches per side
    check(0 < grid**2 == patches, f"{path} does not fit: visual.positional_embedding is no square")
    config["image_size"] = grid * config["patch_size"]
    for field, tower in (("vision_layers", "visual."), ("text_layers", "text.")):
        config[field] = sum(k.startswith(tower) and k.endswith(".ln_1.weight") for k in weights)
    config["loss"] = "sigmoid" if "logit_bias" in weights else "softmax"
    config["cls_weight"] = float("head.linear.weight" in weights)
    with suppress(Exception):  # there is no such file, or it is something else
        other = json.loads(path.with_suffix(".json").read_text())
        # What it leaves out has open_clip's default.
        config["vision_heads"] = config["vision_width"] // other["vision_cfg"].get("head_width", 64)
        config["text_heads"] = int(other["text_cfg"].get("heads", 8))
        config["quick_gelu"] = bool(other.get("quick_gelu", False))
    return weights, config, None


def resize_positions(positions, grid):
    """Positions (1 + P, D) -> (1 + grid * grid, D), interpolated as in open_clip. The first one is
    the class token's, and stays."""
    side = int((len(positions) - 1) ** 0.5)
    patches = positions[1:].float().T.reshape(1, -1, side, side)  # (1, D, side, side)
    patches = torch.nn.functional.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([positions[:1].float(), patches.flatten(2)[0].T])


def convert(path, flags, vocab=None, default_vocab=None):
    """A file in any layout -> (model, text of its vocabulary or None). Raises InputError.

    flags: fields of the configuration: what the file does not tell, or a new image_size or
    context_length. vocab: a vocabulary file to use in place of the file's own; default_vocab: one
    to use if the file has none.
    """
    weights, config, own_vocab = read_weights(path)
    config |= {k: v for k, v in flags.items() if k not in ("image_size", "context_length")}
    if "quick_gelu" not in config:
        print(f"{path} does not say which GELU it needs. Plain GELU is assumed: see --quick_gelu")
    vocab = vocab or (default_vocab if own_vocab is None else None)
    vocab = data.Tokenizer.from_file(vocab).vocab if vocab else own_vocab
    config = evaluation.check_weights(path, weights, config, vocab)
    model = SuperCLIP(SuperCLIPConfig(**{**vars(config), **flags}))
    image, text = "visual.positional_embedding", "text.positional_embedding"
    weights[image] = resize_positions(weights[image], model.visual.grid)
    # New positions start as copies of the last one. Captions that fitted keep their features.
    length = torch.arange(model.config.context_length)
    weights[text] = weights[text][length.clamp(max=config.context_length - 1)]
    model.load_state_dict(weights)
    return model, vocab


# -----------------------------------------------------------------------------
# Weights out


def open_clip_state(model):
    """The weights of the towers under open_clip's names. open_clip knows no word head."""
    state, ours = model.state_dict(), ("head.", "token_counts", "num_captions")
    return {k.removeprefix("text."): v for k, v in state.items() if not k.startswith(ours)}


def open_clip_config(c):
    """c: a SuperCLIPConfig -> the dict from which open_clip builds the same towers."""
    vision = {"image_size": c.image_size, "patch_size": c.patch_size, "layers": c.vision_layers}
    vision |= {"width": c.vision_width, "head_width": c.vision_width // c.vision_heads}
    text = {"context_length": c.context_length, "vocab_size": c.vocab_size}
    text |= {"width": c.text_width, "layers": c.text_layers, "heads": c.text_heads}
    bias = -10.0 if c.loss == "sigmoid" else None  # a number makes open_clip build a logit_bias
    shared = {"embed_dim": c.embed_dim, "quick_gelu": c.quick_gelu, "init_logit_bias": bias}
    return {**shared, "vision_cfg": vision, "text_cfg": text}


def write_open_clip(model, path):
    """Write the towers to `path`, and open_clip's configuration beside them as .json. Say how
    open_clip loads them."""
    state, c, beside = open_clip_state(model), model.config, path.with_suffix(".json")
    # As bytes, because save_file of safetensors replaces the file that write_file has opened.
    as_bytes = safetensors().save if path.suffix == ".safetensors" else None
    data.write_file(path, lambda f: f.write(as_bytes(state)) if as_bytes else torch.save(state, f))
    evaluation.write_json(beside, open_clip_config(c))
    print(f"wrote {path} and {beside}. In Python:\n  import open_clip")
    print(f"  open_clip.add_model_config({str(beside)!r})")
    print(f"  model, _, preprocess = open_clip.create_model_and_transforms({path.stem!r},")
    print(f"      {str(path)!r}, image_mean={c.image_mean}, image_std={c.image_std})")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add, weights_file = parser.add_argument, evaluation.output_file(".pt", ".safetensors")
    add("input", metavar="IN", type=Path, help=".pt or .safetensors file")
    suffixes = ".pt file; with --to open_clip also .safetensors"
    add("output", metavar="OUT", type=weights_file, help=suffixes)
    add("--to", choices=["open_clip"], help="write open_clip's layout instead of ours")
    add("--average", metavar="FILE", type=Path, help="average the weights with those of FILE")
    add("--share", type=number(float, 0, 1), default=0.5, help="of FILE in the average (0.5)")
    add("--vocab", metavar="FILE", help="or clip (default: IN's own, else clip)")
    add("--quick_gelu", action=argparse.BooleanOptionalAction, help="which GELU IN needs")
    add("--vision_heads", type=number(int, 1), help="of IN (default: width / 64)")
    add("--text_heads", type=number(int, 1), help="of IN (default: width / 64)")
    add("--image_mean", nargs=3, type=number(float, 0, 1), help="of R, G, B (default: CLIP's)")
    add("--image_std", nargs=3, type=number(float, 0.001), help="of R, G, B (default: CLIP's)")
    add("--image_size", type=number(int, 1), help="a new size: positions are interpolated")
    add("--context_length", type=number(int, 3), help="a new length: the last position is repeated")
    args = parser.parse_args(argv)
    check(args.to or args.output.suffix == ".pt", f"OUT must be a .pt file, not {args.output}")
    sources = [path.resolve() for path in (args.input, args.average) if path]
    check(args.output.resolve() not in sources, f"OUT would replace {args.output.resolve()}")
    flags = {k: v for k, v in vars(args).items() if hasattr(SuperCLIPConfig, k) and v is not None}
    default_vocab = None if args.to else "clip"
    model, vocab = convert(args.input, flags, args.vocab, default_vocab)
    if args.average:
        other, words = convert(args.average, flags, args.vocab, default_vocab)
        same = {**vars(other.config), "cls_weight": 0} == {**vars(model.config), "cls_weight": 0}
        check(same and words == vocab, f"{args.average} has another configuration or vocabulary")
        # The head comes last. If only one of the two has it, zip ends before it.
        for p, q in zip(model.parameters(), other.parameters()):
            p.data.lerp_(q.data, args.share)
    if args.to:
        if vocab and data.Tokenizer(vocab).encode("a photo") != [320, 1125]:  # CLIP's ids
            print("open_clip's tokenizer does not fit: this model has a vocabulary of its own")
        return write_open_clip(model, args.output)
    written = evaluation.write_checkpoint(args.output, model, vocab)
    check(written, f"{args.output} could not be written")
    print(f"wrote {args.output}: {model.config}")


if __name__ == "__main__":
    cli(main)
