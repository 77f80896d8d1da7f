"""Convert weights: what others have trained into a checkpoint of this project, and back.

    python -m scripts.convert ViT-B-16.pt clip.pt
    python -m scripts.convert ViT-B-32/laion2b_s34b_b79k clip.pt
    python -m scripts.convert out/best.pt folder --to open_clip
    python -m scripts.convert out/best.pt folder --to transformers

The input is a .pt or .safetensors file of OpenAI's CLIP (as a state dict), of open_clip, of
transformers' CLIPModel, of the authors' SuperCLIP, or of this project, or a folder in which the
file is called model.safetensors, as transformers and this command make them. The shapes of its
tensors tell most of the configuration. The rest comes from the configuration beside it (of
open_clip, open_clip_config.json or here ViT-B-16.json; of transformers, config.json), or else it is
assumed, and the command says so. A file without a word head becomes plain CLIP, and train.py
--init_from gives it a new head. For images of another size, let open_clip interpolate the positions
(create_model(..., force_image_size=160)), and convert what it has made.

Instead of a file, the input may be a model and a tag of open_clip, as in the second command, unless
there is a file of that name. open_clip then downloads the weights, and nothing is assumed.

The export to transformers has no tokenizer. The command says what tokenizes a caption.
"""

import json
from contextlib import suppress
from pathlib import Path

import torch

import checkpoint
from cli import InputError, check, make_parser, optional, run_command, write_file, write_json
from superclip import SuperCLIPConfig
from tokenizer import Tokenizer

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
# What shapes do not tell, and what is assumed of a file without a configuration beside it
ASSUMED = {
    "quick_gelu": "plain GELU",
    "vision_heads": "heads 64 wide, which those of ViT-H-14 are not",
    "image_mean": "CLIP's mean and standard deviation of the pixels",
}


def safetensors():
    return optional("safetensors.torch", "safetensors")


def our_name(name):
    """The name of a tensor in any layout -> its name in this project."""
    # The authors call the word head "text_decoder".
    name = name.replace("text_decoder.ln_mlp.", "head.ln.")
    name = name.replace("text_decoder.text_projection.", "head.linear.")
    for ours, theirs in NAMES.items():
        name = name.replace(theirs, ours)
    return f"text.{name}" if name.startswith(TEXT_TOWER) else name


