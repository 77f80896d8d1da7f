"""Which words the head sees in an image, and where:

    python -m scripts.words --checkpoint out/best.pt --image FILE_OR_FOLDER ... --out words.png
    python -m scripts.words --checkpoint out/best.pt --out words.png

The first command prints the most probable words of each image. Words of many captions, such as
"the", make room for others. With --out it also draws a map for each word, which is red where the
word becomes less probable if these patches are left out. Without images, as in the second command,
a few validation pictures of the run are shown. (The checkpoint assets/tiny.pt comes without its
data, so scenes are drawn on the spot.)

Axes: S pixels a side, K words, W windows, G patches a side.
"""

import torch
import torch.nn.functional as F

import data
import eval as evaluation
import scenes
from checkpoint import load, validation_of
from cli import InputError, check, make_parser, pick_device, run_command
from scripts.pictures import contact_sheet, image_files, picture_file

SHOWN = 6  # validation pictures


def find_pictures(args, tokenizer, size):
    """Yield the pictures to look at: those of --image, or validation pictures of the run, or
    scenes. Each is its name, a short title, and its pixels (3, S, S), or None if it cannot be read.
    Raises InputError."""
    if args.image:
        for file in image_files(args.image):
            yield str(file), file.stem, evaluation.read_image(file, size)
        return
    try:
        paths, captions = validation_of(args.checkpoint, option="--image")
    except InputError:
        if tokenizer.vocab != scenes.vocabulary():
            raise
        for _, scene, _, caption in scenes.make_samples("val", range(4)):
            yield caption, caption, data.load_image(scenes.draw(scene), size)
        return
    shards = data.Shards(data.expand(paths), captions)
    images = evaluation.ShardImages(shards, size)
    step = max(1, len(shards) // SHOWN)
    for i in range(0, len(shards), step)[:SHOWN]:
        image, texts = images[i]
        if image is not None:
            yield f'{shards.name(i)} "{texts[0]}"', texts[0], image


# -----------------------------------------------------------------------------
# Maps: where is a word?


def default_window(model):
    """Patches a side that word_maps leaves out: about a quarter of the image's side. In the tiny
    model that is as much as an object takes."""
    return max(1, round(model.visual.grid / 4))


@torch.no_grad()
def word_maps(model, image, ids, window, batch_size=64):
    """Where an image (3, S, S) shows each of K tokens (a list of ids).

    Returns falls (K, W): by how much the word's log-probability falls, in nats, when one of the W
    windows of window x window patches is left out; and maps (K, grid, grid): for each patch the
    mean over its windows.

    Why by leaving out? The head is all but linear on the mean of the patch tokens, so its logit
    splits into one part per token. But attention has mixed the patches, and those parts light up
    the background as much as the object. A window that is left out is simply missing.
    """
    grid = model.visual.grid
    # Row i of a band matrix: the patches of the i-th window along one side. A square is the product
    # of two sides, and kron multiplies every row with every row.
    side = torch.ones(grid - window + 1, grid).triu().tril(window - 1)
    inside = torch.kron(side, side)  # (W, P): 1 for the patches of a window
    outside = [(row == 0).nonzero().flatten() for row in inside]
    keep = torch.stack(outside).to(evaluation.device_of(model))

    image = image[None].to(evaluation.device_of(model))

    def log_probability(keep, n):
        logits = model.class_logits(image.expand(n, -1, -1, -1), keep)
        return logits.log_softmax(dim=-1)[:, ids]

    without = torch.cat([log_probability(k, len(k)) for k in keep.split(batch_size)])  # (W, K)
    falls = (log_probability(None, 1) - without).T.cpu()  # (K, W)
    return falls, (falls @ inside / inside.sum(dim=0)).unflatten(1, (grid, grid))


# -----------------------------------------------------------------------------
# The sheet of maps

CELL = 168  # pixels: side of an image
MAX_IMAGES = 24  # a sheet of a large folder would not fit into memory
RED, BLUE = torch.tensor([[200.0, 20.0, 30.0], [25.0, 80.0, 200.0]])[:, :, None, None]


def word_cells(image, maps):
    """image (3, S, S), maps (K, G, G) of its words -> tensors (1 + K, 3, CELL, CELL): the image,
    and pale copies of it under the colours of the maps."""
    photo = F.interpolate(image[None].float(), (CELL, CELL), mode="bilinear")
    pale = 0.7 * 255 + 0.3 * photo.mean(dim=1, keepdim=True)  # (1, 1, CELL, CELL)
    # Patches stay squares, because a smooth map would show detail that nobody has measured.
    strength = maps[:, None] / maps.abs().max()  # (K, 1, G, G) in -1..1
    strength = F.interpolate(strength, (CELL, CELL), mode="nearest")
    opacity = 0.86 * strength.abs()
    colour = torch.where(strength > 0, RED, BLUE)
    cells = (1 - opacity) * pale + opacity * colour
    return torch.cat([photo, cells]).clamp(0, 255).byte()


# -----------------------------------------------------------------------------
# The command


def main(argv):
    parser = make_parser(__doc__, "checkpoint", "device")
    add = parser.add_argument
    add("--image", nargs="+", default=[], help="images, or folders of images")
    add("--out", type=picture_file, help=f"picture to draw, of at most {MAX_IMAGES} images")
    args = parser.parse_args(argv)
    model, tokenizer, _ = load(args.checkpoint, pick_device(args.device))
    check(model.head is not None, f"{args.checkpoint} is plain CLIP: it has no word head")
    window = default_window(model)

    n = 0  # images that can be read
    cells = []  # of the sheet, and what stands below them
    titles = []
    for name, title, image in find_pictures(args, tokenizer, model.config.image_size):
        if image is None:
            continue
        n += 1
        [words] = evaluation.top_words(model, tokenizer, image[None])
        print(f"{name}: {', '.join(f'{word} {p:.3f}' for word, p, _ in words)}")
        if args.out and n <= MAX_IMAGES:
            _, maps = word_maps(model, image, [i for _, _, i in words], window)
            cells += word_cells(image, maps)
            titles += [title, *[f"{word} {p:.1%}" for word, p, _ in words]]
    check(n > 0, "none of the images can be read")
    if args.out:
        rows = min(n, MAX_IMAGES)
        contact_sheet(cells, titles, args.out, len(cells) // rows)
        print(f"wrote {args.out}: {rows} of {n} images, each with a scale of its own. Red: a word")
        print(f"is less probable without {window} x {window} patches here. Blue: more probable.")


if __name__ == "__main__":
    run_command(main)
