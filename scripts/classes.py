"""Sort the images of shards into folders, one for each class:

    python -m scripts.classes 'shards/val-*.tar' --field type --largest 10 --out types/
    python eval.py zeroshot --checkpoint out/best.pt --images types/

The field of .json names the class. `eval.py zeroshot`, `eval.py probe` and train.py --zeroshot_data
take such folders. A folder's name is what the model is asked for, so rename folders to what the
captions say: a model that has often read "t-shirt" knows less of "Tshirts".
"""

import argparse
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import data
from cli import check, number, printable, run_command


def read_classes(pairs):
    """pairs: data.Pairs, whose captions are the field -> list of (row, class) of the samples that
    have one."""
    found = []
    for row in data.progress(pairs.index.tolist(), "reading classes", unit="sample"):
        with suppress(data.BadSample):
            name = pairs.texts(row, pairs.captions[0])[0].strip()
            # No name leads out of the folder, or makes a hidden one.
            found.append((row, re.sub(r"[/\\\0]|^\.", "_", name)))
    return found


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0], allow_abbrev=False)
    add = parser.add_argument
    add("shards", nargs="+", help="tar shards: paths, folders, globs or braces")
    add("--field", required=True, help="field of .json that names the class")
    add("--out", type=Path, required=True, help="folder to create")
    add("--largest", type=number(int, 1), help="keep this many classes, the largest ones")
    add("--at_most", type=number(int, 1), help="keep this many images of a class")
    args = parser.parse_args(argv)
    check(not args.out.exists(), f"{args.out} is there already")
    pairs = data.Pairs(data.expand(args.shards), None, None, [f"json.{args.field}"])
    found = read_classes(pairs)
    check(found, f"no sample has a field {args.field} with a text in it")
    sizes, written = Counter(name for _, name in found), Counter()
    largest = {name for name, _ in sizes.most_common(args.largest)}
    for row, name in data.progress(found, "writing", unit="image"):
        if name in largest and written[name] < (args.at_most or len(found)):
            (args.out / name).mkdir(parents=True, exist_ok=True)
            # Whatever the format is: readers look into the file.
            image = args.out / name / f"{written[name]:06d}.jpg"
            image.write_bytes(pairs.read(row, data.IMAGE))
            written[name] += 1
    for name, n in written.most_common():
        print(f"{n:8,}  {printable(name)}")


if __name__ == "__main__":
    run_command(main)
