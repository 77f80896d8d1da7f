r"""Draw the figures of the tutorial into assets/:

    python -m docs.figures

All numbers are computed here, by the project's functions, or read from the logs of two runs, which
are those in study/ unless others are named. One command trains anew and draws:

    python train.py && python train.py --cls_weight 0 --out_dir out_clip &&
        python -m docs.figures --log out/log.jsonl --clip_log out_clip/log.jsonl

Figures are 8.5 inches wide and have letters of 11 points or more, so that they can be read at a
README's width. Other commands make the other pictures of the pages. For most of them train.py must
have drawn the scenes. Eight scenes, three with their words, and the page of the reference run, with
that of CLIP beside it:

    python -m scripts.show 'scenes/val-*.tar' --captions json.long --picture assets/scenes.png

    mkdir out_words && extract="tar xOf scenes/val-00000.tar" &&
        $extract 00000833.jpg > 'out_words/orange heart on dotted brown.jpg' &&
        $extract 00000666.jpg > 'out_words/purple cross and orange star on dotted black.jpg' &&
        $extract 00000500.jpg > 'out_words/yellow square on dotted black.jpg' &&
        python -m scripts.words --checkpoint assets/tiny.pt --image out_words --k 5 \
            --out assets/words.png

    python -m scripts.report --checkpoint assets/tiny.pt --log study/reference_log.jsonl \
        --reference study/clip_log.jsonl --data 'scenes/val-*.tar' --captions json.long \
        --out docs/report.html

docs/products.md names the command of its picture, docs/demo.py those of its page, and
docs/study_figure.py draws the study's figure. The code that drew architecture.png is in commit
c22fe23.
"""

import itertools
import math
import random
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from cli import make_parser, run_command
from runtime import read_log
from scripts import scenes
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
INK, GREY, RED = "#1f2937", "#6b7280", "#d1495b"
BLUE, GREEN, AMBER = "#2563a8", "#2f7d4f", "#b45f06"
VIOLET, TEAL = "#7b4fa3", "#0e8a8f"
STYLE = {
    "font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "axes.titlelocation": "left", "figure.facecolor": "white",
}  # fmt: skip


def save(path):
    """Writes the figure that was drawn last."""
    plt.savefig(path, dpi=200)
    plt.close()
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
# The label of a caption, and the matrix of four pairs


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


