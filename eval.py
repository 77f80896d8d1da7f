"""Score a checkpoint.

    python eval.py zeroshot  --checkpoint out/best.pt --images DIR       a folder per class
    python eval.py zeroshot  --checkpoint out/best.pt --images cifar10   downloaded by torchvision
    python eval.py retrieval --checkpoint out/best.pt --data SHARDS      R@1, R@5, R@10, both ways

Every score is printed with its chance level, its 95 % interval, and n, the number of images.
train.py validates with the same functions. Both compute in float32, so a checkpoint has one score.

The scores come first: retrieval, a validation of train.py, and zero-shot classification. Then come
the features of pictures and texts, the words of the head, and the commands.

Axes: B of a batch, N pictures, M captions, Q questions, A answers, C classes, E embedding.
"""

import json
import math
import re
from itertools import chain
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from common import cli
from common.devices import pick_device
from common.images import STANDARD_SETS, Pictures, class_pictures, readable_batches
from common.run import read_model
from common.shards import by_split, find_shards
from common.tokenizer import has_letters, trim

# -----------------------------------------------------------------------------
# Retrieval: an image must find its captions, and a caption its image


def retrieval(image_features, text_features, image_of_text, ks=(1, 5, 10)):
    """Return R@k from image to text and from text to image, two dicts of scores. This is the usual
    R@k if all images have equally many captions. image_features (N, E); text_features (M, E);
    image_of_text (M,): the image of each text, on the CPU."""
    image_ids = torch.arange(len(image_features))  # each image belongs to itself
    return {
        "image_to_text": recall(image_features, image_ids, text_features, image_of_text, ks),
        "text_to_image": recall(text_features, image_of_text, image_features, image_ids, ks),
    }


def recall(questions, image_of_question, answers, image_of_answer, ks):
    """Return R@k of a search as a dict of scores, one for each k in ks. questions (Q, E), answers
    (A, E): features; image_of_question (Q,), image_of_answer (A,): the numbers of their images, on
    the CPU. An answer is right if it belongs to the image of the question."""
    best = nearest(questions, answers, max(ks))  # (Q, k)
    is_right = image_of_answer[best] == image_of_question[:, None]  # (Q, k)
    num_right = torch.bincount(image_of_answer)[image_of_question].double()  # (Q,): of all answers
    scores = {}
    for k in ks:
        found = is_right[:, :k].any(dim=1).double()  # (Q,): is a right answer among the first k?
        # This is exact if one answer is right. If several are, a guess may find two of them.
        chance = (k * num_right / len(answers)).clamp(max=1).mean()
        scores[f"R@{k}"] = make_score(mean_of_images(found, image_of_question), chance)
    return scores


