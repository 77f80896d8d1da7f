"""Write one page that shows what a model has learned, and what it makes of validation pictures:

    python -m scripts.report --checkpoint out/best.pt --out report.html
    python -m scripts.report --checkpoint clip.pt --data SHARDS --out clip.html

The pictures are those on which the run was validated, unless --data names others. The page needs
no network and no library. All its numbers are computed here, from the model, the validation pairs
and the run's log, and they travel in the page as one JSON object. The HTML, CSS and JavaScript that
show them are in report.html, and in page.html what all pages need.

Axes: N pairs that are read, n of them shown, E embedding, S pixels a side, G patches a side.
"""

import base64
import io
import json
import math
from collections import Counter
from pathlib import Path

import torch
from torch.utils.data import Subset
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
from scripts.show import label_of
from scripts.words import default_window, word_maps

TEMPLATE = Path(__file__).with_suffix(".html")
START_OF_PAGE = TEMPLATE.with_name("page.html")
PLACEHOLDER = "/* the numbers */"  # in page.html: where the JSON goes
REFERENCE = Path(__file__).resolve().parent.parent / "study" / "reference_log.jsonl"
SEARCHED = 1000  # pairs that a caption is searched among
WORDS, FOUND, EXAMPLES = 8, 5, 3  # words of a picture; pictures of a search; searches of each kind
SIDE, QUALITY = 224, 85  # largest side of an embedded picture in pixels, and its JPEG quality
HEADER = "arguments config parameters pairs steps device dtype torch commit date".split()
POINTS = 300  # of a curve, because a long run has logged more steps than a screen has pixels
LETTERS = 300  # of a caption, because some pages are captions


