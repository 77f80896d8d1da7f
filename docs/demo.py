"""Write one page in which CLIP and SuperCLIP answer side by side, in the reader's browser:

    python -m docs.demo out_clip/last.pt out/last.pt --out docs/demo.html

The reader composes a built-in scene, and both models say what they see. The page needs no network
and no library: it carries the weights, as int8 with a scale for each row. The forward pass, the
drawing and the questions are in demo_template.html, and what all pages share is in page.html.
Scores are computed here, and those of other seeds come from study/runs.jsonl. The two models of
docs/demo.html are a pair of that study: python -m study.compare --keep pair
"""

import base64
import functools
import json
import random
from pathlib import Path

import torch

import data
import eval as evaluation
from cli import check, make_parser, output_file, run_command
from scripts import scenes
from scripts.report import write_page

TEMPLATE = Path(__file__).with_name("demo_template.html")
STUDY = Path(__file__).resolve().parent.parent / "study" / "runs.jsonl"
PROMPT = "a photo of a {}"  # one for each of the 64 combinations of colour and shape
SCENES = 500  # of each kind
KINDS = {  # what their objects may be, and how many there are
    "one object": (scenes.SEEN, 1),
    "one that training never showed": (scenes.HELD_OUT, 1),
    "two objects": (scenes.SEEN, 2),
    "three, more than training showed": (scenes.SEEN, 3),
}


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


def differ(looks):
    """Do all (colour, shape) differ in both?"""
    colours = {colour for colour, _ in looks}
    shapes = {shape for _, shape in looks}
    return len(colours) == len(shapes) == len(looks)


def draw_objects(rng, combinations, k):
    """A scene with k objects that differ in colour and in shape."""
    scene = scenes.make_scene(rng, combinations)
    looks = rng.sample(combinations, k)
    while not differ(looks):
        looks = rng.sample(combinations, k)
    cells = rng.sample(range(9), k)
    scene["objects"] = []
    for (colour, shape), cell in zip(looks, cells):
        row, column = divmod(cell, 3)
        scene["objects"].append(scenes.make_object(rng, colour, shape, row, column))
    return scene


@functools.cache  # both models are asked about the same pictures
def make_pictures(kind):
    """A kind of scenes -> the pictures of SCENES of them (N, 3, S, S), and as N sets the names of
    their objects."""
    images = []
    names = []
    for i in range(SCENES):
        scene = draw_objects(random.Random(f"{kind} {i}"), *KINDS[kind])
        images.append(data.load_image(scenes.jpeg(scenes.draw(scene)), scenes.SIZE))
        names.append({f"{thing['colour']} {thing['shape']}" for thing in scene["objects"]})
    return torch.stack(images), names


def score_objects(model, tokenizer, kind):
    """How many of the objects do the best of the 64 texts name, if there are as many texts as
    objects? A score whose unit is the picture."""
    images, names = make_pictures(kind)
    _, k = KINDS[kind]
    classes = [" ".join(look) for look in scenes.COMBINATIONS]
    texts = evaluation.zeroshot_classifier(model, tokenizer, classes, [PROMPT])
    features = torch.cat([model.encode_image(part) for part in images.split(100)])
    best = (features @ texts.T).topk(k).indices.tolist()  # (N, k)
    hits = []
    for ids, names_of_picture in zip(best, names):
        said = {classes[i] for i in ids}
        hits.append(len(said & names_of_picture) / k)
    return evaluation.score(torch.tensor(hits), k / len(classes))


def describe(checkpoint):
    """What the page needs of a model: its weights, options of its run, and scores. Raises
    InputError."""
    content = evaluation.read_checkpoint(checkpoint)
    check("header" in content, f"{checkpoint} does not say how it was trained: name a last.pt")
    options = dict(content["header"]["arguments"])
    options["samples"] = content["step"] * options["batch_size"]
    model, tokenizer, _ = evaluation.load(checkpoint)
    is_ours = tokenizer.vocab == scenes.vocabulary() and model.config.image_size == scenes.SIZE
    check(is_ours, f"{checkpoint} is no model of the built-in scenes")
    return {
        "config": vars(model.config),
        "weights": {name: quantise(p) for name, p in model.named_parameters()},
        "options": {k: options[k] for k in ("seed", "learning_rate", "batch_size", "samples")},
        "scores": {kind: score_objects(model, tokenizer, kind) for kind in KINDS},
    }


def read_study():
    """The scores of the study's five seeds at batch 8, for CLIP and for SuperCLIP, at the rates of
    today's rule."""
    runs = [json.loads(line) for line in STUDY.read_text().splitlines()]
    alike = {"batch_size": 8, "settings": len(scenes.SETTINGS), "search": False}
    scores = {0.0: [], 1.0: []}  # weight of the head -> scores of each seed
    for run in runs:
        if "earlier" in run or not alike.items() <= run["spec"].items():
            continue
        scores[run["spec"]["cls_weight"]].append(run["scores"])
    return list(scores.values())


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("clip", help="checkpoint of a run on the built-in scenes with --cls_weight 0")
    add("superclip", help="checkpoint of the same run with the word head")
    add("--out", type=output_file(".html"), required=True, help="page to write")
    args = parser.parse_args(argv)
    models = [describe(args.clip), describe(args.superclip)]
    heads = [model["config"]["cls_weight"] > 0 for model in models]
    check(heads == [False, True], "name a model without a word head first, then one with it")
    content = {
        "models": models,
        "study": read_study(),
        "vocab": scenes.vocabulary(),
        "prompt": PROMPT,
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
    write_page(args.out, TEMPLATE, content)
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    run_command(main)
