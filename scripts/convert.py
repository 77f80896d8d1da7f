"""Convert weights that others have trained into a checkpoint of this project, and back:

    python -m scripts.convert superclip_b16.pt superclip.pt        a file of weights
    python -m scripts.convert ViT-B-32/laion2b_s34b_b79k clip.pt   a model and a tag of open_clip
    python -m scripts.convert folder clip.pt                       from transformers or open_clip
    python -m scripts.convert out/best.pt folder --to open_clip
    python -m scripts.convert out/best.pt folder --to transformers

A file ends in .pt, .bin or .safetensors. It comes from the authors of SuperCLIP, from OpenAI (a
state dict of CLIP), from open_clip or from transformers.

The shapes of the tensors tell most of the configuration. The rest is in a config.json or
open_clip_config.json beside the file. Without one the command assumes heads that are 64 wide,
CLIP's mean and standard deviation of pixels, and plain GELU, or quick GELU in OpenAI's files. It
prints what it assumes. If that is wrong, write a model of open_clip before the file, as in
ViT-B-32-quickgelu/weights.pt. The command refuses models with parts that this project lacks.

Weights without a word head become plain CLIP. train.py --init_from adds a new head. --to writes a
folder without the word head. open_clip loads it by create_model_from_pretrained("local-dir:/PATH"),
and transformers by CLIPModel.from_pretrained("PATH"). The folder also holds the vocabulary, which
Tokenizer.from_file("PATH/model.tiktoken", context_length) reads.
"""

import json
from pathlib import Path

import torch

from common import checkpoint
from common.cli import InputError, check, make_parser, optional, run_command
from common.machine import new_folder
from common.tokenizer import Tokenizer
from superclip import SuperCLIPConfig

# -----------------------------------------------------------------------------
# Names and shapes

# open_clip has the text tower at the top level. In newer files it is under "text.", as in ours.
TEXT_TOWER = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_proj")
# Parts of our names, and the parts that transformers' CLIPModel has in their place. The order
# matters in both directions, because a part may contain a later one.
NAMES = {
    "text.text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
    "visual.": "vision_model.",
    "text.": "text_model.",
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding": "embeddings.token_embedding",
    "class_embedding": "embeddings.class_embedding",
    "conv1": "embeddings.patch_embedding",
    "transformer.resblocks": "encoder.layers",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm",
    "ln_": "layer_norm",
    "attn": "self_attn",
    "c_fc": "fc1",
    "c_proj": "fc2",
}
# Files may also hold masks, and OpenAI's hold three numbers of the configuration.
NO_WEIGHTS = ("attn_mask", "position_ids", "input_resolution", "context_length", "vocab_size")


def our_name(name):
    """Return the name that a tensor has in this project. name: its name in any layout."""
    # The authors call the word head "text_decoder".
    name = name.replace("text_decoder.ln_mlp.", "head.ln.")
    name = name.replace("text_decoder.text_projection.", "head.linear.")
    for ours, theirs in NAMES.items():
        name = name.replace(theirs, ours)
    return f"text.{name}" if name.startswith(TEXT_TOWER) else name


