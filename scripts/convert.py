"""Convert weights: what others have trained into a checkpoint of this project, and back.

    python -m scripts.convert ViT-B-16.pt clip.pt
    python -m scripts.convert out/best.pt model.safetensors --to open_clip
    python -m scripts.convert out/best.pt folder --to transformers
    python -m scripts.convert out_fine/best.pt robust.pt --average clip.pt

The input is a .pt or .safetensors file of OpenAI's CLIP (as a state dict), of open_clip, of
transformers' CLIPModel (or its folder), of the authors' SuperCLIP, or of this project. The shapes
of its tensors tell most of the configuration. The rest is not guessed: it comes from flags, or from
the configuration beside the input (open_clip's, here ViT-B-16.json, or transformers' config.json).
A file without a word head becomes plain CLIP, and train.py --init_from gives it a new head.
"""

import argparse
import json
from contextlib import suppress
from pathlib import Path

import torch

import data
import eval as evaluation
from cli import check, number, optional, run_command, write_file, write_json
from superclip import SuperCLIP, SuperCLIPConfig

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
# Parts of our names and what transformers' CLIPModel has in their place. The order matters, in both
# directions: a part may contain a later one.
NAMES = {"text.text_projection": "text_projection.weight"}
NAMES |= {"visual.proj": "visual_projection.weight", "visual.": "vision_model."}
NAMES |= {"text.": "text_model.", "positional_embedding": "embeddings.position_embedding.weight"}
NAMES |= {f"{x}_embedding": f"embeddings.{x}_embedding" for x in ("token", "class")}
NAMES |= {"conv1": "embeddings.patch_embedding", "transformer.resblocks": "encoder.layers"}
NAMES |= {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "ln_final": "final_layer_norm"}
NAMES |= {"ln_": "layer_norm", "attn": "self_attn", "c_fc": "fc1", "c_proj": "fc2"}


def safetensors():
    return optional("safetensors.torch", "safetensors")


def our_name(name):
    """The name of a tensor in any layout -> its name in this project."""
    # DistributedDataParallel adds "module.", and the authors call the word head "text_decoder".
    name = str(name).removeprefix("module.").replace("text_decoder.ln_mlp.", "head.ln.")
    name = name.replace("text_decoder.text_projection.", "head.linear.")
    for ours, theirs in NAMES.items():
        name = name.replace(theirs, ours)
    return f"text.{name}" if name.startswith(TEXT_TOWER) else name


