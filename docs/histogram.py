"""Draw how often the models of a class name an object, from the logs that were handed in:

    python -m docs.histogram handed_in/ --out histogram.png

Arguments are log.jsonl files, by any name, or folders with such files at any depth. The score is
colour + shape at the end of a run. CLIP and SuperCLIP have their own colours at each learning rate
and length. A log that was handed in twice counts once. What is not the log of a finished run is
left out, and the command says so.
"""

from pathlib import Path

from matplotlib import pyplot as plt

from cli import InputError, check, make_parser, output_file, run_command
from docs.figures import save
from runtime import read_log
from study.compare import scores_of


def log_files(paths):
    """Files and folders -> the files. Of copies of one log, whatever their names, one is left."""
    files = {}  # by their content
    for path in paths:
        for file in [path, *sorted(path.rglob("*.jsonl"))]:
            if file.is_file():
                files[file.read_bytes()] = file
    return files.values()


def read_score(log):
    """A log -> what kind of run it is of, its seed, and its score in percent. Raises an error if it
    is not the log of a finished run on the built-in scenes."""
    header, rows = read_log(log)
    options = header["arguments"]
    score = scores_of(rows[-1])["scores"]["colour_shape"]  # a run ends with a validation
    check(rows[-1]["step"] >= header["steps"], "it has not finished")
    method = "SuperCLIP" if options["cls_weight"] else "CLIP"
    length = f"{header['steps']:,} steps of {options['batch_size']}"
    kind = f"{method}, rate {options['learning_rate']:g}, {length}"
    return kind, options["seed"], 100 * score["value"]


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("logs", nargs="+", type=Path, help="logs of runs, or folders")
    parser.add_argument("--out", type=output_file(".png"), required=True, help="picture to write")
    args = parser.parse_args(argv)
    scores = {}  # kind of run -> a list
    for log in log_files(args.logs):
        try:
            kind, seed, score = read_score(log)
        except (InputError, LookupError, TypeError, AttributeError):
            print(f"left out, as it is not the log of a finished run: {log}")
            continue
        print(f"{kind}, seed {seed}: {score:.1f} %   {log}")
        scores.setdefault(kind, []).append(score)
    check(scores, "there is no finished run")
    plt.hist([*scores.values()], range(0, 101, 5), stacked=True, label=[*scores])
    plt.xlabel("colour + shape (%), chance 1.6")
    plt.ylabel("runs")
    plt.locator_params(axis="y", integer=True)
    plt.legend(loc="lower center", bbox_to_anchor=(0.5, 1))  # above the bars
    plt.tight_layout()
    save(args.out)


if __name__ == "__main__":
    run_command(main)
