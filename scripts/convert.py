"""Convert weights: what others have trained into a checkpoint of this project, and back.

    python -m scripts.convert ViT-B-16.pt clip.pt
    python -m scripts.convert out/best.pt model.safetensors --to open_clip

The input is a .pt or .safetensors file of OpenAI's CLIP (as a state dict), of open_clip, of the
authors' SuperCLIP, or of this project. The shapes of its tensors tell most of the configuration.
The rest is not guessed: it comes from flags, or from an open_clip configuration beside the input
(here ViT-B-16.json). A file without a word head becomes plain CLIP, to which train.py --init_from
adds a head.
"""

import argparse
import importlib.util
import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

import data
from superclip import InputError, SuperCLIP, SuperCLIPConfig, check, cli, number

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


def safetensors_torch():
    check(importlib.util.find_spec("safetensors"), ".safetensors needs: pip install safetensors")
    return importlib.import_module("safetensors.torch")


def read_file(path):
    """A .pt or .safetensors file -> what it holds by name, a dict. Raises InputError."""
    check(Path(path).is_file(), f"there is no file {path}")
    # weights_only: other pickles can run code as they load, and weights come from strangers
    is_pickle = Path(path).suffix != ".safetensors"
    read = partial(torch.load, weights_only=True) if is_pickle else safetensors_torch().load_file
    try:
        content = read(path, "cpu")
        return dict(content.get("state_dict", content))
    except Exception as error:  # torch and safetensors raise a dozen kinds
        reason = "is damaged or holds no weights"
        if "GLOBAL" in str(error):  # the pickle names a class or a function
            reason = "could run code and is refused"
        elif "TorchScript" in str(error):
            reason = "is a TorchScript archive: save torch.jit.load(path).state_dict() instead"
        raise InputError(f"{path} {reason}") from None


def our_name(name):
    """The name of a tensor in any layout -> its name in this project."""
    # DistributedDataParallel adds "module.", and the authors call the word head "text_decoder".
    name = str(name).removeprefix("module.").replace("text_decoder.ln_mlp.", "head.ln.")
    name = name.replace("text_decoder.text_projection.", "head.linear.")
    return f"text.{name}" if name.startswith(TEXT_TOWER) else name