def nearest(questions, answers, k):
    """Return the numbers (Q, k) of the k answers that are most similar to each question, the most
    similar first, on the CPU. Of equal answers topk takes any, so a collapsed model guesses."""
    found = []
    chunk = max(1, 2**24 // len(answers))  # 64 MB of similarities, because (Q, A) may be too large
    for part in cli.progress(questions.split(chunk), "searching"):
        similarity = part @ answers.T
        found.append(similarity.topk(min(k, len(answers))).indices.cpu())
    return torch.cat(found)


def mean_of_images(values, image):
    """Return the mean of the values of each image (N,). values (Q,): those of questions; image
    (Q,): the number of each question's image.

    For example, three captions of image 0 have the values 1, 0 and 0, and the one caption of image
    1 has the value 1. Then the means are 1/3 and 1. So a score counts two images, and not four
    captions, because the captions of one image are not independent."""
    return torch.bincount(image, weights=values) / torch.bincount(image)


# -----------------------------------------------------------------------------
# A validation of train.py: retrieval, and the contrastive loss


def score_pairs(model, tokenizer, samples, workers=0, batch_size=256):
    """Return what a validation logs of data.Samples. mean_r1 is the mean of R@1 over both
    directions, by which train.py chooses its best model. batch_size: that of the run, so that
    val_contrastive_loss can be compared with the loss of the training."""
    images, texts, image_of_text = encode_samples(model, tokenizer, samples, workers)
    scores = retrieval(images, texts, image_of_text)
    group = min(batch_size, len(images))
    return {
        "validation": scores,
        "mean_r1": mean(way["R@1"]["value"] for way in scores.values()),
        "val_group": group,
        "val_contrastive_loss": loss_in_groups(model, images, texts, image_of_text, group),
    }


def print_pairs(row, model, tokenizer, samples):
    """Print what score_pairs returns, and the words that the head finds in two pictures."""
    for way, scores in row["validation"].items():
        for name, score in scores.items():
            tqdm.write(format_score(f"{way} {name}".replace("_", " "), score))
    loss = row["val_contrastive_loss"]
    tqdm.write(f"contrastive loss {loss:.3f} in groups of {row['val_group']}")
    if model.head is None or model.num_captions == 0:  # it has not learned from any caption yet
        return
    pictures = Pictures(samples, model.config.image_size)
    pixels, captions = next(readable_batches(pictures, 2, 0))
    for words, captions_of_image in zip(top_words(model, tokenizer, pixels), captions):
        found = ", ".join(word for word, _, _ in words)
        tqdm.write(f'"{captions_of_image[0]}": the head says {found}')


@torch.no_grad()
def loss_in_groups(model, image_features, text_features, image_of_text, group):
    """Return the contrastive loss of the model, a mean over random groups of `group` images, each
    with its first caption. The loss is higher in larger groups, because an image must find its
    caption among more. The other arguments are those of `retrieval`."""
    N = len(image_features)
    first_caption = torch.searchsorted(image_of_text, torch.arange(N))  # (N,)
    # Neighbours in a shard may be alike, so groups of them would have a higher loss than batches.
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    used = N // group * group  # images that fill whole groups
    losses = []
    for images in order[:used].split(group):
        texts = first_caption[images]
        losses.append(model.pair_loss(image_features[images], text_features[texts]))
    return torch.stack(losses).mean().item()


# -----------------------------------------------------------------------------
# Zero-shot classification: an image must find the text that names its class

# Templates in the style of CLIP's authors. The feature of a class is the mean over its prompts.
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a photo of the {}.", "a {}.")


def zeroshot(model, tokenizer, pictures, templates=TEMPLATES, workers=0):
    """Return the score of Pictures that have classes. templates: for the prompts; those with words
    that the vocabulary lacks are left out."""
    templates = known_templates(tokenizer, templates)
    classifier = zeroshot_classifier(model, tokenizer, pictures.classes, templates)  # (C, E)
    features, labels = encode_pictures(model, pictures, workers)
    guesses = (features @ classifier.T).argmax(dim=1).cpu()
    return make_score(guesses == torch.tensor(labels), 1 / len(pictures.classes))


def zeroshot_classifier(model, tokenizer, classes, templates):
    """Return a feature for each class (C, E): the normalised mean over its prompts."""
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    features = encode_texts(model, tokenizer, prompts).view(len(classes), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=1)


def known_templates(tokenizer, templates):
    """Return the templates without unknown words, or else the name of the class alone. Spelled in
    bytes, an unknown word would be most of what the text tower reads of a prompt."""
    known = [template for template in templates if not tokenizer.unknown_words([template])]
    return known or ["{}"]


def zeroshot_pictures(name, size, tokenizer, classes=None, templates=TEMPLATES):
    """Return the Pictures that `name` names, and print which words of their prompts the vocabulary
    lacks. classes: the names of their classes, by default those of their folders."""
    pictures = class_pictures(name, size)
    classes = classes or names_of_classes(pictures.classes)
    C = len(pictures.classes)
    cli.check(len(classes) == C, f"{name} has {C} classes of images, but {len(classes)} names")
    unknown = tokenizer.unknown_words([*classes, *templates])
    if unknown:
        words = ", ".join(unknown)
        print(f"{name}: the vocabulary lacks {words}. Templates with such words are left out.")
    pictures.classes = classes
    return pictures


def names_of_classes(folders):
    """Return the names of classes for prompts. In ImageNet, folders are named by numbers such as
    n01440764, of which a model knows nothing. open_clip has its 1,000 names in the same order."""
    numbers = [name for name in folders if re.fullmatch(r"n\d{8}", name)]
    if not numbers:
        return folders
    is_imagenet = len(folders) == 1000 and folders[0] == "n01440764" and folders[-1] == "n15075141"
    advice = "Name the folders after their classes, or give eval.py the names with --classes."
    cli.check(is_imagenet, f"{numbers[0]} is no name of a class. {advice}")
    import open_clip

    return open_clip.IMAGENET_CLASSNAMES


# -----------------------------------------------------------------------------
# A score: a share of images, with its chance level and its uncertainty


def make_score(hits, chance):
    """Return a score, a dict of value, chance, n and interval. The value is the mean of hits (n,),
    numbers between 0 and 1. chance: the value that a guess would have. Wilson's 95 % interval
    remains valid for values near 0 or 1."""
    n = len(hits)
    p = float(hits.double().mean())
    z = 1.96  # 95 % of a normal distribution lie within 1.96 standard deviations of its mean
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    interval = [max(0.0, centre - half), min(1.0, centre + half)]
    return {"value": p, "chance": float(chance), "n": n, "interval": interval}


def format_score(name, score):
    low, high = score["interval"]
    text = f"{name:24s}{100 * score['value']:7.2f} %   chance {100 * score['chance']:6.2f} %"
    return text + f"   95 % interval {100 * low:.1f}-{100 * high:.1f}   n {score['n']:,}"


# -----------------------------------------------------------------------------
# A checkpoint -> a model -> features of pictures and texts, and words of the head


def load(checkpoint, device="cpu"):
    """Read a checkpoint for inference, without gradients. Return the model, the tokenizer, and the
    options of its run, a dict that is empty if the checkpoint was converted."""
    model, tokenizer, options = read_model(checkpoint)
    model.requires_grad_(False).to(device).eval()
    return model, tokenizer, options


def device_of(model):
    return model.logit_scale.device


@torch.no_grad()
def encode_texts(model, tokenizer, texts):
    """Return the features (M, E) of M strings."""
    features = []
    for i in cli.progress(range(0, len(texts), 256), "encoding texts"):
        tokens = trim(tokenizer(texts[i : i + 256]))  # (B, T), without columns of mere padding
        features.append(model.encode_text(tokens.to(device_of(model))))
    return torch.cat(features)


@torch.no_grad()
def encode_pictures(model, pictures, workers, encode=None):
    """Return the features (N, E) of all Pictures that can be read, and a list of their N labels.
    encode: turns pixels (B, 3, S, S) into other features than model.encode_image."""
    encode = encode or model.encode_image
    features = []
    labels = []
    for pixels, labels_of_batch in readable_batches(pictures, 128, workers):
        features.append(encode(pixels.to(device_of(model))))
        labels += labels_of_batch
    cli.check(labels, "none of the images can be used")
    return torch.cat(features), labels


def encode_samples(model, tokenizer, samples, workers=0):
    """Return the image features (N, E) of data.Samples, the text features (M, E) of all their
    captions, and image_of_text (M,), the number of each caption's image, in rising order."""
    pictures = Pictures(samples, model.config.image_size)
    image_features, captions = encode_pictures(model, pictures, workers)
    text_features = encode_texts(model, tokenizer, [*chain.from_iterable(captions)])
    counts = torch.tensor([len(captions_of_image) for captions_of_image in captions])
    return image_features, text_features, torch.repeat_interleave(counts)


@torch.no_grad()
def top_words(model, tokenizer, pixels, k=8):
    """Return for each picture (B, 3, S, S) a list of the k words that the head finds most probable,
    as (word, probability, id). The probabilities are a softmax over all tokens. Parts of words are
    left out, and so are words such as "the", which more than a fifth of the captions contain."""
    probabilities = model.word_logits(pixels.to(device_of(model))).softmax(dim=-1)  # (B, V)
    is_common = (model.token_counts > model.num_captions / 5).tolist()
    result = []
    for p in probabilities:
        words = []
        for i in p.argsort(descending=True).tolist():
            token = tokenizer.encoding.decode([i])  # ends in a space, unless it is part of a word
            if has_letters(token) and token.endswith(" ") and not is_common[i]:
                words.append((token.strip(), p[i].item(), i))
            if len(words) == k:
                break
        result.append(words)
    return result


# -----------------------------------------------------------------------------
# Commands. Each one prints its scores, and returns them for --json.


def read_templates(path):
    """Return the templates in a file, or for "openai" those of CLIP's authors."""
    if path != "openai":
        return read_list(path)
    import open_clip

    return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def read_list(path):
    """Return the lines of a file that are not empty."""
    lines = Path(path).read_text("utf-8", "replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    cli.check(lines, f"{path} is empty")
    return lines


def command_zeroshot(args):
    model, tokenizer, _ = load(args.checkpoint, pick_device(args.device))
    for template in args.templates:
        cli.check("{}" in template, f"--templates: there is no {{}} in: {template}")
    size = model.config.image_size
    pictures = zeroshot_pictures(args.images, size, tokenizer, args.classes, args.templates)
    result = zeroshot(model, tokenizer, pictures, args.templates, args.workers)
    print(format_score("zero-shot", result))
    return {**result, "templates": known_templates(tokenizer, args.templates)}


def command_retrieval(args):
    model, tokenizer, options = load(args.checkpoint, pick_device(args.device))
    training, validation = by_split(find_shards(args.data))
    shards = validation or training
    print(f"scoring {len(shards)} of {len(training + validation)} shards, such as {shards[0]}")
    sources = args.captions or options.get("val_captions", ["txt"])
    samples = data.open_samples(shards, sources)
    row = score_pairs(model, tokenizer, samples, args.workers, options.get("batch_size", 256))
    print_pairs(row, model, tokenizer, samples)
    return row


def make_parser():
    parser = cli.make_parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    # fmt: off
    command = commands.add_parser("zeroshot", help="find the class of an image", allow_abbrev=False)
    command.set_defaults(function=command_zeroshot)
    add = command.add_argument
    add("--images", required=True, metavar="DIR",
        help=f"folder with a folder of images for each class, or one of {', '.join(STANDARD_SETS)}")
    add("--classes", type=read_list, metavar="FILE",
        help="file with a class name on each line, in the sorted order of the folders")
    add("--templates", type=read_templates, default=TEMPLATES, metavar="FILE",
        help="file with a template on each line, {} for the class, or openai (default: four)")

    command = commands.add_parser("retrieval", help="find captions by image, and back",
                                  allow_abbrev=False)
    command.set_defaults(function=command_retrieval)
    add = command.add_argument
    add("--data", nargs="+", required=True, metavar="SHARDS",
        help="tar files, folders, globs or {0000..0575}; if some are named val or test, only those")
    add("--captions", nargs="+", metavar="SOURCE",
        help="where captions are: txt or json.FIELD, one or more (default: as in the run, or txt)")
    # fmt: on
    for command in commands.choices.values():
        for name in ("checkpoint", "device", "workers"):
            command.add_argument(f"--{name}", **cli.OPTIONS[name])
        command.add_argument("--json", type=cli.output_file(".json"), help="file for all numbers")
    return parser


def main(argv):
    args = make_parser().parse_args(argv)
    result = args.function(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    cli.run_command(main)
