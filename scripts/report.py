"""Write one page that shows how a run went, and which words its model sees in validation pictures:

    python -m scripts.report --checkpoint out/best.pt --out report.html
    python -m scripts.report --checkpoint out/best.pt --reference other/log.jsonl --out report.html

The pictures are those on which the run was validated, unless --data names others. Plain CLIP has no
word head, so its page has no pictures. The curves of the run stand beside those of another one:
that of --reference, or else the project's own run of CLIP or of SuperCLIP, if their models are
equal. The page needs no network and no library. All that it shows comes from the model, the
validation pairs and the logs, and travels in the page as one JSON object. The HTML, CSS and
JavaScript that show them are in report.html. page.html has what all pages need.

Axes: S pixels a side, G patches a side.
"""

import base64
import io
import json
from pathlib import Path

from torchvision.transforms.v2.functional import to_pil_image

import data
import eval as evaluation
from cli import (
    InputError,
    check,
    make_parser,
    number,
    output_file,
    pick_device,
    run_command,
    write_file,
)
from runtime import read_log, short_names
from scripts.pictures import evenly
from scripts.words import default_window, word_maps

TEMPLATE = Path(__file__).with_suffix(".html")
START_OF_PAGE = TEMPLATE.with_name("page.html")
PLACEHOLDER = "/* the numbers */"  # in page.html: where the JSON goes
STUDY = Path(__file__).resolve().parent.parent / "study"
REFERENCES = (STUDY / "reference_log.jsonl", STUDY / "clip_log.jsonl")
WORDS = 8  # of a picture
SIDE, QUALITY = 224, 85  # largest side of an embedded picture in pixels, and its JPEG quality
HEADER = "arguments config parameters pairs steps device dtype torch commit date".split()
POINTS = 300  # of a curve, because a long run has logged more steps than a screen has pixels
LETTERS = 300  # of a caption, because some captions are pages long


def rounded(x, digits):
    """A tensor -> (nested lists of) numbers that are short when written."""
    return x.cpu().double().round(decimals=digits).tolist()


# -----------------------------------------------------------------------------
# The run, from its log


def zeroshot_names(folders):
    """{folder: the name of its score}"""
    names = short_names(folders)
    return {folder: f"zero-shot {name}".replace("_", " ") for folder, name in names.items()}


def scores_of(validation):
    """The row of a validation -> its scores, a list of dicts with their names."""
    scores = []
    for way, part in validation.get("validation", {}).items():
        for name, score in part.items():
            scores.append({"name": f"{way} {name}".replace("_", " "), **score})
    zeroshot = validation.get("zeroshot", {})
    for folder, name in zeroshot_names(zeroshot).items():
        scores.append({"name": name, **zeroshot[folder]})
    return scores


def read_run(path):
    """A log.jsonl -> what the page shows of a run: its header, a curve of each term of the loss, of
    the validations and of each zero-shot score, lists of [step, value], and the last scores. Raises
    InputError."""
    header, rows = read_log(path)
    losses = {}
    r1 = []
    zeroshot = {}
    validation_losses = []
    last = {}
    for row in rows:
        step = row["step"]
        if "loss" in row:
            for name, value in row.items():
                if name.endswith("_loss"):  # that of a fork, too
                    losses.setdefault(name, []).append([step, value])
        if "mean_r1" in row:
            r1.append([step, row["mean_r1"]])
        if "val_contrastive_loss" in row:
            validation_losses.append([step, row["val_contrastive_loss"]])
        scores = row.get("zeroshot", {})
        for folder, name in zeroshot_names(scores).items():
            score = scores[folder]
            start = {"name": name, "chance": score["chance"], "points": []}
            zeroshot.setdefault(folder, start)["points"].append([step, score["value"]])
        if "zeroshot" in row:
            last = row
    return {
        "header": {key: header[key] for key in HEADER},
        "losses": {name: evenly(c[:-1], POINTS) + c[-1:] for name, c in losses.items()},
        "validations": r1,
        "zeroshot": [*zeroshot.values()],
        "validation_losses": validation_losses,
        "group": last.get("val_group"),
        "step": last.get("step"),
        "scores": scores_of(last),
    }


def own_reference(run):
    """The project's own run of CLIP or of SuperCLIP, to draw it beside `run`. None if it is that
    run, or if their models differ in a field that both configurations have. (A fork may have more
    of them.)"""
    config = run["header"]["config"]
    for reference in map(read_run, REFERENCES):
        other = reference["header"]["config"]
        is_alike = all(config[name] == other[name] for name in config.keys() & other.keys())
        if is_alike and run["header"] != reference["header"]:
            return reference
    return None


