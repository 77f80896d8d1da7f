"""Convert weights that others have trained into a checkpoint of this project, and back:

    python -m scripts.convert ViT-B-32/laion2b_s34b_b79k clip.pt   a model and a tag of open_clip
    python -m scripts.convert superclip_b16.pt superclip.pt        a file of weights
    python -m scripts.convert folder clip.pt                       a folder of open_clip
    python -m scripts.convert out/best.pt folder --to open_clip

A file ends in .pt, .bin or .safetensors, and comes from the authors of SuperCLIP or from open_clip.
The shapes of the tensors tell most of the configuration. The rest is in an open_clip_config.json
beside the file. Without one the command assumes heads that are 64 wide, plain GELU, and CLIP's mean
and standard deviation of pixels, and says so. If that is wrong, write a model of open_clip before
the file, as in ViT-B-32-quickgelu/weights.pt. The command refuses models with parts that this
project lacks.

Weights without a word head become plain CLIP. train.py --init_from adds a new head. --to writes a
folder without the word head, which open_clip loads by
create_model_from_pretrained("local-dir:/PATH"). Our vocabulary lies beside the weights, in
model.tiktoken. Without this file the vocabulary is CLIP's.
"""

import json
from pathlib import Path

from common import run
from common.cli import InputError, check, make_parser, new_folder, run_command
from common.tokenizer import Tokenizer
from superclip import SuperCLIPConfig

# -----------------------------------------------------------------------------
# Names and shapes

# open_clip has the text tower at the top level. In newer files it is under "text.", as in ours.
TEXT_TOWER = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_proj")


def our_name(name):
    """Return the name that a tensor has in this project. name: that in open_clip or in a file of
    the authors, who call the word head "text_decoder"."""
    name = name.removeprefix("module.")  # DistributedDataParallel adds it
    name = name.replace("text_decoder.ln_mlp.", "head.ln.")
    name = name.replace("text_decoder.text_projection.", "head.linear.")
    return f"text.{name}" if name.startswith(TEXT_TOWER) else name


def rename(state):
    """Return the tensors of a state dict under our names, without masks."""
    weights = {our_name(name): x for name, x in state.items() if not name.endswith("attn_mask")}
    # Turn the authors' counters into numbers of captions. In each step they add the *share* of
    # captions that have the token. Their batch has 16,384 captions (paper, section 4).
    if "cap_fq" in weights:
        print("assumed: batches of 16,384 captions, in which the authors count the words")
    for theirs, ours in (("cap_fq", "token_counts"), ("num_samples", "num_captions")):
        if theirs in weights:
            counts = weights.pop(theirs).squeeze() * 16384
            weights[ours] = counts.round().long()
    return weights


def read_shapes(path, weights):
    """Return the fields of the configuration that the names and shapes of tensors tell, as a dict.
    The tensors have our names. If one is missing, the message names the path."""
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
# open_clip's configuration


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


def open_clip_facts(name, model, images):
    """Return the fields of the configuration that shapes do not tell, as a dict. `model` is
    open_clip's description of both towers. `images` is what it knows of a tag, or a preprocess_cfg.

    Refuse a model that has parts which this project lacks, such as another pooling. Such a part
    shows as a field that open_clip_config lacks."""
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


# -----------------------------------------------------------------------------
# Weights in. Both functions return three values: a dict of our names -> tensors, the configuration
# as a dict, and the text of the vocabulary, or None if there is none.


def read_weights(path):
    """Read a file of weights, and the configuration and vocabulary beside it. path: the file, or
    the folder that holds it. Raise InputError if it cannot be read."""
    if path.is_dir():
        # Files without open_clip in their names may be in the layout of transformers.
        names = ("open_clip*model.*", "*model.safetensors", "*model.bin")
        files = [file for name in names for file in path.glob(name)]
        check(files, f"{path} holds no file *model.safetensors or *model.bin")
        path = files[0]
    read = run.read_pickle
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        read = load_file
    content = run.read_file(path, read)
    if content.keys() >= {"model", "config", "vocab"}:
        return content["model"], content["config"], content["vocab"]
    weights = rename(content.get("state_dict", content))
    config = read_shapes(path, weights)
    beside = path.with_name("open_clip_config.json")
    if beside.exists():
        facts = json.loads(beside.read_text("utf-8"))
        config |= open_clip_facts(beside, facts["model_cfg"], facts.get("preprocess_cfg", {}))
    else:
        print("assumed: heads 64 wide, plain GELU, CLIP's mean and std of pixels")
    vocab = path.with_name("model.tiktoken")
    return weights, config, vocab.read_text("utf-8") if vocab.exists() else None


def read_published(name):
    """Read the weights that open_clip downloads. name: MODEL/TAG, where the tag may be a file.
    Raise InputError if it cannot be read."""
    model, _, tag = name.partition("/")
    # A tag with a dot means a file, because no tag of open_clip has one.
    check(tag and ("." not in tag or Path(tag).exists()), f"there is no file {name}")
    import open_clip

    check(model in open_clip.list_models(), f"there is no file {name}, and no model {model}")
    published = open_clip.get_pretrained_cfg(model, tag) or {}
    facts = open_clip_facts(name, open_clip.get_model_config(model), published)
    try:
        other = open_clip.create_model(model, tag, require_pretrained=True)
    except Exception as error:  # open_clip and the network raise a dozen kinds.
        raise InputError(f"open_clip cannot load {name}: {error}") from error
    weights = rename(other.state_dict())
    return weights, {**read_shapes(name, weights), **facts}, None


# -----------------------------------------------------------------------------
# Weights out


def open_clip_state(model):
    """Return the weights that open_clip has, under its names: those of the towers, the scale, and
    the bias of a sigmoid model. The word head, or a module that a fork adds, is not among them."""
    weights = {}
    for name, x in model.state_dict().items():
        if name.startswith(("visual.", "text.")) or name in ("logit_scale", "logit_bias"):
            weights[name.removeprefix("text.")] = x
    return weights


def write_open_clip(folder, model, vocab):
    """Write a model into a folder, in the layout of open_clip's models on the hub."""
    from safetensors.torch import save_file

    c = model.config
    save_file(open_clip_state(model), folder / "model.safetensors", {"format": "pt"})
    images = {"mean": c.image_mean, "std": c.image_std}
    config = {"model_cfg": open_clip_config(c), "preprocess_cfg": images}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    (folder / "model.tiktoken").write_text(vocab)


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    # IN stays a string, because on Windows a Path would turn the / of a name around.
    add("input", metavar="IN", help="file of weights, or folder or MODEL/TAG of open_clip")
    add("output", metavar="OUT", type=Path, help="new .pt file, or with --to a new folder")
    add("--to", choices=["open_clip"], help="write a folder for open_clip, without the word head")
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
    if vocab is None:
        vocab = Tokenizer.from_file("clip").vocab
    content = {"model": weights, "config": config, "vocab": vocab}
    model, _ = run.restore(args.input, content)
    if args.to:
        with new_folder(out) as folder:
            write_open_clip(folder, model, vocab)
    else:
        run.write_checkpoint(out, model, vocab)
    print(f"wrote {out}: {model.config}")


if __name__ == "__main__":
    run_command(main)
