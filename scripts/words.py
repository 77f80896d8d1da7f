"""Which words the head sees in an image, and where:

    python -m scripts.words --checkpoint out/best.pt --image FILE_OR_FOLDER ... --out words.png
    python -m scripts.words --checkpoint out/best.pt --image photos/ --word red --out red.png
    python -m scripts.words --checkpoint assets/tiny.pt --out words.png
    python -m scripts.words --checkpoint out/best.pt --data 'scenes/val-*.tar'

The first command prints the most probable words of each image. With --out it also draws a map for
each word, which is red where the word becomes less probable if these patches are left out. --word
asks for a word of your own. Without images, as in the third command, a few scenes are drawn on the
spot. The last command checks such maps against the built-in scenes, whose files say where each
object is.

Axes: S pixels a side, K words, W windows, G patches a side.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import eval as evaluation
from cli import (
    InputError,
    check,
    number,
    output_file,
    pick_device,
    printable,
    run_command,
    write_json,
)
from scripts import scenes
from scripts.pictures import contact_sheet, image_files, picture_file


def draw_scenes(size, n=4):
    """Yield (caption, image (3, size, size)) of n of the built-in scenes."""
    for i in range(n):
        rng = random.Random(f"words {i}")
        scene = scenes.make_scene(rng, scenes.COMBINATIONS)
        yield scenes.describe(scene, rng)[1], data.load_image(scenes.draw(scene), size)


# -----------------------------------------------------------------------------
# Are the maps right? The built-in scenes can tell.


def read_scene(pairs, row):
    """-> image (3, S, S) of a built-in scene, and a list of (token id, box): the colours and shapes
    that only one of its objects has. Raises InputError."""
    try:
        objects = json.loads(pairs.read(row, data.JSON))["scene"]["objects"]
        words = [(o[kind], o["box"]) for o in objects for kind in ("colour", "shape")]
        image = data.load_image(pairs.read(row, data.IMAGE), pairs.image_size)
    except (data.BadSample, ValueError, LookupError, TypeError):
        raise InputError(f"{pairs.shards[row[0]]} is not a shard of the built-in scenes") from None
    ids = [pairs.tokenizer.encode(word) for word, _ in words]
    return image, [(i[0], box) for i, (_, box) in zip(ids, words) if len(i) == 1 == ids.count(i)]


def localisation(model, pairs, window, limit=200):
    """Is the place that matters most for a word the right one? Returns a score.

    A word is right if the window whose removal lowers its probability most has its centre on the
    word's object. Windows that tie count as their mean. Chance is the share of windows with their
    centre on the object. Each scene counts once, with the mean of its words, because they are not
    independent. Raises InputError.
    """
    grid = model.visual.grid
    centre = (torch.arange(grid - window + 1) + window / 2) / grid  # in 0..1 of the image's side
    y, x = torch.cartesian_prod(centre, centre).T  # (W,) each
    hits, chances = [], []
    for row in data.progress(pairs.index[:limit].tolist(), "localising", unit="scene"):
        image, words = read_scene(pairs, row)
        if words:
            ids, boxes = zip(*words)
            falls, _ = evaluation.word_maps(model, image, list(ids), window)  # (K, W)
            most = falls >= falls.amax(dim=1, keepdim=True) - 1e-6  # none if the model is NaN
            x0, y0, x1, y1 = torch.tensor(boxes).T[:, :, None]  # (K, 1) each
            on = (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)  # (K, W)
            hits.append(((on & most).sum(dim=1) / most.sum(dim=1).clamp(min=1)).mean())
            chances.append(on.double().mean())
    check(hits, "no scene has a colour or shape that is one token and belongs to one object only")
    return evaluation.score(torch.stack(hits), torch.stack(chances).mean())


# -----------------------------------------------------------------------------
# The picture

CELL = 168  # pixels: side of an image
MAX_IMAGES = 24  # a picture of a large folder would not fit into memory
RED, BLUE = torch.tensor([[200.0, 20.0, 30.0], [25.0, 80.0, 200.0]])[:, :, None, None]
LEGEND = (
    "Red: the word becomes less probable if windows of {0} x {0} patches here are left out. Blue: "
    "more probable. Full colour is the largest change in an image, given as a factor."
)


def word_cells(image, maps):
    """image (3, S, S), maps (K, G, G) of its words -> tensors (1 + K, 3, CELL, CELL): the image,
    and pale copies of it under the colours of the maps."""
    photo = F.interpolate(image[None].float(), (CELL, CELL), mode="bilinear")
    pale = 0.7 * 255 + 0.3 * photo.mean(dim=1, keepdim=True)  # (1, 1, CELL, CELL)
    # Patches stay squares, because a smooth map would show detail that nobody has measured.
    strength = maps[:, None] / maps.abs().max().clamp(min=1e-9)  # (K, 1, G, G) in -1..1
    strength = F.interpolate(strength, (CELL, CELL), mode="nearest")
    opacity = 0.86 * strength.abs()
    cells = (1 - opacity) * pale + opacity * torch.where(strength > 0, RED, BLUE)
    return torch.cat([photo, cells]).clamp(0, 255).byte()


def draw_words(results, window, path):
    """Draw a row for each image, with a map for each of its words, and write the picture to `path`.
    results: list of (name, image (3, S, S), words as eval.top_words gives them, maps (K, G, G))."""
    cells, captions = [], []
    for name, image, words, maps in results:
        cells += word_cells(image, maps)
        captions.append(f"{name}, full colour: {maps.abs().max().exp():.1f} times")
        captions += [f"{word} {p:.1%}" for word, p, _ in words]
    contact_sheet(cells, captions, path, len(cells) // len(results), LEGEND.format(window))


# -----------------------------------------------------------------------------
# The command


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, help="best.pt or last.pt of a run")
    add("--image", nargs="+", default=[], help="images, or folders of images")
    add("--word", action="append", default=[], help="to look for; may be repeated")
    add("--k", type=number(int, 1, 20), default=8, help="words per image (default 8)")
    add("--out", type=picture_file, help=f"picture to draw, of at most {MAX_IMAGES} images")
    add("--window", type=number(int, 1), help="patches a side to leave out (default: a quarter)")
    add("--data", nargs="+", help="shards of the built-in scenes: score the maps")
    add("--limit", type=number(int, 1), default=200, help="scenes to score (default 200)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--json", type=output_file(".json"), help="file to write the numbers to")
    args = parser.parse_args(argv)
    files = image_files(args.image, args.out)
    check(not (args.out and args.data and not files), "--out needs --image")
    model, tokenizer, _ = evaluation.load(args.checkpoint, pick_device(args.device))
    check(model.head is not None, f"{args.checkpoint} is plain CLIP: it has no word head")
    grid, size = model.visual.grid, model.config.image_size
    chosen = [(word, tokenizer.encode(word)) for word in args.word]
    spelt = [word for word, ids in chosen if len(ids) != 1]
    check(not spelt, f"the vocabulary has no token {', '.join(spelt)}: try another --word")
    window = args.window or evaluation.default_window(model)
    check(window < grid, f"--window must be from 1 to {grid - 1}: there are {grid} patches a side")
    result, drawn = {"images": {}}, []
    if args.data:
        pairs = data.Pairs(data.expand(args.data), tokenizer, size)
        result["localisation"] = localisation(model, pairs, window, args.limit)
        print(evaluation.format_score("right place", result["localisation"]))
    images = ((file, evaluation.read_image(file, size)) for file in files)
    for name, image in images if files or args.data else draw_scenes(size):
        if isinstance(image, str):
            check(result["images"] or name != files[-1], image)  # not even the last one
            print(printable(f"skipped {image}"))
            continue
        if chosen:
            logits = model.class_logits(image[None].to(evaluation.device_of(model)))[0]
            words = [(word, logits.softmax(dim=0)[i].item(), i) for word, [i] in chosen]
        else:
            words = evaluation.top_words(model, tokenizer, image[None], args.k)[0]
        print(printable(f"{name}: ") + ", ".join(f"{word} {p:.3f}" for word, p, _ in words))
        result["images"][str(name)] = [{"word": word, "probability": p} for word, p, _ in words]
        if args.out and len(drawn) < MAX_IMAGES:
            _, maps = evaluation.word_maps(model, image, [i for _, _, i in words], window)
            drawn.append((Path(name).name, image, words, maps))
    if drawn:
        draw_words(drawn, window, args.out)
        print(f"wrote {args.out}: {len(drawn)} of {len(result['images'])} images")
    write_json(args.json, result)


if __name__ == "__main__":
    run_command(main)