def rename(content):
    """Return the tensors of this project, as a dict of name -> tensor. content: the dict in a file
    of any layout but our own."""
    weights = {}
    for name, tensor in content.items():
        name = str(name).removeprefix("module.")  # DistributedDataParallel adds it
        if not torch.is_tensor(tensor) or name.endswith(NO_WEIGHTS):
            continue
        if name in ("text_projection.weight", "visual_projection.weight"):
            tensor = tensor.T  # transformers stores the projections transposed.
        weights[our_name(name)] = tensor
    # Join query, key and value, which are separate tensors in transformers.
    for name in [name for name in weights if ".q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        weights[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    # Turn the authors' counters into numbers of captions. In each step they add the *share* of
    # captions that have the token. Their batch has 16,384 captions (paper, section 4).
    for theirs, ours in (("cap_fq", "token_counts"), ("num_samples", "num_captions")):
        if theirs in weights:
            counts = weights.pop(theirs).squeeze() * 16384
            weights[ours] = counts.round().long()
    return weights


def read_shapes(path, weights):
    """Return the fields of the configuration that the names and shapes of tensors tell, as a dict.
    path: for the message; weights: with our names. Raise InputError if a tensor is missing."""
    try:
        vision_width, _, patch_size, _ = weights["visual.conv1.weight"].shape
        positions, _ = weights["visual.positional_embedding"].shape
        _, embed_dim = weights["visual.proj"].shape
        vocab_size, text_width = weights["text.token_embedding.weight"].shape
        context_length, _ = weights["text.positional_embedding"].shape
    except KeyError as error:
        raise InputError(f"{path} does not fit: it has no tensor {error}") from None
    blocks = [name for name in weights if name.endswith(".ln_1.weight")]
    return {
        # The class token has a position, too. If the others make no square, restore will say so.
        "image_size": patch_size * int((positions - 1) ** 0.5),
        "patch_size": patch_size,
        "vision_width": vision_width,
        "vision_layers": sum(name.startswith("visual.") for name in blocks),
        "text_width": text_width,
        "text_layers": sum(name.startswith("text.") for name in blocks),
        "embed_dim": embed_dim,
        "context_length": context_length,
        "vocab_size": vocab_size,
        "loss": "sigmoid" if "logit_bias" in weights else "softmax",
        "cls_weight": float("head.linear.weight" in weights),
    }


# -----------------------------------------------------------------------------
# Facts, a dict of the fields that shapes do not tell: heads, GELU, mean and std of pixels


def open_clip_facts(name, model, images):
    """Return the facts in a configuration of open_clip. name: for the message; model: the dict that
    describes both towers; images: open_clip's facts about a tag, or its preprocess_cfg, or {}.
    Raise InputError if the model has parts that this project lacks, such as another pooling. Such a
    part shows as a field that open_clip_config never writes."""
    ours = open_clip_config(SuperCLIPConfig())
    vision = model["vision_cfg"]
    text = model["text_cfg"]
    # Two more fields do no harm. They tell the names of tensors, and where the scale starts.
    lacking = model.keys() - ours.keys() - {"custom_text", "init_logit_scale"}
    lacking |= vision.keys() - ours["vision_cfg"].keys()
    lacking |= text.keys() - ours["text_cfg"].keys()
    check(not lacking, f"{name} has parts that this project lacks: {', '.join(sorted(lacking))}")
    return {
        "vision_heads": vision["width"] // vision.get("head_width", 64),
        "text_heads": text.get("heads", 8),
        # A tag counts more than the model, because ViT-B-32/openai has quick GELU.
        "quick_gelu": images.get("quick_gelu", model.get("quick_gelu", False)),
        "image_mean": tuple(images.get("mean", SuperCLIPConfig.image_mean)),
        "image_std": tuple(images.get("std", SuperCLIPConfig.image_std)),
    }


def transformers_facts(folder):
    """Return the facts in a folder of transformers. A model that is no CLIP lacks some tensors of
    CLIP, so read_shapes or restore refuses it."""
    transformers = optional("transformers")
    config = transformers.CLIPConfig.from_pretrained(folder)
    vision, text = config.vision_config, config.text_config
    parts = {(tower.layer_norm_eps, tower.hidden_act) for tower in (vision, text)}
    is_known = parts in ({(1e-5, "gelu")}, {(1e-5, "quick_gelu")})
    check(is_known, f"{folder} has parts that this project lacks, in layer_norm_eps or hidden_act")
    try:
        images = transformers.CLIPImageProcessor.from_pretrained(folder)
    except OSError:  # CLIPModel.save_pretrained writes none
        images = transformers.CLIPImageProcessor()
        print(f"assumed, as {folder} has no image processor: CLIP's mean and std of pixels")
    return {
        "vision_heads": vision.num_attention_heads,
        "text_heads": text.num_attention_heads,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "image_mean": tuple(images.image_mean),
        "image_std": tuple(images.image_std),
    }


def facts_beside(path):
    """Return the facts in the configuration beside a file of weights, or {} if there is none."""
    folder = path.parent
    beside = folder / "open_clip_config.json"
    if beside.exists():
        content = json.loads(beside.read_text("utf-8"))
        return open_clip_facts(beside, content["model_cfg"], content.get("preprocess_cfg", {}))
    beside = folder / "config.json"
    if beside.exists() and "vision_config" in json.loads(beside.read_text("utf-8")):
        return transformers_facts(folder)
    return {}


# -----------------------------------------------------------------------------
# Weights in. Both functions return three values: a dict of our names -> tensors, the configuration
# as a dict, and the text of the vocabulary, or None if there is none


def read_weights(path):
    """Read a file of weights, and the configuration and vocabulary beside it. path: the file, or
    the folder that holds it. Raise InputError if it cannot be read."""
    if path.is_dir():
        files = [*path.glob("*model.safetensors"), *path.glob("*model.bin")]
        check(files, f"{path} holds no file *model.safetensors or *model.bin")
        path = files[0]
    read = checkpoint.read_pickle
    if path.suffix == ".safetensors":
        read = optional("safetensors.torch", "safetensors").load_file
    content = checkpoint.read_file(path, read)
    if content.keys() >= {"model", "config", "vocab"}:
        return content["model"], content["config"], content["vocab"]
    content = content.get("state_dict", content)
    weights = rename(content)
    facts = facts_beside(path)
    if not facts:
        facts = {"quick_gelu": "input_resolution" in content}
        gelu = "quick GELU, because it is OpenAI's" if facts["quick_gelu"] else "plain GELU"
        print(f"assumed: heads 64 wide, CLIP's mean and std of pixels, {gelu}")
    vocab = path.with_name("model.tiktoken")  # --to writes it.
    vocab = Tokenizer.from_file(vocab).vocab if vocab.exists() else None
    return weights, {**read_shapes(path, weights), **facts}, vocab


def read_published(name):
    """Read the weights that open_clip downloads. name: MODEL/TAG, where the tag may be a file.
    Raise InputError if it cannot be read."""
    model, _, tag = name.partition("/")
    # A tag with a dot means a file, because no tag of open_clip has one.
    check(tag and ("." not in tag or Path(tag).exists()), f"there is no file {name}")
    open_clip = optional("open_clip", "open_clip_torch")
    check(model in open_clip.list_models(), f"there is no file {name}, and no model {model}")
    published = open_clip.get_pretrained_cfg(model, tag) or {}
    facts = open_clip_facts(name, open_clip.get_model_config(model), published)
    try:
        other = open_clip.create_model(model, tag, require_pretrained=True)
    except Exception as error:  # open_clip and the network raise a dozen kinds.
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"open_clip cannot load {name}: {reason}") from error
    weights = rename(other.state_dict())
    return weights, {**read_shapes(name, weights), **facts}, None


