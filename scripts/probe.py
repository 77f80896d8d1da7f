"""Score the image tower of a checkpoint by a linear probe:

    python -m scripts.probe --checkpoint out/best.pt --train DIR --test DIR
    python -m scripts.probe --checkpoint out/best.pt --train cifar10 --test cifar10

A linear probe is a linear classifier on the class token of the frozen image tower. It learns from
--train, and is scored on --test. Each is a folder with a folder of images for each class, or a data
set that eval.py zeroshot --help names, which has images for both.

Axes: N pictures, D width.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

import eval as evaluation
from common.cli import check, make_parser, output_file, progress, run_command
from common.devices import pick_device
from common.images import class_pictures


def probe(x, y, x_test, y_test, classes):
    """Fit a linear probe to features x (N, D) and their N labels y, and return its score on x_test
    and y_test. classes: their number. A fifth of the training images chooses the penalty of a probe
    that learns from the others. Then it learns from all of them. It runs on the CPU."""
    check(len(x) > 1, "a probe needs two images to learn from")
    x, x_test = x.cpu(), x_test.cpu()
    y, y_test = torch.as_tensor(y), torch.as_tensor(y_test)
    # Standardise the features, so that one penalty means the same for all of them.
    mean = x.mean(dim=0)
    std = x.std(dim=0).clamp_min(1e-6)
    x = (x - mean) / std
    x_test = (x_test - mean) / std
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    val, rest = order.tensor_split([max(1, len(x) // 5)])

    def count_right(penalty):
        guesses = fit_and_guess(x[rest], y[rest], x[val], classes, penalty)
        return (guesses == y[val]).sum()

    # Of equally good penalties max takes the first one, which is the weakest.
    penalties = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    penalty = max(progress(penalties, "choosing the penalty"), key=count_right)
    guesses = fit_and_guess(x, y, x_test, classes, penalty)
    return evaluation.make_score(guesses == y_test, 1 / classes)


def fit_and_guess(x, y, x_test, classes, penalty):
    """Fit a multinomial logistic regression to features x (N, D) and labels y (N,). Return the
    classes that it finds in x_test. penalty: the factor of the sum of squared weights."""
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def compute_loss():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(compute_loss)
    return F.linear(x_test, weight, bias).argmax(dim=1)


def main(argv):
    parser = make_parser(__doc__, "checkpoint", "device", "workers")
    add = parser.add_argument
    add("--train", required=True, metavar="DIR", help="images to learn from")
    add("--test", required=True, metavar="DIR", help="images of the same classes to score on")
    add("--json", type=output_file(".json"), help="file for all numbers")
    args = parser.parse_args(argv)
    if Path(args.train).is_dir():
        is_same = Path(args.train).resolve() == Path(args.test).resolve()
        check(not is_same, "--train and --test are the same folder. Name others to test on.")
    model, _, _ = evaluation.load(args.checkpoint, pick_device(args.device))
    train = class_pictures(args.train, model.config.image_size, training=True)
    test = class_pictures(args.test, model.config.image_size)
    check(train.classes == test.classes, "--train and --test hold different classes")

    def class_token(pixels):
        return model.visual.class_and_patches(pixels)[:, 0]

    x, y = evaluation.encode_pictures(model, train, args.workers, class_token)
    x_test, y_test = evaluation.encode_pictures(model, test, args.workers, class_token)
    score = probe(x, y, x_test, y_test, len(train.classes))
    print(evaluation.format_score("linear probe", score))
    if args.json:
        args.json.write_text(json.dumps(score, indent=2))


if __name__ == "__main__":
    run_command(main)
