"""Write one page that shows what a model has learned, and what it makes of validation pictures:

    python -m scripts.report --checkpoint out/best.pt --data SHARDS --out report.html

The page needs no network and no library. All its numbers are computed here, from the model, the
validation pairs and the run's log, and they travel in the page as one JSON object. The HTML, CSS
and JavaScript that show them are in report.html, and in page.html what the demo needs as well.

Axes: N pairs that are read, n of them shown, E embedding, S pixels a side, G patches a side.
"""

import argparse
import base64
import io
import json
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Subset

import data
import eval as evaluation
from cli import InputError, number, output_file, pick_device, run_command, write_file

TEMPLATE = Path(__file__).with_suffix(".html")
START_OF_PAGE = TEMPLATE.with_name("page.html")
PLACEHOLDER = "/* the numbers */"  # in page.html: where the JSON goes
REFERENCE = Path(__file__).resolve().parent.parent / "study" / "reference_log.jsonl"
SEARCHED = 1000  # pairs that a caption is searched among
WORDS, FOUND, EXAMPLES = 8, 5, 3  # words of a picture; pictures of a search; searches of each kind
SIDE, QUALITY = 224, 85  # largest side of an embedded picture in pixels, and its JPEG quality
HEADER = "arguments config parameters samples steps device dtype torch commit date".split()
POINTS = 300  # of a curve, because a long run has logged more steps than a screen has pixels


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
    """A log.jsonl -> what the page shows of it: header, seconds of training, curves as lists of
    [step, value ...], and the last scores. Raises InputError."""
    rows = []
    for line in Path(path).read_text("utf-8", "replace").splitlines():
        with suppress(ValueError):  # a run that was killed may have left half a line
            rows.append(json.loads(line))
    try:
        return summarise_log(rows)
    except (LookupError, TypeError, AttributeError):
        raise InputError(f"{path} is not a log of this version of train.py") from None


def summarise_log(rows):
    """The rows of a log.jsonl -> what read_log returns. A resumed run may have logged a step twice:
    the later row counts."""
    header = [row["header"] for row in rows if "header" in row][-1]
    training = {row["step"]: row for row in rows if "contrastive_loss" in row}
    training = [training[step] for step in sorted(training)]
    # Each row gives the speed since the row before it, so that validations are left out.
    starts = [0] + [row["samples"] for row in training]
    speeds = [max(row["images_per_second"], 0.1) for row in training]
    seconds = sum((end - start) / v for start, end, v in zip(starts, starts[1:], speeds))
    curve = spread(training[:-1], POINTS) + training[-1:]
    losses = ("step", "contrastive_loss", "classification_loss")
    validations = {row["step"]: row["mean_r1"] for row in rows if "mean_r1" in row}
    last = ([{}] + [row for row in rows if "zeroshot" in row])[-1]  # validation
    scores = {}
    for way, part in (last.get("validation") or {}).items():
        scores |= {f"{way} {k}": s for k, s in part.items() if k.startswith("R@")}
    for folder, s in (last.get("zeroshot") or {}).items():
        scores[f"zero-shot {Path(folder).name}"] = s
    return {
        "header": {key: header[key] for key in HEADER},
        "seconds": round(seconds),
        "losses": [[row[key] for key in losses] for row in curve],
        "validations": sorted(validations.items()),
        "step": last.get("step"),
        "scores": [{"name": name.replace("_", " "), **s} for name, s in scores.items()],
    }


# -----------------------------------------------------------------------------
# What the model makes of validation pairs


def read_pairs(model, pairs):
    """Up to SEARCHED pairs -> images (N, 3, S, S), the first caption of each, and image features
    (N, E)."""
    images, captions, features = [], [], []
    some = Subset(evaluation.ShardImages(pairs), spread(range(len(pairs)), SEARCHED))
    for pixels, texts in evaluation.batches(some, 128, 0, "encoding"):
        images.append(pixels)
        captions += [texts_of_image[0] for texts_of_image in texts]
        features.append(model.encode_image(pixels.to(evaluation.device_of(model))).cpu())
    return torch.cat(images), captions, torch.cat(features)


def data_uri(image):
    """image (3, S, S) -> a small JPEG as the text of a data: address."""
    picture, buffer = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def words_of(model, tokenizer, image, caption):
    """The head's top words for an image (3, S, S): word, probability, whether the caption has it,
    and its map (G, G) in nats (see eval.word_maps)."""
    words = evaluation.top_words(model, tokenizer, image[None], WORDS)[0]
    ids, in_caption = [i for _, _, i in words], {*tokenizer.encode(caption)}
    _, maps = evaluation.word_maps(model, image, ids, evaluation.default_window(model))
    return [
        {"word": word, "probability": p, "said": i in in_caption, "map": rounded(m, 3)}
        for (word, p, i), m in zip(words, maps)
    ]


