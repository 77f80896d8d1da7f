"""The published page: a list of experiments, each of which is a pair of command lines.

    python -m study.plan                     run what is missing, and write results.md and figures
    python -m study.plan batch8 batch32      run these rows alone
    python -m study.plan --report            only write them, from the runs that are there

Every row is what `python -m study.compare --rates` makes of the commands that it names, with five
seeds. The runs go to study/runs.jsonl. Two rows need photographs in out_study: Flickr8k's shards,
flickr8k/train-*.tar and dev-*.tar, whose .json files have five captions in the field "captions",
and cifar10/, as objects.py wants it.
"""

from typing import NamedTuple

from cli import InputError, make_parser, run_command
from study import compare
from study.compare import World

CLIP = "train.py --cls_weight 0"
SUPERCLIP = "train.py"
SHORT = "--captions json.short"
DUAL = "--captions json.short --label_captions json.long"
PHOTOGRAPHS = World(256, "out_study/cifar10")
LOOKS = ("R@1", "colour_shape", "held_out")
FLICKR = (
    "--train_data 'out_study/flickr8k/train-*.tar' --val_data 'out_study/flickr8k/dev-*.tar' "
    "--captions json.captions --vocab clip --model tiny --crop_area 1.0 --weight_decay 0.1 "
    "--batch_size 32 --epochs 6 --learning_rate 3.5e-4"
)


class Row(NamedTuple):
    """An experiment."""

    name: str
    label: str
    common: str  # options of both commands
    a: str = CLIP
    b: str = SUPERCLIP
    world: World = World()
    scores: tuple = LOOKS  # those that the page shows
    probe: bool = False


def length(batch_size, samples=48_000):
    return f"--batch_size {batch_size} --epochs {samples / 20_000:g}"


def grouped(group):
    """A batch of 64 in groups, each compared by itself."""
    module = f"-m study.groups --group {group}"
    label = f"batch 64, groups of {group}"
    return Row(f"groups{group}", label, length(64), f"{module} --cls_weight 0", module)


# In the order in which they convince.
ROWS = [
    Row("batch8", "batch 8", length(8)),
    Row("batch32", "batch 32", length(32)),
    Row("batch256", "batch 256", length(256)),
    Row("flickr8k", "Flickr8k, batch 32", FLICKR, scores=("R@1", "R@10")),
    Row("batch32long", "batch 32, 144,000 samples", length(32, 144_000)),
    Row("batch256long", "batch 256, 144,000 samples", length(256, 144_000)),
    grouped(4),
    grouped(64),
    Row("no_idf", "IDF -> equal weights", length(32), SUPERCLIP, "-m study.no_idf"),
    Row("lambda0.3", "lambda 1 -> 0.3", length(32), SUPERCLIP, "train.py --cls_weight 0.3"),
    Row("lambda3", "lambda 1 -> 3", length(32), SUPERCLIP, "train.py --cls_weight 3"),
    Row("short", "short captions", f"{length(32)} {SHORT}"),
    Row("dual", "SuperCLIP, short -> dual captions", length(32),
        f"{SUPERCLIP} {SHORT}", f"{SUPERCLIP} {DUAL}"),
    Row("sigmoid", "SigLIP -> SuperSigLIP", f"{length(32)} --loss sigmoid"),
    Row("objects", "CIFAR-10 in settings, batch 16, 96,000 samples", length(16, 96_000),
        world=PHOTOGRAPHS, scores=("R@1", "object", "probe", "patch probe"), probe=True),
    Row("settings16", "16 settings, batch 8", length(8), world=World(16)),
]  # fmt: skip
NAMES = [row.name for row in ROWS]


def sides_of(study, row):
    pair = [compare.read_command(text, row.common, row.world) for text in (row.a, row.b)]
    return study.experiment(pair, 5, True, row.probe)


def run_rows(study, names):
    """Run what is missing of some rows. A row that fails is named, and the next one begins."""
    for row in ROWS:
        if row.name in names:
            print(f"---- {row.name}: {row.label}", flush=True)
            try:
                sides_of(study, row)
            except InputError as error:
                print(f"{row.name} is not finished: {error}", flush=True)


def main(argv):
    parser = make_parser(__doc__)
    parser.add_argument("rows", nargs="*", choices=[*NAMES, []], metavar="ROW", help=str(NAMES))
    parser.add_argument("--report", action="store_true", help="run nothing")
    compare.add_shared(parser)
    args = parser.parse_args(argv)
    if not args.report:
        compare.open_out(args.out)
        study = compare.Study(args.out, args.jobs, compare.PUBLISHED)
        run_rows(study, args.rows or NAMES)


if __name__ == "__main__":
    run_command(main)
