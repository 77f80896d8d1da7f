"""Write one page in which CLIP and SuperCLIP answer side by side, in the reader's browser:

    python -m docs.demo out_clip/last.pt out/last.pt --out docs/demo.html

The models of docs/demo.html, at batch 8 and the rates that study/rates.md has for it, are made by
one command, which then writes the page:

    run="python train.py --batch_size 8 --epochs 1.6" &&
        $run --learning_rate 1.25e-4 --cls_weight 0 --out_dir out_clip_8 &&
        $run --learning_rate 2.5e-4 --out_dir out_8 &&
        python -m docs.demo out_clip_8/last.pt out_8/last.pt --out docs/demo.html

The reader guesses what both models say of a built-in scene, or composes one. The page needs no
network and no library: it carries the weights, as int8 with a scale for each row. The forward pass,
the drawing and the questions are in demo_template.html, and what all pages share is in page.html.
The tokens of texts are computed here.
"""

import base64
from pathlib import Path

import torch

import scenes
from checkpoint import load, read_checkpoint
from cli import check, make_parser, output_file, run_command
from scripts.page import page_text
from tokenizer import Tokenizer, trim

TEMPLATE = Path(__file__).with_name("demo_template.html")
PROMPT = "a photo of a {}"  # one for each of the 64 combinations of colour and shape
NAMES = [" ".join(look) for look in scenes.COMBINATIONS]
SWAPPED = (  # the captions of a question
    "a red star and a blue ring on plain gray with mint",
    "a blue star and a red ring on plain gray with mint",
)


def base64_text(tensor):
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def quantise(tensor):
    """tensor -> {shape, int8, scale}, both as base64 text: about int8 * scale, with a scale for
    each row (all that one index of the first dimension has). So every number of a vector has a
    scale of its own, and stays as it is."""
    rows = tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)
    scale = rows.abs().amax(dim=1) / 127
    int8 = (rows / scale.clamp_min(1e-30)[:, None]).round().to(torch.int8)
    return {"shape": [*tensor.shape], "int8": base64_text(int8), "scale": base64_text(scale)}


def model_facts(checkpoint):
    """What the page needs of a model: its weights, and options of its run. Raises InputError."""
    content = read_checkpoint(checkpoint)
    check("header" in content, f"{checkpoint} does not say how it was trained: name a last.pt")
    options = content["header"]["arguments"]
    model, _, _ = load(checkpoint)
    return {
        "config": vars(model.config),
        "weights": {name: quantise(p) for name, p in model.named_parameters()},
        "options": {
            "seed": options["seed"],
            "learning_rate": options["learning_rate"],
            "batch_size": options["batch_size"],
            "samples": content["step"] * options["batch_size"],
        },
    }


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("clip", help="checkpoint of a run on the built-in scenes with --cls_weight 0")
    add("superclip", help="checkpoint of the same run with the word head")
    add("--out", type=output_file(".html"), required=True, help="page to write")
    args = parser.parse_args(argv)
    models = [model_facts(args.clip), model_facts(args.superclip)]
    tokenizer = Tokenizer(scenes.vocabulary())

    def tokens(text):
        return trim(tokenizer([text]))[0].tolist()

    content = {
        "models": models,
        "prompt": PROMPT,
        "prompts": [tokens(PROMPT.replace("{}", name)) for name in NAMES],
        "swapped": [tokens(caption) for caption in SWAPPED],
        "words": [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)],
        "scenes": {
            "size": scenes.SIZE,
            "cloths": scenes.CLOTHS,
            "patterns": scenes.PATTERNS,
            "borders": scenes.BORDERS,
            "colours": scenes.COLOURS,
            "outlines": scenes.OUTLINES,
            "hole": scenes.HOLE,
        },
    }
    args.out.write_text(page_text(TEMPLATE, content), "utf-8")
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    run_command(main)
