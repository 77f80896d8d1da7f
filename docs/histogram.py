"""Draw how often the models of a class name an object, from the logs that were handed in:

    python -m docs.histogram handed_in/ --out histogram.png

Arguments are log.jsonl files, by any name, or folders with such files at any depth. The score is
colour + shape at the end of a run. CLIP and SuperCLIP have their own colours at each learning rate
and length. A log that was handed in twice counts once. What is not the log of a finished run is
left out, and the command says so.
"""

from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

from cli import InputError, check, make_parser, output_file, run_command
from docs.figures import save, scores_of_run
from scripts.report import read_run


def log_files(paths):
    """Files and folders -> the files. Of copies of one log, whatever their names, one is left."""
    files = {}  # by their content
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(path.rglob("*.jsonl"))
        for file in found:
            files[file.read_bytes()] = file
    return files.values()


def read_score(log):
    """A log -> what kind of run it is of, its seed, and its score in percent. Raises InputError if
    it is no log, or one of a run that has not come to its end."""
    try:
        run = read_run(log)
        header = run["header"]
        arguments = header["arguments"]
        seed = arguments["seed"]
        method = "SuperCLIP" if arguments["cls_weight"] else "CLIP"
        kind = f"{method}, rate {arguments['learning_rate']:g}"
        kind += f", {header['steps']:,} steps of {arguments['batch_size']}"
        points = scores_of_run(run).get("colour shape")
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{log} is not a log of train.py") from error
    finished = points and points[-1][0] >= header["steps"]
    check(finished, f"{log} is of a run that has not finished")
    return kind, seed, points[-1][1]


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path, help="logs of runs, or folders")
    parser.add_argument("--out", type=output_file(".png"), required=True, help="picture to write")
    args = parser.parse_args(argv)
    scores = {}  # kind of run -> a list
    for log in log_files(args.logs):
        try:
            kind, seed, score = read_score(log)
        except InputError as error:
            print(f"left out: {error}")
            continue
        print(f"{kind}, seed {seed}: {score:.1f} %   {log}")
        scores.setdefault(kind, []).append(score)
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
