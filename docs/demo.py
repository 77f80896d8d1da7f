"""Put two models into demo.html, a page in which CLIP and SuperCLIP answer side by side:

    python -m docs.demo out_clip_8/last.pt out_8/last.pt

The two models in the page were trained in batches of 8, each at the learning rate that the study
chose for it:

    python train.py --batch_size 8 --epochs 1.6 --learning_rate 1.25e-4 --cls_weight 0 \\
        --out_dir out_clip_8
    python train.py --batch_size 8 --epochs 1.6 --learning_rate 2.5e-4 --out_dir out_8

The page is written by hand, and needs no network and no library. One JSON object in it has the
weights, as int8 with a scale for each row. This command replaces the models in that object.
"""

import base64
import json
from pathlib import Path

import torch

from common import scenes
from common.checkpoint import read_checkpoint
from common.cli import check, make_parser, output_file, run_command
from eval import load

PAGE = Path(__file__).with_suffix(".html")
BEGIN, END = '<script type="application/json" id="numbers">', "</script>"


def base64_text(tensor):
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def int8_rows(tensor):
    """Return int8 (R, C) and scale (R,), so that a tensor is about int8 * scale. There is a scale
    for each of its R rows. A row is an index of the first dimension."""
    rows = tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
    scale = rows.abs().amax(dim=1) / 127
    int8 = (rows / scale.clamp_min(1e-30)[:, None]).round().to(torch.int8)
    return int8, scale


def quantise(tensor):
    """Return a tensor as a dict of its shape, and of int8 and scale as base64 text."""
    int8, scale = int8_rows(tensor)
    return {"shape": [*tensor.shape], "int8": base64_text(int8), "scale": base64_text(scale)}


def model_facts(checkpoint, has_head):
    """Return what the page needs to know of a model: its configuration, its weights, and how it was
    trained. checkpoint: the last.pt of its run; has_head: whether it must have a word head. Raise
    InputError if the page cannot use it."""
    content = read_checkpoint(checkpoint)
    model, _, _ = load(checkpoint)
    found = content["vocab"], model.config.image_size, model.head is not None
    is_right = "step" in content and found == (scenes.vocabulary(), scenes.SIZE, has_head)
    kind = "with" if has_head else "without"
    check(is_right, f"{checkpoint} must be of a run on the built-in scenes {kind} a word head")
    options = content["header"]["arguments"]
    facts = {name: options[name] for name in ("seed", "learning_rate", "batch_size")}
    return {
        "config": vars(model.config),
        "weights": {name: quantise(p) for name, p in model.named_parameters()},
        "options": {**facts, "samples": content["step"] * options["batch_size"]},
    }


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("clip", help="last.pt of a run on the built-in scenes with --cls_weight 0")
    add("superclip", help="last.pt of the same run with the word head")
    add("--out", type=output_file(".html"), default=PAGE, help=f"page to write (default {PAGE})")
    args = parser.parse_args(argv)
    start, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    numbers, _, end = rest.partition(END)
    content = json.loads(numbers)
    clip = model_facts(args.clip, False)
    superclip = model_facts(args.superclip, True)
    for name in ("seed", "batch_size", "samples"):  # the page says that they are equal
        check(clip["options"][name] == superclip["options"][name], f"the two runs differ in {name}")
    content["models"] = [clip, superclip]
    args.out.write_text(start + BEGIN + json.dumps(content) + END + end, "utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_command(main)
