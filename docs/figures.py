r"""Draw the figures of the tutorial into assets/:

    python -m docs.figures

All numbers are computed here, by the project's functions, or read from the logs of two runs, which
are those in study/. Figures are 8.5 inches wide and have letters of 9 points or more, so that they
can be read at a README's width. Two pictures that never change were drawn by code of commit
c22fe23: architecture.png and tutorial_matrix.png.

The other pictures have commands of their own. docs/first.py, docs/found.py, docs/study_figure.py,
docs/demo.py and docs/products.md name theirs. Here are the rest: maps of words, eight scenes, and
the page of the reference run with that of CLIP beside it. The last two need the scenes, which the
first run of train.py draws.

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
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cli import make_parser, run_command
from scripts import scenes
from scripts.report import REFERENCES, read_run
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig
from tokenizer import Tokenizer

ASSETS = Path(__file__).resolve().parent.parent / "assets"
INK, GREY, PALE, RED = "#1f2937", "#6b7280", "#cbd0d8", "#d1495b"
BLUE, AMBER, VIOLET = "#2563a8", "#b45f06", "#7b4fa3"
STYLE = {
    "font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "axes.titlelocation": "left", "figure.facecolor": "white",
}  # fmt: skip


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


def tutorial_scenes():
    """The 256 scenes of the tutorial, their long captions and the tokenizer."""
    rng = random.Random(0)
    drawn = [scenes.make_scene(rng, scenes.SEEN) for _ in range(256)]
    captions = [scenes.describe(scene, rng)[1] for scene in drawn]
    return drawn, captions, Tokenizer(scenes.vocabulary())


def counted(tokens, vocab_size):
    """A model whose token statistics hold these captions (B, T)."""
    model = SuperCLIP(SuperCLIPConfig(**PRESETS["tiny"], vocab_size=vocab_size))
    model.count_tokens(tokens)
    return model


# -----------------------------------------------------------------------------
# The label of a caption


def label():
    _, captions, tokenizer = tutorial_scenes()
    model = counted(tokenizer(captions, 16), tokenizer.vocab_size)
    ids = list(dict.fromkeys(tokenizer.encode(captions[0])))
    idf, words = model.token_weights()[ids], [tokenizer.decode([i]) for i in ids]
    columns = (
        ("n, of 256 captions", model.token_counts[ids], "{:.0f}", GREY),
        ("IDF, ln(257 / (n + 1))", idf, "{:.2f}", BLUE),
        ("share of the label", idf / idf.sum(), "{:.2f}", RED),
    )
    figure, axes = plt.subplots(1, 3, figsize=(8.5, 4.5), sharey=True)
    for axis, (title, values, form, colour) in zip(axes, columns):
        bars = axis.barh(words, values.tolist(), color=colour, height=0.68)
        axis.bar_label(bars, [form.format(v) for v in values.tolist()], padding=3)
        axis.set(title=title, xlim=(0, 1.22 * float(values.max())), xticks=[])
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(left=False)
    axes[0].invert_yaxis()
    figure.suptitle(f"“{captions[0]}”", x=0.015, ha="left", fontsize=12)
    plt.tight_layout()


# -----------------------------------------------------------------------------
# The curve of a run


def floor():
    """The word loss of the best head, on the tutorial's scenes with captions as in training: the
    entropy of the mean label of a hundred captions of each scene."""
    drawn, _, tokenizer = tutorial_scenes()
    rng, V = random.Random(1), tokenizer.vocab_size
    tokens = tokenizer([rng.choice(scenes.describe(x, rng)) for x in drawn for _ in range(100)], 16)
    weights = counted(tokens, V).token_weights()
    labels = torch.zeros(len(tokens), V).scatter_(1, tokens, weights[tokens])
    labels = F.normalize(labels, p=1, dim=1).view(len(drawn), 100, V).mean(dim=1)
    return float(torch.special.entr(labels).sum(dim=1).mean())


def blind():
    """R@1 in percent, among 1,000 scenes, of a model that sees the setting alone. The number k of
    others with the same setting has a Poisson distribution, and a guess is right in 1/(k+1)."""
    others = 1000 / len(scenes.SETTINGS)
    return 100 * (1 - math.exp(-others)) / others


def scores_of_run(run):
    """run: as report.read_run returns it. Returns {name of a score: [(step, percent) ...]}, such as
    R@1, colour shape and held out."""
    curves = {"R@1": run["validations"]}
    for score in run["zeroshot"]:
        curves[score["name"].removeprefix("zero-shot ")] = score["points"]
    return {name: [(step, 100 * y) for step, y in points] for name, points in curves.items()}


def draw_lines(axis, lines, gap):
    """lines: [(name, colour, style, [(step, y) ...])]. Each is named at its end, and the names are
    moved up until neighbours are at least `gap` apart."""
    last, height = max(points[-1][0] for *_, points in lines), -gap
    for name, colour, style, points in sorted(lines, key=lambda line: line[-1][-1][1]):
        axis.plot(*zip(*points), color=colour, ls=style, lw=1.3 if style == ":" else 2)
        height = max(points[-1][1], height + gap)
        axis.text(1.03 * last, height, name, color=colour, va="center")
    axis.set(xlim=(0, last), xlabel="steps")
    axis.xaxis.set_major_locator(MaxNLocator(3))
    axis.xaxis.set_major_formatter("{x:,.0f}")


def curve(run, clip):
    """run, clip: of SuperCLIP and of CLIP, as report.read_run returns them."""
    header = run["header"]
    last, V = header["steps"], header["config"]["vocab_size"]
    B, rate = header["arguments"]["batch_size"], header["arguments"]["learning_rate"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 4.2))

    def constant(name, y):  # what theory says
        return name, GREY, ":", [(0, y), (last, y)]

    least, r1_of_blind = floor(), blind()
    lines = [constant(f"floor {least:.1f}", least)]
    for name, colour, key, start, text in (
        ("word loss", RED, "classification_loss", math.log(V) + 0.5, f"ln {V} + 1/2"),
        ("contrastive\nloss", INK, "contrastive_loss", math.log(B), f"ln {B}"),
    ):
        lines.append((name, colour, "-", run["losses"][key]))
        left.plot(0, start, "o", color=colour, clip_on=False)
        left.text(0.13 * last, start + 0.2, f"starts near {text} = {start:.1f}", color=colour)
    draw_lines(left, lines, 0.4)
    left.set(title="losses of SuperCLIP", ylim=(0, 7.6))

    scores, scores_of_clip = scores_of_run(run), scores_of_run(clip)
    lines = [
        constant(f"blind R@1 {r1_of_blind:.0f} %", r1_of_blind),
        constant("chance 1.6 % (of 64)", 100 / 64),  # of both, or of what was held out
        ("R@1", BLUE, "-", scores["R@1"]),
        ("colour + shape", AMBER, "-", scores["colour shape"]),
        ("held out", VIOLET, "-", scores["held out"]),
        ("R@1, CLIP", BLUE, "--", scores_of_clip["R@1"]),
        ("colour + shape, CLIP", AMBER, "--", scores_of_clip["colour shape"]),
    ]
    draw_lines(right, lines, 6)
    rate_of_clip = clip["header"]["arguments"]["learning_rate"]
    title = f"scores (%) of SuperCLIP, rate {rate:g},\nand of CLIP (dashed), rate {rate_of_clip:g}"
    right.set(title=title, ylim=(0, 122), yticks=range(0, 101, 20))
    plt.tight_layout(w_pad=1.5)


def main(argv):
    make_parser(__doc__).parse_args(argv)
    matplotlib.use("Agg")
    plt.rcParams.update(STYLE)
    label()
    save(ASSETS / "label.png")
    curve(*map(read_run, REFERENCES))
    save(ASSETS / "curve.png")


if __name__ == "__main__":
    run_command(main)