def label_of(model, tokenizer, image, caption):
    """What the head should answer for an image (3, S, S): each token of the caption once, with its
    IDF, its share of the label (see superclip.classification_loss), and what the head says."""
    ids = list(dict.fromkeys(tokenizer.encode(caption)))
    idf = model.token_weights()[ids].cpu()
    logits = model.class_logits(image[None].to(evaluation.device_of(model)))[0].float()
    numbers = (idf, idf / idf.sum().clamp_min(1e-8), logits.log_softmax(dim=0).cpu()[ids])
    names = [evaluation.token_text(tokenizer, i) for i in ids]
    keys = ("token", "idf", "share", "log_probability")
    return [dict(zip(keys, row)) for row in zip(names, *(rounded(x, 6) for x in numbers))]


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
    text_features = evaluation.encode_texts(model, tokenizer, captions).cpu()
    similarity, owner = image_features @ text_features.T, torch.arange(len(captions))  # (N, N)
    scores = evaluation.retrieval(image_features, text_features, owner)
    shown, found = spread(owner.tolist(), n), searches(similarity.T)
    window = evaluation.default_window(model)
    content = {
        "head": model.head is not None and window < model.visual.grid,
        "loss": model.config.loss,
        "logit_scale": model.logit_scale.exp().item(),
        "size": model.config.image_size,
        "window": window,
        "pairs": len(captions),
        "similarity": rounded(similarity[shown][:, shown], 6),
        "searches": found,
        "recall": scores["text_to_image"]["R@1"],
        "pictures": [{"number": i} for i in shown],
    }
    for picture in data.progress(content["pictures"] if content["head"] else [], "mapping words"):
        pair = images[picture["number"]], captions[picture["number"]]
        picture["words"] = words_of(model, tokenizer, *pair)
        picture["label"] = label_of(model, tokenizer, *pair)
    used = {*shown, *(j for search in found for j, _ in search["found"])}
    shortened = [caption[:300] + "…" * (len(caption) > 300) for caption in captions]
    content["images"] = {i: {"source": data_uri(images[i]), "caption": shortened[i]} for i in used}
    return content


# -----------------------------------------------------------------------------
# The page


def write_page(path, template, content):
    """Write page.html, with `content` as JSON in it, followed by a template that shows it."""
    # A caption may hold "</script>". Without "<" nothing in a script element can end it.
    numbers = json.dumps(content).replace("<", "\\u003c")
    page = START_OF_PAGE.read_text("utf-8").replace(PLACEHOLDER, numbers)
    write_file(path, lambda file: file.write((page + template.read_text("utf-8")).encode()))


def write_report(model, tokenizer, pairs, log_path, out_path, reference_path=None, n=12):
    """Write the page to `out_path`.

    model: in eval mode; pairs: validation data (data.Pairs); log_path: the run's log.jsonl, or
    None; reference_path: the log of a run to compare with, used if its model is equal and has
    trained on as many pairs; n: pictures to show. Raises InputError.
    """
    run = read_log(log_path) if log_path else None
    reference = read_log(reference_path) if run and reference_path else None
    if reference and any(run["header"][k] != reference["header"][k] for k in ("config", "samples")):
        reference = None
    content = {"run": run, "reference": reference, **examine(model, tokenizer, pairs, n)}
    write_page(out_path, TEMPLATE, content)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0], allow_abbrev=False)
    add, page = parser.add_argument, output_file(".html")
    add("--checkpoint", required=True, help="best.pt or last.pt of a run")
    add("--data", nargs="+", required=True, help="validation shards: paths, folders, globs, braces")
    add("--captions", nargs="+", default=["txt"], help="txt or json.FIELD (default txt)")
    add("--out", type=page, required=True, help="page to write, such as report.html")
    add("--n", type=number(int, 2, 24), default=12, help="pictures to show (default 12)")
    add("--log", help="log of the run (default: log.jsonl beside the checkpoint, if it is there)")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    args = parser.parse_args(argv)
    log = Path(args.log or Path(args.checkpoint).with_name("log.jsonl"))
    log = log if args.log or log.is_file() else None
    model, tokenizer, _ = evaluation.load(args.checkpoint, pick_device(args.device))
    pairs = data.Pairs(data.expand(args.data), tokenizer, model.config.image_size, args.captions)
    write_report(model, tokenizer, pairs, log, args.out, REFERENCE, args.n)
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    run_command(main)
