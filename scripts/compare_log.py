"""Is my curve normal? Puts a log.jsonl beside the reference log of the default run.

    python scripts/compare_log.py out/log.jsonl [--reference FILE] [--picture curves.png]

Both logs are cut into ten stretches of equal numbers of samples seen; within a stretch the losses
of the logged steps are averaged, since single steps are noisy.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from superclip import InputError  # noqa: E402


def read_log(path):
    """log.jsonl -> (header, rows of steps, rows of validation)."""
    if not Path(path).is_file():
        raise InputError(f"there is no log {path}")
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    except ValueError:
        raise InputError(f"{path} is no log.jsonl of train.py") from None
    headers = [row["header"] for row in rows if "header" in row]
    steps = [row for row in rows if "contrastive_loss" in row]
    if not headers or not steps:
        raise InputError(f"{path} is no log.jsonl of train.py, or has no logged step yet")
    return headers[0], steps, [row for row in rows if "mean_r1" in row]


def stretches(steps, last, n=10):
    """Mean losses of the steps in each n-th of `last` samples: list of (contrastive, words) or
    None."""
    parts = [[] for _ in range(n)]
    for row in steps:
        part = (row["samples"] - 1) * n // last
        if part < n:
            parts[part].append((row["contrastive_loss"], row["classification_loss"]))
    return [tuple(map(statistics.mean, zip(*part))) if part else None for part in parts]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("log", help="log.jsonl of your run")
    parser.add_argument(
        "--reference",
        default=ROOT / "results" / "reference_log.jsonl",
        help="log.jsonl to compare with",
    )
    parser.add_argument("--picture", metavar="PNG", help="draw both (needs matplotlib)")
    args = parser.parse_args(argv)
    mine, reference = read_log(args.log), read_log(args.reference)
    last = reference[1][-1]["samples"]
    print(f"{'':>10}   contrastive loss    word loss")
    print(f"{'samples':>10}   yours reference    yours reference")
    own, theirs = (stretches(steps, last) for _, steps, _ in (mine, reference))
    for i, (a, b) in enumerate(zip(own, theirs)):
        numbers = "      -" if a is None else f"{a[0]:7.3f}"
        words = "      -" if a is None else f"{a[1]:7.3f}"
        print(f"{(i + 1) * last // 10:10,} {numbers} {b[0]:9.3f}  {words} {b[1]:9.3f}")
    for name, (_, _, validation) in (("yours", mine), ("reference", reference)):
        if validation:
            row = validation[-1]
            score = f"mean R@1 {100 * row['mean_r1']:.1f} %"
            print(f"{name:>10}: {score} after {row['samples']:,} samples")
    different = [name for name in ("batch_size", "steps", "model", "data_fingerprint", "dtype")
                 if mine[0].get(name) != reference[0].get(name)]  # fmt: skip
    for name in different:
        print(f"yours has {name} {mine[0].get(name)}, the reference {reference[0].get(name)}")
    if args.picture:
        draw(args.picture, mine, reference)


def draw(path, mine, reference):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for name, (_, steps, validation) in (("reference", reference), ("yours", mine)):
        x = [row["samples"] for row in steps]
        for axis, key in zip(axes, ("contrastive_loss", "classification_loss")):
            axis.plot(x, [row[key] for row in steps], label=name, lw=1.2)
            axis.set(title=key.replace("_", " "), xlabel="samples seen")
        x = [row["samples"] for row in validation]
        axes[2].plot(x, [100 * row["mean_r1"] for row in validation], "o-", label=name, ms=3)
    axes[2].set(title="validation, mean R@1 (%)", xlabel="samples seen")
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    data.cli(main)