# -----------------------------------------------------------------------------
# Weights out

ONLY_OURS = ("head.", "token_counts", "num_captions")  # Other libraries have no word head.


def open_clip_state(model):
    """Return the weights of the towers under open_clip's names."""
    state = model.state_dict().items()
    return {name.removeprefix("text."): x for name, x in state if not name.startswith(ONLY_OURS)}


def open_clip_config(c):
    """Return the dict from which open_clip builds the same towers. c: a SuperCLIPConfig."""
    return {
        "embed_dim": c.embed_dim,
        "quick_gelu": c.quick_gelu,
        # A number makes open_clip build a logit_bias.
        "init_logit_bias": -10.0 if c.loss == "sigmoid" else None,
        "vision_cfg": {
            "image_size": c.image_size,
            "patch_size": c.patch_size,
            "layers": c.vision_layers,
            "width": c.vision_width,
            "head_width": c.vision_width // c.vision_heads,
        },
        "text_cfg": {
            "context_length": c.context_length,
            "vocab_size": c.vocab_size,
            "width": c.text_width,
            "layers": c.text_layers,
            "heads": c.text_heads,
        },
    }


def transformers_state(model):
    """Return the weights of the towers under the names of transformers' CLIPModel. It has no
    logit_bias, so after training with the sigmoid loss all its logits are too high."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith((*ONLY_OURS, "logit_bias")):
            continue
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if ".in_proj_" in name:
            for x, part in zip("qkv", tensor.chunk(3)):
                state[name.replace("in_proj_", f"{x}_proj.")] = part.clone()
        else:
            state[name] = tensor.T.contiguous() if "projection." in name else tensor
    return state


def transformers_config(c):
    """Return the dict from which transformers builds the same towers. c: a SuperCLIPConfig."""

    def tower(width, layers, heads, **more):
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": "quick_gelu" if c.quick_gelu else "gelu",
            "projection_dim": c.embed_dim,
            **more,
        }

    vision = {"image_size": c.image_size, "patch_size": c.patch_size}
    text = {"max_position_embeddings": c.context_length, "vocab_size": c.vocab_size}
    # Tell CLIPModel which token ends a text, because it reads the feature there.
    text |= {"bos_token_id": c.vocab_size - 2, "eos_token_id": c.vocab_size - 1}
    return {
        "projection_dim": c.embed_dim,
        "vision_config": tower(c.vision_width, c.vision_layers, c.vision_heads, **vision),
        "text_config": tower(c.text_width, c.text_layers, c.text_heads, **text),
    }


def write_open_clip(model, folder):
    """Write a model into a folder, in the layout of open_clip's models on the hub."""
    c = model.config
    save_file = optional("safetensors.torch", "safetensors").save_file
    save_file(open_clip_state(model), folder / "model.safetensors", {"format": "pt"})
    images = {"mean": c.image_mean, "std": c.image_std}
    config = {"model_cfg": open_clip_config(c), "preprocess_cfg": images}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))