def read_weights(path):
    """A file in any layout -> (state dict in our names, what is known of the configuration as a
    dict, text of the vocabulary or None). Raises InputError."""
    content = read_file(path)
    if {"model", "config", "vocab"} <= content.keys():  # a checkpoint of this project
        return content["model"], content["config"], content["vocab"]
    state = {our_name(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    # OpenAI's files, and only they, have three scalars. Those models need QuickGELU.
    scalars = [state.pop(k, None) for k in ("input_resolution", "context_length", "vocab_size")]
    config = {} if None in scalars else {"quick_gelu": True}
    # The authors' counters add up, over steps, the *share* of captions that have the token. Times
    # their batch of 16,384 (paper, section 4), that is the number of captions, which we count.
    for theirs, ours in (("cap_fq", "token_counts"), ("num_samples", "num_captions")):
        if theirs in state:
            state[ours] = (state.pop(theirs).squeeze() * 16384).round().long()
    for name, fields in AXES.items():
        shape = tuple(state[name].shape) if name in state else ()
        fits = len(shape) == len(fields) and min(shape) > 0
        check(fits, f"{path} does not fit: it has no tensor {name} with {len(fields)} axes")
        config |= {field: length for field, length in zip(fields, shape) if field}
    patches = config.pop("positions") - 1
    grid = int(patches**0.5)  # patches per side
    check(0 < grid**2 == patches, f"{path} does not fit: visual.positional_embedding is no square")
    config["image_size"] = grid * config["patch_size"]
    for name, tower in (("vision_layers", "visual."), ("text_layers", "text.")):
        config[name] = sum(k.startswith(tower) and k.endswith(".ln_1.weight") for k in state)
    config["loss"] = "sigmoid" if "logit_bias" in state else "softmax"
    config["cls_weight"] = float("head.linear.weight" in state)
    with suppress(Exception):  # there is no such file, or it is something else
        other = json.loads(Path(path).with_suffix(".json").read_text())
        # What it leaves out has open_clip's default.
        config["vision_heads"] = config["vision_width"] // other["vision_cfg"].get("head_width", 64)
        config["text_heads"] = int(other["text_cfg"].get("heads", 8))
        config["quick_gelu"] = bool(other.get("quick_gelu", False))
    return state, config, None


def resize_positions(positions, grid):
    """Positions (1 + P, D) -> (1 + grid * grid, D). Those of the patches are interpolated, as in
    open_clip."""
    side = int((len(positions) - 1) ** 0.5)
    patches = positions[1:].float().T.reshape(1, -1, side, side)  # (1, D, side, side)
    patches = torch.nn.functional.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([positions[:1].float(), patches.flatten(2)[0].T])


def convert(path, **changes):
    """A file in any layout -> (model, text of its vocabulary or None). `changes` are fields of the
    configuration: what the file does not tell, or a new image_size or context_length. Raises
    InputError."""
    state, config, vocab = read_weights(path)
    config = {**config, **changes}
    if "quick_gelu" not in config:
        print(f"{path} does not say which GELU it needs. Plain GELU is assumed: see --quick_gelu")
    image, text = "visual.positional_embedding", "text.positional_embedding"
    try:
        model = SuperCLIP(SuperCLIPConfig(**config))
        if "image_size" in changes:
            state[image] = resize_positions(state[image], model.visual.grid)
        state[text] = state[text][: model.config.context_length]  # a part of a longer context
        model.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError) as error:  # load_state_dict raises RuntimeError
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path} does not fit: {reason[:200]}") from None
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
    as_bytes = safetensors_torch().save if path.suffix == ".safetensors" else None
    data.write_file(path, lambda f: f.write(as_bytes(state)) if as_bytes else torch.save(state, f))
    config = json.dumps(open_clip_config(c), indent=2).encode()
    data.write_file(beside, lambda file: file.write(config))
    print(f"wrote {path} and {beside}. In Python:\n  import open_clip")
    print(f"  open_clip.add_model_config({str(beside)!r})")
    print(f"  model, _, preprocess = open_clip.create_model_and_transforms({path.stem!r},")
    print(f"      {str(path)!r}, image_mean={c.image_mean}, image_std={c.image_std})")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("input", metavar="IN", type=Path, help=".pt or .safetensors file")
    add("output", metavar="OUT", type=Path, help=".pt file; with --to open_clip also .safetensors")
    add("--to", choices=["open_clip"], help="write open_clip's layout instead of ours")
    add("--vocab", metavar="FILE", help="or clip (default: IN's own, else clip)")
    add("--quick_gelu", action=argparse.BooleanOptionalAction, help="which GELU IN needs")
    add("--vision_heads", type=number(int, 1), help="of IN (default: width / 64)")
    add("--text_heads", type=number(int, 1), help="of IN (default: width / 64)")
    add("--image_mean", nargs=3, type=number(float, 0, 1), help="of R, G, B (default: CLIP's)")
    add("--image_std", nargs=3, type=number(float, 0.001), help="of R, G, B (default: CLIP's)")
    add("--image_size", type=number(int, 1), help="a new size: positions are interpolated")
    add("--context_length", type=number(int, 3), help="a new, shorter length in tokens")
    args = parser.parse_args(argv)
    fields = {k: v for k, v in vars(args).items() if hasattr(SuperCLIPConfig, k)}
    check(args.output.suffix in (".pt", args.to and ".safetensors"), "OUT must be a .pt file")
    outputs = [path.resolve() for path in (args.output, args.output.with_suffix(".json"))]
    check(args.input.resolve() not in outputs, f"the output would replace {args.input}")
    check(args.output.parent.is_dir(), f"there is no folder {args.output.parent}")
    model, vocab = convert(args.input, **{k: v for k, v in fields.items() if v is not None})
    if args.to:
        if vocab and data.Tokenizer(vocab).encode("a photo") != [320, 1125]:  # CLIP's ids
            print("open_clip's tokenizer does not fit: this model has a vocabulary of its own")
        return write_open_clip(model, args.output)
    if args.vocab or not vocab:
        vocab = data.Tokenizer.from_file(args.vocab or "clip").vocab
    n, V = data.Tokenizer(vocab).vocab_size, model.config.vocab_size
    check(n == V, f"{args.input} has {V:,} tokens, but the vocabulary has {n:,}: see --vocab")
    content = {"model": model.state_dict(), "config": vars(model.config), "vocab": vocab}
    data.write_file(args.output, lambda file: torch.save(content, file))
    print(f"wrote {args.output}: {model.config}")


if __name__ == "__main__":
    cli(main)
