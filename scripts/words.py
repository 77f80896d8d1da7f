"""Which words the head sees in an image, and where:

    python -m scripts.words --checkpoint out/best.pt --image FILE_OR_FOLDER ... --out words.png
    python -m scripts.words --checkpoint out/best.pt --data 'scenes/val-*.tar'

The first command prints the most probable words of each image. With --out it also draws a map for
each word: red where the word becomes less probable if these patches are left out. The second
command checks such maps against the built-in data, which knows where each object is.

Axes: S pixels a side, K words, W windows, G patches a side.
"""

import argparse
import glob
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import data
import eval as evaluation
from scripts.pictures import GAP, LINE, fit, picture_format, save_picture, wrap
from superclip import InputError, check, cli, number


def image_files(paths):
    """Image files, and folders with all images in them -> list of files. Raises InputError."""
    suffixes = {s for s, name in Image.registered_extensions().items() if name in data.FORMATS}
    files = []
    for path in map(Path, paths):
        inside = sorted(glob.glob("**/*", root_dir=path, recursive=True))  # nothing in a file
        found = [path / name for name in inside if Path(name).suffix.lower() in suffixes]
        check(found or path.is_file(), f"there is no image file or folder of images {path}")
        files += found or [path]
    return list(dict.fromkeys(files))


# -----------------------------------------------------------------------------
# Are the maps right? The built-in data can tell.


def read_scene(pairs, row):
    """-> image (3, S, S) of a built-in scene, and a list of (token id, box): the colours and shapes
    that only one of its objects has. Raises InputError."""
    try:
        objects = json.loads(pairs.read(row, data.JSON))["scene"]["objects"]
        words = [(o[kind], o["box"]) for o in objects for kind in ("colour", "shape")]
        words = [(pairs.tokenizer.encode(word), box) for word, box in words]
        image = data.load_image(pairs.read(row, data.IMAGE), pairs.image_size)
    except (data.BadSample, ValueError, LookupError, TypeError):
        raise InputError(f"{pairs.shards[row[0]]} is not a shard of the built-in data") from None
    every = [ids for ids, _ in words]
    return image, [(ids[0], box) for ids, box in words if len(ids) == 1 == every.count(ids)]


def localisation(model, pairs, window, limit=200):
    """Is the place that matters most for a word the right one? Returns a score.

    A word is right if the window whose removal lowers its probability most has its centre on the
    word's object. Windows that are level count as their mean. Chance is the share of windows with
    their centre on the object. The words of a scene are not independent, so each scene counts once,
    with their mean. Raises InputError.
    """
    grid = model.visual.grid
    centre = (torch.arange(grid - window + 1) + window / 2) / grid  # in 0..1 of the image's side
    y, x = torch.cartesian_prod(centre, centre).T  # (W,) each
    hits, chances = [], []
    for row in data.progress(pairs.index[:limit].tolist(), "localising", unit="scene"):
        image, words = read_scene(pairs, row)
        if words:
            falls = evaluation.word_maps(model, image, [i for i, _ in words], window)[0]  # (K, W)
            most = falls >= falls.amax(dim=1, keepdim=True) - 1e-6  # none if the model is NaN
            boxes = torch.tensor([box for _, box in words])[:, :, None]  # (K, 4, 1)
            x0, y0, x1, y1 = boxes.unbind(dim=1)
            on = (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)  # (K, W)
            hits.append(((on & most).sum(dim=1) / most.sum(dim=1).clamp(min=1)).mean())
            chances.append(on.double().mean())
    check(hits, "no scene has a colour or shape that is one token and belongs to one object only")
    return evaluation.score(torch.stack(hits), torch.stack(chances).mean())


# -----------------------------------------------------------------------------
# The picture

CELL, FOOT = 168, 2 * LINE + GAP  # pixels: side of an image, height of the text below it
MAX_ROWS = 24  # a picture of a large folder would not fit into memory
RED, BLUE = torch.tensor([[200.0, 20.0, 30.0], [25.0, 80.0, 200.0]])
LEGEND = "Red: less probable if windows of {0} x {0} patches here are left out. Blue: more."


def heat(values):
    """values (H, W) in -1..1 -> PIL image: red where positive, blue where negative, and the more
    opaque the farther from 0."""
    values = values[:, :, None]
    colours = torch.where(values > 0, RED, BLUE)  # (H, W, 3)
    return Image.fromarray(torch.cat([colours, 220 * values.abs()], dim=2).byte().numpy())


