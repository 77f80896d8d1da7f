"""Draw how often the models of a class name an object, from the logs that were handed in:

    python -m docs.histogram handed_in/ --out histogram.png

Arguments are log.jsonl files, by any name, or folders with such files at any depth. The score is
colour + shape at the end of a run. CLIP and SuperCLIP have their own colours at each learning rate.
"""

from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

from cli import check, make_parser, output_file, run_command
from docs.figures import save, scores_of_run
from scripts.report import read_run


def add_run(scores, log):
    """Adds the score of a run to those of its kind, if it has come to its end."""
    run = read_run(log)
    arguments = run["header"]["arguments"]
    method = "SuperCLIP" if arguments["cls_weight"] else "CLIP"
    kind = f"{method}, rate {arguments['learning_rate']:g}"
    points = scores_of_run(run).get("colour shape")
    if not points or points[-1][0] < run["header"]["steps"]:
        print(f"not finished, and left out: {log}")
        return
    score = points[-1][1]
    print(f"{kind}, seed {arguments['seed']}: {score:.1f} %   {log}")
    scores.setdefault(kind, []).append(score)


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("logs", nargs="+", help="logs of runs, or folders")
    parser.add_argument("--out", type=output_file(".png"), required=True, help="picture to write")
    args = parser.parse_args(argv)
    scores = {}  # kind of run -> a list
    for path in map(Path, args.logs):
        for log in sorted(path.rglob("*.jsonl")) or [path]:
            add_run(scores, log)
    check(scores, "there is no finished run")
    matplotlib.use("Agg")
    plt.hist([*scores.values()], range(0, 101, 5), stacked=True, label=[*scores])
    plt.xlabel("colour + shape (%), chance 1.6")
    plt.ylabel("runs")
    plt.locator_params(axis="y", integer=True)
    plt.legend()
    save(args.out)


if __name__ == "__main__":
    run_command(main)
