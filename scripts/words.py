"""Print which words the word head sees in pictures, and draw where it sees them:

    python -m scripts.words --checkpoint out/best.pt --out words.png
    python -m scripts.words --checkpoint out/best.pt --images photos/ --out words.png

The command takes six pictures of --images, or six validation pictures of the run. It prints the
most probable words of each one, without words of many captions, such as "the". It draws a map for
each word. Red marks patches without which the word becomes less probable.

Axes: S pixels a side, K words, W windows, G patches a side.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import eval as evaluation
from common.cli import check, make_parser, output_file, run_command
from common.devices import pick_device
from scripts.pictures import contact_sheet, find_pictures

SHOWN = 6  # pictures

# -----------------------------------------------------------------------------
# Maps that show where the head sees a word


@torch.no_grad()
def word_maps(model, image, ids, window, batch_size=64):
    """Compute where an image shows each of K tokens, by leaving out patches.

    image (3, S, S); ids: list of K tokens; window: the side of a square of patches, which has W
    places in the image; batch_size: windows at a time. Return maps (K, G, G), which have for each
    patch the mean over the windows that contain it: by how much the token's log-probability falls
    without the window, in nats.

    Why not a faster way? The head is almost linear in the mean of the patch tokens, so its logit is
    a sum with one term for each patch. But these terms are as large in the background as on the
    object, because attention has mixed the patches.
    """
    grid = model.visual.grid
    # Row i of this band matrix has ones at the patches of the i-th window along one side. A square
    # is the product of two sides, and kron multiplies every row with every row.
    side = torch.ones(grid - window + 1, grid).triu().tril(window - 1)
    inside = torch.kron(side, side)  # (W, P): 1 for the patches of a window
    outside = [(row == 0).nonzero().flatten() for row in inside]
    keep = torch.stack(outside).to(evaluation.device_of(model))
    image = image[None].to(evaluation.device_of(model))

    def log_probability(keep, n):
        logits = model.word_logits(image.expand(n, -1, -1, -1), keep)
        return logits.log_softmax(dim=-1)[:, ids]

    without = torch.cat([log_probability(k, len(k)) for k in keep.split(batch_size)])  # (W, K)
    falls = (log_probability(None, 1) - without).T.cpu()  # (K, W)
    return (falls @ inside / inside.sum(dim=0)).unflatten(1, (grid, grid))


# -----------------------------------------------------------------------------
# The sheet of maps

CELL = 168  # pixels: side of an image
RED, BLUE = torch.tensor([[200.0, 20.0, 30.0], [25.0, 80.0, 200.0]])[:, :, None, None]


def word_cells(image, maps):
    """Return a row of the sheet (1 + K, 3, CELL, CELL), which is the image, and for each word a
    pale copy of it under the colours of the map. image (3, S, S); maps (K, G, G)."""
    photo = F.interpolate(image[None].float(), (CELL, CELL), mode="bilinear")
    pale = 0.7 * 255 + 0.3 * photo.mean(dim=1, keepdim=True)  # (1, 1, CELL, CELL)
    # Draw patches as squares, because a smooth map would show detail that nobody has measured.
    strength = maps[:, None] / maps.abs().max().clamp_min(1e-9)  # (K, 1, G, G) in -1..1
    strength = F.interpolate(strength, (CELL, CELL), mode="nearest")
    opacity = 0.86 * strength.abs()
    colour = torch.where(strength > 0, RED, BLUE)
    cells = (1 - opacity) * pale + opacity * colour
    return torch.cat([photo, cells]).clamp(0, 255).byte()


def main(argv):
    parser = make_parser(__doc__, "checkpoint", "device")
    add = parser.add_argument
    add("--images", type=Path, help="image, or folder of images (default: validation pictures)")
    add("--out", type=output_file(".png"), required=True, help="picture to draw, such as words.png")
    args = parser.parse_args(argv)
    model, tokenizer, options = evaluation.load(args.checkpoint, pick_device(args.device))
    check(model.head is not None, f"{args.checkpoint} is plain CLIP: it has no word head")
    pictures = find_pictures(args.images, options, model.config.image_size)
    window = max(1, round(model.visual.grid / 4))  # in the tiny model about as large as an object

    cells = []  # images of the sheet
    titles = []  # texts below them
    step = max(1, len(pictures) // SHOWN)
    for i in range(0, len(pictures), step)[:SHOWN]:
        image, _ = pictures[i]
        if image is None:
            continue
        [words] = evaluation.top_words(model, tokenizer, image[None])
        shares = [f"{word} {p:.1%}" for word, p, _ in words]
        ids = [token for _, _, token in words]
        print(f"{pictures.title(i)}: {', '.join(shares)}")
        cells += word_cells(image, word_maps(model, image, ids, window))
        titles += [pictures.title(i), *shares]
    check(cells, "none of the pictures can be read")
    contact_sheet(cells, titles, args.out, columns=1 + len(words))
    print(f"wrote {args.out}. Each picture has a separate scale. Red: the word is less probable")
    print(f"without {window} x {window} patches here. Blue: more probable.")


if __name__ == "__main__":
    run_command(main)