def rename(content):
    """The tensors of a file in any layout but our own -> those of this project, by name."""
    weights = {}
    for name, tensor in content.items():
        # An optimizer numbers its tensors, and DistributedDataParallel adds "module.".
        name = str(name).removeprefix("module.")
        if not torch.is_tensor(tensor) or name.endswith(("attn_mask", "position_ids")):
            continue
        if name in ("text_projection.weight", "visual_projection.weight"):
            tensor = tensor.T  # transformers has the projections transposed
        weights[our_name(name)] = tensor
    # transformers has query, key and value apart.
    for name in [name for name in weights if ".q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        weights[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    # The authors' counters add up, over steps, the *share* of captions that have the token. Times
    # their batch of 16,384 (paper, section 4), that is the number of captions, which we count.
    for theirs, ours in (("cap_fq", "token_counts"), ("num_samples", "num_captions")):
        if theirs in weights:
            counts = weights.pop(theirs).squeeze() * 16384
            weights[ours] = counts.round().long()
    return weights


def read_shapes(path, weights):
    """Returns what the names and shapes of our tensors tell of the configuration, a dict."""
    config = {}
    for name, fields in AXES.items():
        check(name in weights, f"{path} does not fit: it has no tensor {name}")
        for field, length in zip(fields, weights[name].shape):
            if field is not None:
                config[field] = length
    # The class token has a position, too. If the others make no square, eval.restore says so.
    grid = int((config.pop("positions") - 1) ** 0.5)
    config["image_size"] = config["patch_size"] * grid
    norms = [name for name in weights if name.endswith(".ln_1.weight")]
    config["vision_layers"] = sum(name.startswith("visual.") for name in norms)
    config["text_layers"] = sum(name.startswith("text.") for name in norms)
    config["loss"] = "sigmoid" if "logit_bias" in weights else "softmax"
    config["cls_weight"] = float("head.linear.weight" in weights)
    return config


def read_config_beside(path, vision_width):
    """Returns what a configuration beside the weights tells, a dict. What it leaves out has the
    default of its library. A file that is something else tells nothing."""
    config = {}
    with suppress(Exception):  # of transformers
        other = json.loads(path.with_name("config.json").read_text("utf-8"))
        config["vision_heads"] = other["vision_config"].get("num_attention_heads", 12)
        config["text_heads"] = other["text_config"].get("num_attention_heads", 8)
        config["quick_gelu"] = other["vision_config"].get("hidden_act") in (None, "quick_gelu")
        # preprocessor_config.json, or since version 5 a part of processor_config.json
        other = json.loads(next(path.parent.glob("p*rocessor_config.json")).read_text("utf-8"))
        other = other.get("image_processor", other)
        config["image_mean"] = tuple(other["image_mean"])
        config["image_std"] = tuple(other["image_std"])
    beside = path.with_suffix(".json")
    if not beside.exists():
        beside = path.with_name("open_clip_config.json")  # as open_clip's models on the hub have it
    with suppress(Exception):  # of open_clip
        config |= read_open_clip(json.loads(beside.read_text("utf-8")), vision_width)
    return config


def read_open_clip(other, vision_width):
    """other: open_clip's configuration of a model, or a dict that has it as model_cfg, and as
    preprocess_cfg what is done to images. Returns what it tells, a dict."""
    model = other.get("model_cfg", other)
    images = other.get("preprocess_cfg", {})
    config = {
        "vision_heads": vision_width // model["vision_cfg"].get("head_width", 64),
        "text_heads": int(model["text_cfg"].get("heads", 8)),
        "quick_gelu": bool(model.get("quick_gelu", False)),
    }
    if images:
        config["image_mean"] = tuple(images["mean"])
        config["image_std"] = tuple(images["std"])
    return config


def read_weights(path):
    """A file in any layout, or a folder of transformers -> (weights: dict of name -> tensor, in our
    names; what is known of the configuration, a dict; text of the vocabulary or None). Raises
    InputError."""
    if path.is_dir():
        path = path / "model.safetensors"
    read = checkpoint.read_pickle
    if path.suffix == ".safetensors":
        read = safetensors().load_file
    content = checkpoint.read_file(path, read)
    if isinstance(content, dict):
        if content.keys() >= {"model", "config", "vocab"}:
            return content["model"], content["config"], content["vocab"]
        content = content.get("state_dict", content)
    check(isinstance(content, dict), f"{path} holds no tensors by name: save a state_dict")
    weights = rename(content)
    config = {}
    scalars = {"input_resolution", "context_length", "vocab_size"}
    if scalars <= weights.keys():  # of OpenAI's files, and only of them
        config = {"quick_gelu": True, "vision_heads": 0, "text_heads": 0}  # 0: they are 64 wide
        config["image_mean"] = SuperCLIPConfig.image_mean
        config["image_std"] = SuperCLIPConfig.image_std
    weights = {name: tensor for name, tensor in weights.items() if name not in scalars}
    config |= read_shapes(path, weights)
    config |= read_config_beside(path, config["vision_width"])
    vocab = path.with_suffix(".tiktoken")  # write_vocabulary puts it there
    if vocab.is_file():
        return weights, config, Tokenizer.from_file(vocab).vocab
    return weights, config, None


def check_config(model, other):
    """Raises InputError unless this project can build a model of open_clip. What it cannot build,
    such as another pooling, shows as a key that open_clip_config never writes."""
    ours = open_clip_config(SuperCLIPConfig())
    unknown = other.keys() - ours.keys()
    for tower in ("vision_cfg", "text_cfg"):
        unknown |= other[tower].keys() - ours[tower].keys()
    names = ", ".join(sorted(unknown))
    check(not unknown, f"{model} of open_clip has parts that this project lacks: {names}")


def read_published(name):
    """MODEL/TAG of open_clip, which downloads the weights -> what read_weights returns. Raises
    InputError."""
    open_clip = optional("open_clip", "open_clip_torch")
    model, _, tag = name.partition("/")
    published = open_clip.get_pretrained_cfg(model, tag)
    nothing = f"there is no file {name}, and none of open_clip.list_pretrained() has that name"
    check(published, nothing)
    other = open_clip.get_model_config(model)
    check_config(model, other)
    try:
        file = open_clip.download_pretrained(published)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot download {name}: is there a network? ({reason})") from error

    weights = rename(open_clip.create_model(model, file).state_dict())
    config = read_shapes(name, weights)
    whole = {"model_cfg": other, "preprocess_cfg": published}
    config |= read_open_clip(whole, config["vision_width"])
    # The tag counts, because the model's name may say otherwise: ViT-B-32/openai has quick GELU.
    config["quick_gelu"] = published.get("quick_gelu", False)
    return weights, config, None


def convert(name, vocab=None):
    """A file in any layout, or MODEL/TAG of open_clip -> model, tokenizer. vocab: a vocabulary file
    to use in place of the file's own, or of CLIP's if the file has none. Raises InputError."""
    path = Path(name)
    if path.exists() or path.suffix:  # names of open_clip have none
        weights, config, known = read_weights(path)
    else:
        weights, config, known = read_published(name)
    assumed = [text for field, text in ASSUMED.items() if field not in config]
    if assumed:
        print(f"Assumed, without open_clip_config.json beside {name}: {'; '.join(assumed)}")
    if vocab is not None or known is None:
        known = Tokenizer.from_file(vocab or "clip").vocab
    return checkpoint.restore(name, weights, config, known)


# -----------------------------------------------------------------------------
# Weights out

ONLY_OURS = ("head.", "token_counts", "num_captions")  # no other library knows a word head


def open_clip_state(model):
    """The weights of the towers under open_clip's names."""
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(ONLY_OURS):
            state[name.removeprefix("text.")] = tensor
    return state


def open_clip_config(c):
    """c: a SuperCLIPConfig -> the dict from which open_clip builds the same towers."""
    return {
        "embed_dim": c.embed_dim,
        "quick_gelu": c.quick_gelu,
        # a number makes open_clip build a logit_bias
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
    """The weights of the towers under the names of transformers' CLIPModel. It has no logit_bias,
    without which the logits of a model of the sigmoid loss are all too high."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith((*ONLY_OURS, "logit_bias")):
            continue
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if ".in_proj_" in name:
            for x, part in zip("qkv", tensor.chunk(3)):
                state[name.replace("in_proj_", f"{x}_proj.")] = part.clone()
        elif "projection." in name:
            state[name] = tensor.T.contiguous()
        else:
            state[name] = tensor
    return state


def transformers_config(c):
    """c: a SuperCLIPConfig -> the dict from which transformers builds the same towers."""
    shared = {"projection_dim": c.embed_dim, "hidden_act": "quick_gelu" if c.quick_gelu else "gelu"}
    vision = {
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "hidden_size": c.vision_width,
        "intermediate_size": 4 * c.vision_width,
        "num_hidden_layers": c.vision_layers,
        "num_attention_heads": c.vision_heads,
    }
    text = {
        "max_position_embeddings": c.context_length,
        "vocab_size": c.vocab_size,
        "hidden_size": c.text_width,
        "intermediate_size": 4 * c.text_width,
        "num_hidden_layers": c.text_layers,
        "num_attention_heads": c.text_heads,
        # CLIPModel reads the feature of a text at its first end token, wherever that id is.
        "bos_token_id": c.vocab_size - 2,
        "eos_token_id": c.vocab_size - 1,
    }
    towers = {"vision_config": {**vision, **shared}, "text_config": {**text, **shared}}
    return {"model_type": "clip", "projection_dim": c.embed_dim, **towers}


def write_folder(folder, state, files):
    """Make a folder with weights, and files that say of what model they are, a dict of name ->
    content. Returns the path of the weights."""
    # As bytes, because save_file of safetensors replaces the file that write_file has opened.
    content = safetensors().save(state, {"format": "pt"})
    folder.mkdir()  # now, when no package can be missing any more
    path = folder / "model.safetensors"
    write_file(path, lambda file: file.write(content))
    for name, value in files.items():
        write_json(folder / name, value)
    print(f"wrote {folder}, without the word head. In Python:")
    return path


def write_open_clip(model, tokenizer, folder):
    """Write the towers in the layout of open_clip's models on the hub. Say how it loads them, and
    what tokenizes a caption if the vocabulary is not CLIP's."""
    c = model.config
    images = {"mean": c.image_mean, "std": c.image_std}
    config = {"model_cfg": open_clip_config(c), "preprocess_cfg": images}
    path = write_folder(folder, open_clip_state(model), {"open_clip_config.json": config})
    name = f"local-dir:{folder.resolve()}"
    print("  import open_clip  # version 3 or newer")
    print(f"  model, preprocess = open_clip.create_model_from_pretrained({name!r})")
    if not is_clips(tokenizer):
        write_vocabulary(tokenizer, path)


def is_clips(tokenizer):
    return tokenizer.encode("a photo") == [320, 1125]


def write_vocabulary(tokenizer, path):
    """Write a vocabulary that no other library can read beside the weights, where this command
    looks for it, and say how to tokenize with it."""
    beside = path.with_suffix(".tiktoken")
    write_file(beside, lambda file: file.write(tokenizer.vocab.encode()))
    print(f"  from tokenizer import Tokenizer  # run in {Path(__file__).parents[1]}")
    name = str(beside.resolve())
    print(f"  tokenizer = Tokenizer.from_file({name!r}, {tokenizer.context_length})")


def write_transformers(model, tokenizer, folder):
    """Write the towers with the files that transformers wants beside them. Say how it loads them,
    and what tokenizes a caption."""
    c = model.config
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "size": c.image_size,
        "crop_size": c.image_size,
        "image_mean": c.image_mean,
        "image_std": c.image_std,
    }
    files = {"config.json": transformers_config(c), "preprocessor_config.json": images}
    path = write_folder(folder, transformers_state(model), files)
    name = str(folder.resolve())
    print("  from transformers import CLIPModel, CLIPTokenizer")
    print(f"  model = CLIPModel.from_pretrained({name!r})")
    if is_clips(tokenizer):
        print("  tokenizer = CLIPTokenizer.from_pretrained('openai/clip-vit-base-patch32')")
    else:
        write_vocabulary(tokenizer, path)


# -----------------------------------------------------------------------------
# The command


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    # a text, because Windows would turn the / of a name around
    text = ".pt or .safetensors file, transformers' folder, or MODEL/TAG of open_clip"
    add("input", metavar="IN", help=text)
    add("output", metavar="OUT", type=Path, help="new .pt file, or with --to a new folder")
    text = "this layout, without the word head"
    add("--to", choices=["open_clip", "transformers"], help=text)
    add("--vocab", metavar="FILE", help="vocabulary, or clip (default: IN's or clip)")
    args = parser.parse_args(argv)
    out = args.output
    check(not out.exists(), f"{out} is there already: OUT must be new")
    check(args.to or out.suffix == ".pt", f"OUT must end in .pt, which {out} does not")
    check(out.parent.is_dir(), f"there is no folder {out.parent}")
    model, tokenizer = convert(args.input, args.vocab)

    if args.to == "open_clip":
        write_open_clip(model, tokenizer, out)
    elif args.to == "transformers":
        write_transformers(model, tokenizer, out)
    else:
        checkpoint.write_checkpoint(out, model, tokenizer.vocab)
        print(f"wrote {out}: {model.config}")


if __name__ == "__main__":
    run_command(main)
