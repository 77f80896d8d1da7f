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

import random
from collections import namedtuple

import torch
import torch.nn.functional as F

import data
import eval as evaluation
import scenes
from cli import InputError, check, make_parser, pick_device, run_command
from scripts.pictures import contact_sheet, image_files, picture_file

# A picture to look at: its full name, a short title, and its pixels (3, S, S), or None if it cannot
# be read
Picture = namedtuple("Picture", "name title image")
SHOWN = 6  # validation pictures


# -----------------------------------------------------------------------------
# Pictures to look at


def pictures_of_run(paths, captions, size):
    """Yield SHOWN pictures of shards at even distances, whose titles are their first captions."""
    shards = data.Shards(data.expand(paths), captions)
    images = evaluation.ShardImages(shards, size)
    step = max(1, len(shards) // SHOWN)
    for i in range(0, len(shards), step)[:SHOWN]:
        image, texts = images[i]
        title = texts[0] if texts else ""
        yield Picture(f'{shards.name(i)} "{title}"', title, image)


def scene_pictures(size):
    """Yield four pictures of built-in scenes, of objects that training showed, with a caption as
    their name."""
    for i in range(4):
        rng = random.Random(f"words {i}")
        scene = scenes.make_scene(rng, scenes.SEEN)
        caption = scenes.describe(scene, rng)[1]
        yield Picture(caption, caption, data.load_image(scenes.draw(scene), size))


def find_pictures(args, files, tokenizer, size):
    """Returns the pictures to look at: those of --image, or validation pictures of the run, or
    scenes. Raises InputError."""
    if files:
        return (Picture(str(x), x.stem, evaluation.read_image(x, size)) for x in files)
    try:
        shards, captions = evaluation.validation_of(args.checkpoint, option="--image")
    except InputError:
        if tokenizer.vocab != scenes.vocabulary():
            raise
        return scene_pictures(size)
    return pictures_of_run(shards, captions, size)


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
LEGEND = (
    "Red: the word becomes less probable if windows of {0} x {0} patches here are left out. Blue: "
    "more probable. Each row has a scale of its own."
)


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


def draw_words(results, window, path):
    """Draw a row for each image, with a map for each of its words, and write the sheet to `path`.
    results: list of (title, image (3, S, S), words as eval.top_words gives them, maps (K, G,
    G))."""
    cells = []
    captions = []
    for title, image, words, maps in results:
        cells += word_cells(image, maps)
        captions.append(title)
        captions += [f"{word} {p:.1%}" for word, p, _ in words]
    contact_sheet(cells, captions, path, len(cells) // len(results), LEGEND.format(window))


# -----------------------------------------------------------------------------
# The command


def main(argv):
    parser = make_parser(__doc__, "checkpoint", "device")
    add = parser.add_argument
    add("--image", nargs="+", default=[], help="images, or folders of images")
    add("--out", type=picture_file, help=f"picture to draw, of at most {MAX_IMAGES} images")
    args = parser.parse_args(argv)
    files = image_files(args.image, args.out)
    model, tokenizer, _ = evaluation.load(args.checkpoint, pick_device(args.device))
    check(model.head is not None, f"{args.checkpoint} is plain CLIP: it has no word head")
    window = default_window(model)

    n = 0  # images that can be read
    to_draw = []
    for name, title, image in find_pictures(args, files, tokenizer, model.config.image_size):
        if image is None:
            continue
        n += 1
        [words] = evaluation.top_words(model, tokenizer, image[None])
        text = ", ".join(f"{word} {p:.3f}" for word, p, _ in words)
        print(f"{name}: {text}")
        if args.out and len(to_draw) < MAX_IMAGES:
            _, maps = word_maps(model, image, [i for _, _, i in words], window)
            to_draw.append((title, image, words, maps))
    check(n > 0, "none of the images can be read")
    if to_draw:
        draw_words(to_draw, window, args.out)
        print(f"wrote {args.out}: {len(to_draw)} of {n} images")


if __name__ == "__main__":
    run_command(main)