def draw_words(rows, window, path):
    """Draw a row for each image, with a map for each of its words, and write the picture to `path`.
    rows: list of (name, image (3, S, S), words as eval.top_words gives them, maps (K, G, G))."""
    font = ImageFont.load_default(14)
    width = (CELL + GAP) * (1 + max(len(words) for _, _, words, _ in rows))
    legend = wrap(LEGEND.format(window), font, width - GAP, lines=12)
    bottom = GAP + len(rows) * (CELL + FOOT)
    sheet = Image.new("RGB", (GAP + width, bottom + LINE * (1 + len(legend)) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for r, (name, image, words, maps) in enumerate(rows):
        photo = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((CELL, CELL))
        faint = Image.blend(photo.convert("L"), Image.new("L", photo.size, "white"), 0.7)
        largest = float(maps.abs().max()) or 1.0  # one scale for all words of an image
        texts = [fit(name, font, CELL) + f"\nfull colour: {largest:.2f} nats"]
        texts += [fit(word, font, CELL - 50) + f"  {p:.1%}" for word, p, _ in words]
        for c, text in enumerate(texts):
            x, y = GAP + c * (CELL + GAP), GAP + r * (CELL + FOOT)
            sheet.paste(faint if c else photo, (x, y))
            pen.multiline_text((x, y + CELL + 4), text, "black", font)
            if c:  # patches stay squares: a smooth map would show detail that nobody measured
                overlay = heat(maps[c - 1] / largest).resize((CELL, CELL), Image.NEAREST)
                sheet.paste(overlay, (x, y), overlay)
    scale = heat(torch.linspace(1, -1, CELL).expand(LINE - 5, -1))
    sheet.paste(scale, (GAP, bottom), scale)
    pen.multiline_text((GAP, bottom + LINE), "\n".join(legend), "black", font)
    save_picture(sheet, path)


# -----------------------------------------------------------------------------
# The command


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, help="best.pt or last.pt of a run")
    add("--image", nargs="+", default=[], help="images, or folders of images")
    add("--k", type=number(int, 1, 20), default=8, help="words per image (default 8)")
    add("--out", help=f"picture to draw: .png, .jpg or .webp, of at most {MAX_ROWS} images")
    add("--window", type=number(int, 1), help="patches a side to leave out (default: a quarter)")
    add("--data", nargs="+", help="shards of the built-in data: score the maps")
    add("--limit", type=number(int, 1), default=200, help="scenes to score (default 200)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--json", help="file to write the numbers to")
    args = parser.parse_args(argv)
    files = image_files(args.image)
    check(files or (args.data and not args.out), "name images or folders of images with --image")
    fine = not args.json or (args.json.endswith(".json") and Path(args.json).parent.is_dir())
    check(fine, "--json needs a name that ends in .json, in a folder that exists")
    if args.out:
        picture_format(args.out)
        inputs = [file.resolve() for file in files]
        check(Path(args.out).resolve() not in inputs, f"--out would overwrite the image {args.out}")
    model, tokenizer, _ = evaluation.load(args.checkpoint, evaluation.pick_device(args.device))
    check(model.head is not None, f"{args.checkpoint} is plain CLIP: it has no word head")
    grid = model.visual.grid
    window = args.window or max(1, round(grid / 4))
    check(window < grid, f"--window must be from 1 to {grid - 1}: there are {grid} patches a side")
    result, rows = {"images": {}}, []
    if args.data:
        pairs = data.Pairs(data.expand(args.data), tokenizer, model.config.image_size)
        result["localisation"] = localisation(model, pairs, window, args.limit)
        print(evaluation.line("right place", result["localisation"]))
    for file in files:
        image = evaluation.read_image(file, model.config.image_size)
        if isinstance(image, str):
            check(result["images"] or file != files[-1], image)  # not even the last one
            print(f"skipped {image}")
            continue
        images = image[None].to(evaluation.device_of(model))
        words = evaluation.top_words(model, tokenizer, images, args.k)[0]
        print(f"{file}: " + ", ".join(f"{word} {p:.3f}" for word, p, _ in words))
        result["images"][str(file)] = [{"word": word, "probability": p} for word, p, _ in words]
        if args.out and len(rows) < MAX_ROWS:
            _, maps = evaluation.word_maps(model, image, [i for _, _, i in words], window)
            rows.append((file.name, image, words, maps))
    if rows:
        draw_words(rows, window, args.out)
        print(f"wrote {args.out}: {len(rows)} of {len(result['images'])} images")
    if args.json:
        data.write_file(args.json, lambda file: file.write(json.dumps(result, indent=2).encode()))


if __name__ == "__main__":
    cli(main)