def spread(items, k):
    """At most k items of a list, evenly spaced."""
    k = min(k, len(items))
    return [items[i * len(items) // k] for i in range(k)]


def rounded(x, digits=4):
    """A tensor -> (nested lists of) numbers that are short when written."""
    return x.cpu().double().round(decimals=digits).tolist()


# -----------------------------------------------------------------------------
# The run, from its log


def read_log(path):
    """A log.jsonl -> the last header in it, and the list of rows that count.

    A run that is resumed adds a header, with the step from which it goes on. What the attempt
    before it has logged beyond that is no part of the run. Raises InputError.
    """
    header = None
    rows = []
    try:
        for line in Path(path).read_text("utf-8").splitlines():
            row = json.loads(line)
            if "header" in row:
                header = row["header"]
                rows = [earlier for earlier in rows if earlier["step"] <= row["step"]]
            else:
                rows.append(row)
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is not a log of train.py: {error!r}") from error
    check(header is not None, f"{path} is not a log of train.py: it has no header")
    return header, rows


def overfitting(rows):
    """Rows of a log -> a sentence if the model learns its training pairs
    by heart, else None: if it beats a guess in training, but not among validation pairs, or if the
    loss fell in training, but rose in the last two validations."""
    training = []  # the contrastive loss at each validation
    validation = []
    loss = math.inf
    guess = math.inf
    for row in rows:
        loss = row.get("contrastive_loss", loss)
        if "val_contrastive_loss" in row:
            training.append(loss)
            validation.append(row["val_contrastive_loss"])
            guess = math.log(row["val_group"])
    reason = None
    if validation and training[-1] < guess < validation[-1]:
        reason = "the loss of validation pairs is above a guess's: too sure where it is wrong"
    elif len(validation) > 2:
        before, middle, last = validation[-3:]
        if before < middle < last and training[-1] < training[-3]:
            reason = "the contrastive loss falls in training, and rises among validation pairs"
    if reason is None:
        return None
    return (
        f"Overfitting: {reason}. More pairs help, fewer --epochs, --patch_dropout, --init_from. "
        "To search few pictures, published weights may be better without any training."
    )


def training_seconds(training, batch_size):
    """How long the steps of these rows took. Each row gives the speed since the row before it, in
    which validations are left out."""
    seconds = 0.0
    before = 0
    for row in training:
        speed = max(row["images_per_second"], 0.1)
        seconds += (row["step"] - before) * batch_size / speed
        before = row["step"]
    return seconds


def scores_of(validation):
    """The row of a validation -> its scores, a list of dicts with their names. Folders of zero-shot
    classes go by their last name, if that tells them apart."""
    scores = {}
    for way, part in (validation.get("validation") or {}).items():
        for name, score in part.items():
            if name.startswith("R@"):
                scores[f"{way} {name}"] = score
    zeroshot = validation.get("zeroshot") or {}
    times = Counter(Path(folder).name for folder in zeroshot)
    for folder, score in zeroshot.items():
        name = Path(folder).name
        if times[name] > 1:
            name = folder
        scores[f"zero-shot {name}"] = score
    return [{"name": name.replace("_", " "), **score} for name, score in scores.items()]


def summarise(header, rows):
    """What the page shows of a run: header, seconds of training, a curve of each term of the loss
    and of the validations, lists of [step, value], the last scores, and whether it overfits.
    Arguments: what read_log returns."""
    batch_size = header["arguments"]["batch_size"]
    training = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "zeroshot" in row]
    losses = {}
    r1 = []
    groups = []
    for row in training:
        step = row["step"]
        for name in row:
            if name.endswith("_loss"):
                losses.setdefault(name, []).append([step, row[name]])
    for row in validations:
        step = row["step"]
        if "mean_r1" in row:
            r1.append([step, row["mean_r1"]])
        if "val_contrastive_loss" in row:
            groups.append([step, row["val_contrastive_loss"]])
    last = validations[-1] if validations else {}
    return {
        "header": {key: header[key] for key in HEADER},
        "seconds": round(training_seconds(training, batch_size)),
        "losses": {name: spread(c[:-1], POINTS) + c[-1:] for name, c in losses.items()},
        "validations": r1,
        "validation_losses": groups,
        "group": last.get("val_group"),
        "overfitting": overfitting(rows),
        "step": last.get("step"),
        "scores": scores_of(last),
    }


def read_run(path):
    """A log.jsonl -> what the page shows of it. Raises InputError."""
    header, rows = read_log(path)
    try:
        return summarise(header, rows)
    except (LookupError, TypeError, AttributeError, ArithmeticError):
        raise InputError(f"{path} is not a log of this version of train.py") from None


# -----------------------------------------------------------------------------
# What the model makes of validation pairs


def read_pairs(model, pairs):
    """Up to SEARCHED pairs -> images (N, 3, S, S), a list of the captions of each, and image
    features (N, E)."""
    images, captions, features = [], [], []
    some = Subset(evaluation.ShardImages(pairs), spread(range(len(pairs)), SEARCHED))
    for pixels, captions_of_batch in evaluation.batches(some, 128, 0, "encoding"):
        images.append(pixels)
        captions += captions_of_batch
        features.append(model.encode_image(pixels.to(evaluation.device_of(model))).cpu())
    return torch.cat(images), captions, torch.cat(features)


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


def explained_label(model, tokenizer, image, caption):
    """What the head should answer for an image (3, S, S): each token of the caption once, with its
    IDF, its share of the label, and the logarithm of the probability that the head gives it."""
    weights = model.token_weights().cpu()
    share_of = label_of(tokenizer.encode(caption), weights)
    ids = list(share_of)
    logits = model.class_logits(image[None].to(evaluation.device_of(model)))[0].float()
    log_probabilities = rounded(logits.log_softmax(dim=0)[ids], 6)
    label = []
    for i, idf, log_probability in zip(ids, rounded(weights[ids], 6), log_probabilities):
        name = evaluation.token_text(tokenizer, i)
        numbers = {"idf": idf, "share": round(share_of[i], 6), "log_probability": log_probability}
        label.append({"token": name, **numbers})
    return label


def searches(similarity):
    """similarity (N, N) of captions and images -> a few searches whose first picture is right, and
    a few whose first is not: number of the caption, rank of its own picture, and the best pictures
    with their scores. The right picture comes last if it is not among the best."""
    right = torch.eye(len(similarity), dtype=torch.bool)
    above, tied, _ = evaluation.rank_counts(similarity, right)
    result = []
    for group in (above + tied == 0, above > 0):
        for i in spread(group.nonzero().flatten().tolist(), EXAMPLES):
            best = similarity[i].topk(min(FOUND, len(similarity))).indices.tolist()
            found = [[j, rounded(similarity[i, j])] for j in dict.fromkeys([*best, i])]
            result.append({"caption": i, "place": int(above[i]) + 1, "found": found})
    return result


@torch.no_grad()
def examine(model, tokenizer, pairs, n):
    """All numbers of the page that come from the model, as a dict. Raises InputError."""
    images, captions, image_features = read_pairs(model, pairs)
    first_captions = [captions_of_image[0] for captions_of_image in captions]
    text_features = evaluation.encode_texts(model, tokenizer, first_captions).cpu()
    similarity = image_features @ text_features.T  # (N, N)
    owner = torch.arange(len(images))
    recall = evaluation.retrieval(image_features, text_features, owner)["text_to_image"]["R@1"]
    shown = spread(owner.tolist(), n)
    found = searches(similarity.T)
    window = default_window(model)
    has_maps = model.head is not None and window < model.visual.grid

    pictures = [{"number": i, "captions": shortened(" · ".join(captions[i]))} for i in shown]
    if has_maps:
        for picture in data.progress(pictures, "mapping words"):
            i = picture["number"]
            picture["words"] = words_of(model, tokenizer, images[i], captions[i])
            picture["label"] = explained_label(model, tokenizer, images[i], first_captions[i])

    used = set(shown)
    for search in found:
        used.update(i for i, _ in search["found"])
    return {
        "head": has_maps,
        "loss": model.config.loss,
        "logit_scale": model.logit_scale.exp().item(),
        "size": model.config.image_size,
        "window": window,
        "pairs": len(images),
        "similarity": rounded(similarity[shown][:, shown], 6),
        "searches": found,
        "recall": recall,
        "pictures": pictures,
        "images": {
            i: {"source": data_uri(images[i]), "caption": shortened(first_captions[i])}
            for i in used
        },
    }


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


def write_report(
    model, tokenizer, pairs, log_path, out_path, reference_path=None, n=12, name="the model"
):
    """Write the page to `out_path`.

    model: in eval mode; pairs: validation data (data.Pairs); log_path: the run's log.jsonl, or
    None; reference_path: the log of another run to compare with, used if its model is equal and has
    trained on as many pairs; n: pictures to show; name: of the model. Raises InputError.
    """
    run = None
    reference = None
    if log_path:
        run = read_run(log_path)
    if run and reference_path:
        other = read_run(reference_path)
        is_equal = [run["header"][k] == other["header"][k] for k in ("config", "pairs")]
        is_itself = run["header"] == other["header"]
        if all(is_equal) and not is_itself:
            reference = other
    content = {
        "name": name,
        "run": run,
        "reference": reference,
        **examine(model, tokenizer, pairs, n),
    }
    write_page(out_path, TEMPLATE, content)


def read_options(argv):
    parser = make_parser(__doc__, "checkpoint", "device")
    add = parser.add_argument
    add("--data", nargs="+", metavar="SHARDS", help="validation shards (default: those of the run)")
    captions = "txt or json.FIELD, one or more (default: those of the run, else txt)"
    add("--captions", nargs="+", metavar="SOURCE", help=captions)
    add("--out", type=output_file(".html"), required=True, help="page to write")
    add("--n", type=number(int, 2, 24), default=12, help="pictures to show (default 12)")
    add("--log", help="log of the run (default: log.jsonl beside the checkpoint, if it is there)")
    return parser.parse_args(argv)


def main(argv):
    args = read_options(argv)
    log = Path(args.checkpoint).with_name("log.jsonl")
    if args.log:
        log = Path(args.log)
    elif not log.is_file():
        log = None
    shards, captions = evaluation.validation_of(args.checkpoint)
    shards = args.data or shards
    captions = args.captions or captions
    check(shards, f"{args.checkpoint} names no validation shards, so name them: --data")
    model, tokenizer, _ = evaluation.load(args.checkpoint, pick_device(args.device))
    pairs = data.Pairs(data.expand(shards), tokenizer, model.config.image_size, captions)
    name = Path(args.checkpoint).name
    write_report(model, tokenizer, pairs, log, args.out, REFERENCE, args.n, name)
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    run_command(main)