def write_transformers(model, folder):
    """Write a model into a folder, as transformers saves a CLIPModel and its image processor."""
    transformers = optional("transformers")
    c = model.config
    other = transformers.CLIPModel(transformers.CLIPConfig(**transformers_config(c)))
    other.load_state_dict(transformers_state(model))
    other.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": c.image_size},
        crop_size=c.image_size,
        image_mean=c.image_mean,
        image_std=c.image_std,
    )
    images.save_pretrained(folder)


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    # IN stays a string, because on Windows a Path would turn the / of a name around.
    text = "file of weights, folder of open_clip or transformers, or MODEL/TAG of open_clip"
    add("input", metavar="IN", help=text)
    add("output", metavar="OUT", type=Path, help="new .pt file, or with --to a new folder")
    text = "write for this library, without the word head"
    add("--to", choices=["open_clip", "transformers"], help=text)
    add("--vocab", metavar="FILE", help="vocabulary, or clip (default: that of IN, else clip)")
    args = parser.parse_args(argv)
    out = args.output
    check(not out.exists(), f"{out} is there already: OUT must be new")
    is_file = out.suffix == ".pt" and out.parent.is_dir()
    check(args.to or is_file, f"{out} must end in .pt, in an existing folder")
    path = Path(args.input)
    if path.exists():
        weights, config, vocab = read_weights(path)
    else:
        weights, config, vocab = read_published(args.input)
    if args.vocab or vocab is None:
        vocab = Tokenizer.from_file(args.vocab or "clip").vocab
    model, tokenizer = checkpoint.restore(args.input, weights, config, vocab)
    if args.to:
        write = {"open_clip": write_open_clip, "transformers": write_transformers}[args.to]
        with new_folder(out) as folder:
            write(model, folder)
            (folder / "model.tiktoken").write_text(tokenizer.vocab)
    else:
        checkpoint.write_checkpoint(out, model, tokenizer.vocab)
    print(f"wrote {out}: {model.config}")


if __name__ == "__main__":
    run_command(main)