def read_weights(path):
    """A file in any layout, or a folder of transformers -> (weights: dict of name -> tensor, in our
    names; what is known of the configuration, a dict; text of the vocabulary or None). Raises
    InputError."""
    path = path / "model.safetensors" if path.is_dir() else path
    read = safetensors().load_file if path.suffix == ".safetensors" else evaluation.read_pickle
    content = evaluation.read_file(path, read)
    if isinstance(content, dict) and "config" in content:
        content = evaluation.read_checkpoint(path)
        return content["model"], content["config"], content["vocab"]
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    weights = {our_name(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    weights = {k: v for k, v in weights.items() if not k.endswith(("attn_mask", "position_ids"))}
    # transformers has the projections transposed, and query, key and value apart.
    for name in content.keys() & {"text_projection.weight", "visual_projection.weight"}:
        weights[our_name(name)] = content[name].T
    for name in [k for k in weights if ".q_proj." in k]:
        parts = [weights.pop(name.replace("q_proj", f"{x}_proj"), torch.empty(0)) for x in "qkv"]
        weights[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
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
    # The class token has a position, too. If the others make no square, check_weights says so.
    config["image_size"] = config["patch_size"] * max(1, int((config.pop("positions") - 1) ** 0.5))
    for field, tower in (("vision_layers", "visual."), ("text_layers", "text.")):
        config[field] = sum(k.startswith(tower) and k.endswith(".ln_1.weight") for k in weights)
    config["loss"] = "sigmoid" if "logit_bias" in weights else "softmax"
    config["cls_weight"] = float("head.linear.weight" in weights)
    # What a configuration beside the weights leaves out has the default of its library.
    with suppress(Exception):  # there is no such file, or it is something else
        other = json.loads(path.with_name("config.json").read_text())
        for tower, heads in (("vision", 12), ("text", 8)):
            config[f"{tower}_heads"] = other[f"{tower}_config"].get("num_attention_heads", heads)
        config["quick_gelu"] = other["vision_config"].get("hidden_act") in (None, "quick_gelu")
        # preprocessor_config.json, or since version 5 a part of processor_config.json
        other = json.loads(next(path.parent.glob("p*rocessor_config.json")).read_text())
        other = other.get("image_processor", other)
        config |= {field: tuple(other[field]) for field in ("image_mean", "image_std")}
    with suppress(Exception):
        other = json.loads(path.with_suffix(".json").read_text())
        config["vision_heads"] = config["vision_width"] // other["vision_cfg"].get("head_width", 64)
        config["text_heads"] = int(other["text_cfg"].get("heads", 8))
        config["quick_gelu"] = bool(other.get("quick_gelu", False))
    vocab = path.with_suffix(".tiktoken")  # main writes it beside an export
    return weights, config, data.Tokenizer.from_file(vocab).vocab if vocab.is_file() else None


def resize_positions(positions, grid):
    """Positions (1 + P, D) -> (1 + grid * grid, D), interpolated as in open_clip. The first one is
    the class token's, and stays."""
    side = int((len(positions) - 1) ** 0.5)
    patches = positions[1:].float().T.reshape(1, -1, side, side)  # (1, D, side, side)
    patches = torch.nn.functional.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([positions[:1].float(), patches.flatten(2)[0].T])


def convert(path, flags, vocab=None):
    """A file in any layout -> (model, text of its vocabulary). Raises InputError.

    flags: fields of the configuration: what the file does not tell, or a new image_size or
    context_length. vocab: a vocabulary file to use in place of the file's own, or of CLIP's if the
    file has none.
    """
    weights, config, known = read_weights(path)
    config |= {k: v for k, v in flags.items() if k not in ("image_size", "context_length")}
    if "quick_gelu" not in config:
        print(f"{path} does not say which GELU it needs. Plain GELU is assumed: see --quick_gelu")
    vocab = known if known and not vocab else data.Tokenizer.from_file(vocab or "clip").vocab
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


def transformers_state(model):
    """The weights of the towers under the names of transformers' CLIPModel. It knows no word head,
    and no logit_bias, without which the logits of a model of the sigmoid loss are all too high."""
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if ".in_proj_" in name:
            for x, part in zip("qkv", tensor.chunk(3)):
                state[name.replace("in_proj_", f"{x}_proj.")] = part.clone()
        elif not name.startswith(("head.", "token_counts", "num_captions", "logit_bias")):
            state[name] = tensor.T.contiguous() if "projection." in name else tensor
    return state


def transformers_config(c):
    """c: a SuperCLIPConfig -> the dict from which transformers builds the same towers."""
    shared = {"projection_dim": c.embed_dim, "hidden_act": "quick_gelu" if c.quick_gelu else "gelu"}
    vision = {"image_size": c.image_size, "patch_size": c.patch_size, **shared}
    vision |= {"hidden_size": c.vision_width, "intermediate_size": 4 * c.vision_width}
    vision |= {"num_hidden_layers": c.vision_layers, "num_attention_heads": c.vision_heads}
    text = {"max_position_embeddings": c.context_length, "vocab_size": c.vocab_size, **shared}
    text |= {"hidden_size": c.text_width, "intermediate_size": 4 * c.text_width}
    text |= {"num_hidden_layers": c.text_layers, "num_attention_heads": c.text_heads}
    # CLIPModel reads the feature of a text at its first end token, wherever that id is.
    text |= {"bos_token_id": c.vocab_size - 2, "eos_token_id": c.vocab_size - 1}
    towers = {"vision_config": vision, "text_config": text}
    return {"model_type": "clip", "projection_dim": c.embed_dim, **towers}


def write_open_clip(model, path):
    """Write the towers to `path`, and open_clip's configuration beside them as .json. Say how
    open_clip loads them."""
    state, c, beside = open_clip_state(model), model.config, path.with_suffix(".json")
    # As bytes, because save_file of safetensors replaces the file that write_file has opened.
    as_bytes = safetensors().save if path.suffix == ".safetensors" else None
    write_file(path, lambda f: f.write(as_bytes(state)) if as_bytes else torch.save(state, f))
    write_json(beside, open_clip_config(c))
    print(f"wrote {path} and {beside}, without the word head. In Python:\n  import open_clip")
    print(f"  open_clip.add_model_config({str(beside)!r})")
    print(f"  model, _, preprocess = open_clip.create_model_and_transforms({path.stem!r},")
    print(f"      {str(path)!r}, image_mean={c.image_mean}, image_std={c.image_std})")


def write_transformers(model, path):
    """Write the towers to `path`, a model.safetensors in a folder of its own, with the files that
    transformers wants beside it, except for the tokenizer (write_clip_tokenizer)."""
    c, folder, state = model.config, path.parent, transformers_state(model)
    folder.mkdir(exist_ok=True)
    write_file(path, lambda f: f.write(safetensors().save(state, {"format": "pt"})))
    write_json(folder / "config.json", transformers_config(c))
    images = {"image_processor_type": "CLIPImageProcessor", "size": c.image_size}
    images |= {"crop_size": c.image_size, "image_mean": c.image_mean, "image_std": c.image_std}
    write_json(folder / "preprocessor_config.json", images)
    print(f"wrote {folder} for transformers' CLIPModel.from_pretrained, without the word head")


def write_clip_tokenizer(folder, context_length):
    """Write CLIP's tokenizer as transformers loads it. open_clip knows the merges."""
    bpe = optional("open_clip", "open_clip_torch").tokenizer.SimpleTokenizer()
    tokens = [*bpe.encoder][:-2] + ["<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    write_json(folder / "tokenizer_config.json", {"model_max_length": context_length})
    merges = "\n".join(["#version: 0.2", *map(" ".join, bpe.bpe_ranks)])
    (folder / "merges.txt").write_text(merges, "utf-8")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("input", metavar="IN", type=Path, help=".pt or .safetensors file, or transformers' folder")
    add("output", metavar="OUT", type=Path, help=".pt, .safetensors for open_clip, or a new folder")
    add("--to", choices=["open_clip", "transformers"], help="this layout, without the word head")
    add("--average", metavar="FILE", type=Path, help="average the weights with those of FILE")
    add("--share", type=number(float, 0, 1), default=0.5, help="of FILE in the average (0.5)")
    add("--half", action="store_true", help="weights of 16 bits, in half the space")
    add("--vocab", metavar="FILE", help="or clip (default: IN's own, else clip)")
    add("--quick_gelu", action=argparse.BooleanOptionalAction, help="which GELU IN needs")
    add("--vision_heads", type=number(int, 1), help="of IN (default: width / 64)")
    add("--text_heads", type=number(int, 1), help="of IN (default: width / 64)")
    add("--image_mean", nargs=3, type=number(float, 0, 1), help="of R, G, B (default: CLIP's)")
    add("--image_std", nargs=3, type=number(float, 0.001), help="of R, G, B (default: CLIP's)")
    add("--image_size", type=number(int, 1), help="a new size: positions are interpolated")
    add("--context_length", type=number(int, 3), help="a new length: the last position is repeated")
    args = parser.parse_args(argv)
    path = args.output / "model.safetensors" if args.to == "transformers" else args.output
    fits = path.suffix in (".pt", args.to and ".safetensors") and args.output.parent.is_dir()
    check(fits and not any(args.output.glob("*")), f"OUT cannot be {args.output}: see --help")
    sources = [p.resolve() for p in (args.input, args.input / path.name, args.average) if p]
    check(path.resolve() not in sources, f"OUT would replace {path.resolve()}")
    flags = {k: v for k, v in vars(args).items() if hasattr(SuperCLIPConfig, k) and v is not None}
    model, vocab = convert(args.input, flags, args.vocab)
    if args.average:
        other, words = convert(args.average, flags, args.vocab)
        unlike = {k for k, v in vars(other.config).items() if v != getattr(model.config, k)}
        unlike = unlike - {"cls_weight"} | ({"vocabulary"} if words != vocab else set())
        check(not unlike, f"{args.average} has another {', '.join(sorted(unlike))}")
        # The head comes last. If only one of the two has it, zip ends before it.
        for p, q in zip(model.parameters(), other.parameters()):
            p.data.lerp_(q.data, args.share)
    model = model.half() if args.half else model
    if not args.to:
        check(evaluation.write_checkpoint(path, model, vocab), f"{path} could not be written")
        return print(f"wrote {path}: {model.config}")
    (write_open_clip if args.to == "open_clip" else write_transformers)(model, path)
    vocab_path, T = str(path.with_suffix(".tiktoken")), model.config.context_length
    if data.Tokenizer(vocab).encode("a photo") != [320, 1125]:  # CLIP's ids
        write_file(vocab_path, lambda file: file.write(vocab.encode()))
        print("  from data import Tokenizer  # of this repository")
        print(f"  tokenizer = Tokenizer.from_file({vocab_path!r}, {T})")
    elif args.to == "transformers":
        write_clip_tokenizer(path.parent, T)


if __name__ == "__main__":
    run_command(main)