def matrix():
    images = torch.tensor([0.0, 90, 180, 270]).deg2rad()
    texts = torch.tensor([30.0, 90, 120, 300]).deg2rad()
    cosines = (images[:, None] - texts).cos()
    figure = plt.figure(figsize=(8.5, 3.7))
    compass = figure.add_axes((0, 0.03, 0.44, 0.94), xlim=(-1.8, 1.8), ylim=(-1.5, 1.5))
    compass.set_aspect("equal")
    compass.axis("off")
    compass.add_patch(plt.Circle((0, 0), 1, fill=False, ec="#c7ccd4"))
    # All arrows have length 1. A caption's is thin and dashed, so that image 1 stays visible.
    for name, angles, colour, style in (("i", images, BLUE, "-"), ("c", texts, AMBER, "--")):
        width = 3.5 if name == "i" else 1.6
        line = dict(arrowstyle="-|>", color=colour, lw=width, ls=style, mutation_scale=15)
        for i, angle in enumerate(angles.tolist()):
            x, y = math.cos(angle), math.sin(angle)
            compass.annotate("", (x, y), (0, 0), arrowprops={**line, "shrinkA": 0, "shrinkB": 0})
            side = "left" if x > 0.1 else "right" if x < -0.1 else "center"
            up = 1.34 if name == "c" and side == "center" else 1.14  # caption 1 above image 1
            text = f"{name}{i}, {round(math.degrees(angle))}°"
            compass.text(1.06 * x, up * y, text, color=colour, ha=side, va="center")
    axis = figure.add_axes((0.52, 0.13, 0.46, 0.76))
    axis.imshow(cosines, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
    for i, j in itertools.product(range(4), repeat=2):
        text, weight = f"{round(float(cosines[i, j]), 2) + 0:.2f}", "bold" if i == j else "normal"
        axis.text(j, i, text, ha="center", va="center", weight=weight)
    axis.xaxis.tick_top()
    axis.set_xticks(range(4), [f"caption {j}" for j in range(4)])
    axis.set_yticks(range(4), [f"image {i}" for i in range(4)])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.add_patch(Rectangle((1.53, 0.53), 0.94, 0.94, fill=False, ec=INK, lw=2))
    axis.set_xlabel("bold: right pairs; frame: what caption 2 picks", labelpad=8)


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


def read_rows(path):
    """A log -> its header, and its rows, each with the number of samples seen so far."""
    header, rows = read_log(path)
    for row in rows:
        row["samples"] = row["step"] * header["batch_size"]
    return header, rows


def mean_r1(rows):
    """[(samples seen, percent) ...] of R@1."""
    return [(row["samples"], 100 * row["mean_r1"]) for row in rows if "mean_r1" in row]


def zero_shot(rows, kind):
    """[(samples seen, percent) ...] of a zero-shot score: colour, shape, colour_shape, held_out."""
    points = []
    for row in rows:
        score = row.get("zeroshot", {}).get(f"scenes/zeroshot/{kind}")
        if score:
            points.append((row["samples"], 100 * score["value"]))
    return points


def draw_lines(axis, lines, gap):
    """lines: [(name, colour, style, [(x, y) ...])]. Each is named at its end, and the names are
    moved up until neighbours are at least `gap` apart."""
    last, height = max(points[-1][0] for *_, points in lines), -gap
    for name, colour, style, points in sorted(lines, key=lambda line: line[-1][-1][1]):
        axis.plot(*zip(*points), color=colour, ls=style, lw=1.3 if style == ":" else 2)
        height = max(points[-1][1], height + gap)
        axis.text(1.03 * last, height, name, color=colour, va="center")
    axis.set(xlim=(0, last), xlabel="samples seen")
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")


def curve(path, clip_path):
    header, rows = read_rows(path)
    training = [row for row in rows if "loss" in row]
    B, V = header["batch_size"], header["config"]["vocab_size"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 4.2))
    last = training[-1]["samples"]

    def constant(name, y):  # what theory says
        return name, GREY, ":", [(0, y), (last, y)]

    least, r1_of_blind = floor(), blind()
    lines = [constant(f"floor {least:.1f}", least)]
    for name, colour, key, start, text in (
        ("word loss", RED, "classification_loss", math.log(V) + 0.5, f"ln {V} + 1/2"),
        ("contrastive\nloss", INK, "contrastive_loss", math.log(B), f"ln {B}"),
    ):
        lines.append((name, colour, "-", [(row["samples"], row[key]) for row in training]))
        left.plot(0, start, "o", color=colour, clip_on=False)
        left.text(0.13 * last, start + 0.2, f"starts near {text} = {start:.1f}", color=colour)
    draw_lines(left, lines, 0.4)
    left.set(title="losses", ylim=(0, 7.6))

    lines = [
        constant(f"blind R@1 {r1_of_blind:.0f} %", r1_of_blind),
        constant("chance 12.5 % (of 8)", 100 / 8),  # of a colour, or of a shape
        constant("chance 1.6 % (of 64)", 100 / 64),  # of both, or of what was held out
        constant("chance 0.1 % (R@1)", 0.1),
        ("R@1", BLUE, "-", mean_r1(rows)),
    ]
    for kind, name, colour in (
        ("colour", "colour", GREEN),
        ("shape", "shape", TEAL),
        ("colour_shape", "colour + shape", AMBER),
        ("held_out", "held out", VIOLET),
    ):
        lines.append((name, colour, "-", zero_shot(rows, kind)))
    _, rows_of_clip = read_rows(clip_path)
    lines.append(("R@1, CLIP", BLUE, "--", mean_r1(rows_of_clip)))
    lines.append(("colour + shape, CLIP", AMBER, "--", zero_shot(rows_of_clip, "colour_shape")))
    draw_lines(right, lines, 6)
    right.set(title="R@1 and zero-shot scores (%)", ylim=(0, 122), yticks=range(0, 101, 20))
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(3))
    plt.tight_layout(w_pad=1.5)


def main(argv):
    parser = make_parser(__doc__)
    log = ROOT / "study" / "reference_log.jsonl"
    clip_log = ROOT / "study" / "clip_log.jsonl"
    add = parser.add_argument
    add("--log", default=log, help=f"of a run (default study/{log.name})")
    text = f"of a run with --cls_weight 0 (default study/{clip_log.name})"
    add("--clip_log", default=clip_log, help=text)
    text = "folder to draw into (default assets)"
    add("--out", type=Path, default=ROOT / "assets", metavar="DIR", help=text)
    args = parser.parse_args(argv)
    matplotlib.use("Agg")
    plt.rcParams.update(STYLE)
    label()
    save(args.out / "label.png")
    matrix()
    save(args.out / "tutorial_matrix.png")
    curve(args.log, args.clip_log)
    save(args.out / "curve.png")


if __name__ == "__main__":
    run_command(main)
