r"""Draw assets/curve.png, the losses and scores of SuperCLIP and of CLIP:

    python -m docs.figures

They are read from the logs of two runs, which are those in study/, and what theory says is computed
here. Figures are 8.5 inches wide and have letters of 9 points or more, so that they can be read at
a README's width. Pictures that never change were drawn by code of older commits: architecture.png
and tutorial_matrix.png at c22fe23, label.png at 15a523a.

The other pictures have commands of their own. docs/first.py, docs/found.py, docs/demo.py and
docs/products.md name theirs. Here are the rest: maps of words, eight scenes, and the page of the
reference run with that of CLIP beside it. The last two need the scenes, which the first run of
train.py draws.

    python -m scripts.words --checkpoint assets/tiny.pt --k 5 --out assets/words.png

    python -m scripts.show 'scenes/val-*.tar' --captions json.long --picture assets/scenes.png

    python -m scripts.report --checkpoint assets/tiny.pt --log study/reference_log.jsonl \
        --reference study/clip_log.jsonl --data 'scenes/val-*.tar' --captions json.long \
        --out docs/report.html
"""

import math
import random
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cli import make_parser, run_command
from scripts import scenes
from scripts.report import REFERENCES, read_run
from superclip import caption_label, idf, multi_hot
from tokenizer import Tokenizer

ASSETS = Path(__file__).resolve().parent.parent / "assets"
INK, GREY, PALE, RED = "#1f2937", "#6b7280", "#cbd0d8", "#d1495b"
BLUE, AMBER, VIOLET = "#2563a8", "#b45f06", "#7b4fa3"
STYLE = {
    "font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "axes.titlelocation": "left", "figure.facecolor": "white",
}  # fmt: skip
matplotlib.use("Agg")
plt.rcParams.update(STYLE)


def save(path, text=""):
    """Writes the figure that was drawn last, with a text in its field Description. 64 colours are
    enough, and make the file a third as large."""
    plt.savefig(path, dpi=200)
    plt.close()
    description = PngInfo()
    description.add_text("Description", text)
    image = Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    image.save(path, optimize=True, pnginfo=description)
    print(f"wrote {path}")


# -----------------------------------------------------------------------------
# The curve of a run


def floor():
    """The word loss of the best head, with captions as in training: the entropy of the mean label
    of a hundred captions of a scene, as a mean over 256 scenes."""
    rng = random.Random(0)
    captions = []
    for _ in range(256):
        scene = scenes.make_scene(rng, scenes.SEEN)
        captions += [rng.choice(scenes.describe(scene, rng)) for _ in range(100)]
    tokenizer = Tokenizer(scenes.vocabulary())
    tokens = tokenizer(captions, 16)
    counts = multi_hot(tokens, tokenizer.vocab_size).sum(dim=0)
    labels = caption_label(tokens, idf(len(tokens), counts))
    labels = labels.unflatten(0, (256, 100)).mean(dim=1)
    return torch.special.entr(labels).sum(dim=1).mean().item()


def blind():
    """R@1 in percent, among 1,000 scenes, of a model that sees the setting alone. The number k of
    others with the same setting has a Poisson distribution, and a guess is right in 1/(k+1)."""
    others = 1000 / len(scenes.SETTINGS)
    return 100 * (1 - math.exp(-others)) / others


def scores_of_run(run):
    """run: as report.read_run returns it. Returns {name of a score: [(step, percent) ...]}, such as
    R@1 and zero-shot colour shape."""
    curves = {score["name"]: score["points"] for score in run["zeroshot"]}
    curves["R@1"] = run["validations"]
    return {name: [(step, 100 * y) for step, y in points] for name, points in curves.items()}


def draw_lines(axis, lines, gap):
    """lines: [(name, colour, style, [(step, y) ...])]. Each is named at its end, and the names are
    moved up until neighbours are at least `gap` apart."""
    height = -gap
    for name, colour, style, points in sorted(lines, key=lambda line: line[-1][-1][1]):
        axis.plot(*zip(*points), color=colour, ls=style)
        last, y = points[-1]
        height = max(y, height + gap)
        axis.text(1.03 * last, height, name, color=colour, va="center")
    axis.set(xlim=(0, last), xlabel="steps", xticks=range(0, last + 1, last // 3))


def curve(run, clip):
    """run, clip: of SuperCLIP and of CLIP, as report.read_run returns them."""
    last = run["header"]["steps"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 4.2))

    def constant(name, y):  # what theory says
        return name.format(y), GREY, ":", [(0, y), (last, y)]

    lines = [
        constant("floor {:.1f}", floor()),
        ("word loss", RED, "-", run["losses"]["classification_loss"]),
        ("contrastive\nloss", INK, "-", run["losses"]["contrastive_loss"]),
    ]
    draw_lines(left, lines, 0.4)
    left.set(title="losses of SuperCLIP", ylim=(0, 7.6))

    scores, scores_of_clip = scores_of_run(run), scores_of_run(clip)
    naming = "zero-shot colour shape"
    lines = [
        constant("blind R@1 {:.0f} %", blind()),
        constant("chance {:.1f} % (of 64)", 100 / 64),  # of both, or of what was held out
        ("R@1", BLUE, "-", scores["R@1"]),
        ("colour + shape", AMBER, "-", scores[naming]),
        ("held out", VIOLET, "-", scores["zero-shot held out"]),
        ("R@1, CLIP", BLUE, "--", scores_of_clip["R@1"]),
        ("colour + shape, CLIP", AMBER, "--", scores_of_clip[naming]),
    ]
    draw_lines(right, lines, 6)
    rates = [x["header"]["arguments"]["learning_rate"] for x in (run, clip)]
    title = "scores (%) of SuperCLIP, rate {:g},\nand of CLIP (dashed), rate {:g}"
    right.set(title=title.format(*rates), ylim=(0, 122), yticks=range(0, 101, 20))
    plt.tight_layout(w_pad=1.5)


def main(argv):
    make_parser(__doc__).parse_args(argv)
    curve(*map(read_run, REFERENCES))
    save(ASSETS / "curve.png")


if __name__ == "__main__":
    run_command(main)