# -----------------------------------------------------------------------------
# What the head says of validation pictures


def small_jpeg(image):
    """image (3, S, S) -> the bytes of a small JPEG file."""
    picture = to_pil_image(image)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def data_uri(image):
    """image (3, S, S) -> a small JPEG as the text of a data: address."""
    return "data:image/jpeg;base64," + base64.b64encode(small_jpeg(image)).decode()


def shortened(text):
    if len(text) > LETTERS:
        return text[:LETTERS] + "…"
    return text


def words_of(model, tokenizer, image, captions):
    """The head's top words for an image (3, S, S): word, probability, whether one of the captions
    has it, and its map (G, G) in nats (see scripts.words)."""
    words = evaluation.top_words(model, tokenizer, image[None], WORDS)[0]
    said = set()
    for caption in captions:
        said.update(tokenizer.encode(caption))
    ids = [i for _, _, i in words]
    _, maps = word_maps(model, image, ids, default_window(model))
    return [
        {"word": word, "probability": p, "said": i in said, "map": rounded(word_map, 3)}
        for (word, p, i), word_map in zip(words, maps)
    ]


def describe_pictures(model, tokenizer, shards, n):
    """What the page shows of n samples of data.Shards, at even distances, as a list of dicts. Those
    that cannot be read are left out. Raises InputError if none can be."""
    samples = evaluation.ShardImages(shards, model.config.image_size)
    pictures = []
    for i in data.progress(evenly(range(len(samples)), n), "mapping words"):
        image, captions = samples[i]
        if image is None:
            continue
        picture = {
            "source": data_uri(image),
            "caption": shortened(captions[0]),
            "captions": shortened(" · ".join(captions)),
            "words": words_of(model, tokenizer, image, captions),
        }
        pictures.append(picture)
    check(pictures, "none of the images can be used")
    return pictures


# -----------------------------------------------------------------------------
# The page


def page_text(template, content):
    """Returns page.html, with `content` as JSON in it, followed by a template that shows it."""
    # A caption may hold "</script>". Without "<" nothing in a script element can end it.
    numbers = json.dumps(content).replace("<", "\\u003c")
    page = START_OF_PAGE.read_text("utf-8").replace(PLACEHOLDER, numbers)
    return page + template.read_text("utf-8")


def write_page(path, template, content):
    text = page_text(template, content)
    write_file(path, lambda file: file.write(text.encode()))


def read_options(argv):
    parser = make_parser(__doc__, "checkpoint", "device")
    add = parser.add_argument
    add("--data", nargs="+", metavar="SHARDS", help="validation shards (default: those of the run)")
    captions = "txt or json.FIELD, one or more (default: those of the run, else txt)"
    add("--captions", nargs="+", metavar="SOURCE", help=captions)
    add("--out", type=output_file(".html"), required=True, help="page to write")
    add("--n", type=number(int, 1, 24), default=12, help="pictures to show (default 12)")
    add("--log", help="log of the run (default: log.jsonl beside the checkpoint, if it is there)")
    text = "log of a run to draw beside it (default: the project's own, if their models are equal)"
    add("--reference", metavar="LOG", help=text)
    return parser.parse_args(argv)


def main(argv):
    args = read_options(argv)
    model, tokenizer, _ = evaluation.load(args.checkpoint, pick_device(args.device))
    has_head = model.head is not None
    log = Path(args.log or Path(args.checkpoint).with_name("log.jsonl"))
    has_log = args.log or log.is_file()
    if not has_log and (args.reference or not has_head):
        raise InputError(f"there is no {log}: name the log of the run with --log")
    content = {
        "name": Path(args.checkpoint).name,
        "run": None,
        "reference": None,
        "size": model.config.image_size,
        "window": default_window(model),
        "pictures": [],
    }
    if has_log:
        content["run"] = read_run(log)
        if args.reference:
            content["reference"] = read_run(args.reference)
        else:
            content["reference"] = own_reference(content["run"])
    if has_head:
        shards, captions = evaluation.validation_of(args.checkpoint, args.data)
        training, validation = data.by_split(data.expand(shards))
        pairs = data.Shards(validation or training, args.captions or captions)
        content["pictures"] = describe_pictures(model, tokenizer, pairs, args.n)
    write_page(args.out, TEMPLATE, content)
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    run_command(main)
