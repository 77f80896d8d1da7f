"""Sort the images of shards into folders, one for each class:

    python -m scripts.classes 'shards/val-*.tar' --field type --largest 10 --out types/
    python eval.py zeroshot --checkpoint out/best.pt --images types/

The field of .json names the class. `eval.py zeroshot`, `eval.py probe` and train.py --zeroshot_data
take such folders. A folder's name is what the model is asked for, so rename folders to what the
captions say: a model that has often read "t-shirt" knows less of "Tshirts".
"""

import re
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import data
from cli import check, make_parser, number, printable, run_command


def read_classes(shards, source):
    """Returns a list of (row, class) of the samples that have a class. source: json.FIELD."""
    found = []
    for row in data.progress(shards.index.tolist(), "reading classes", unit="sample"):
        with suppress(data.BadSample):
            texts = shards.texts(row, source)
            found.append((row, texts[0].strip()))
    return found


def folder_names(classes):
    """Returns a dict of class -> name of its folder. Two classes never share one, even if they
    differ only in characters that the name of a folder cannot have."""
    folders = {}
    for name in classes:
        # No name leads out of the folder, or makes a hidden one.
        plain = re.sub(r"[/\\\0]|^\.", "_", name)
        folder = plain
        number = 2
        while folder in folders.values():
            folder = f"{plain} {number}"
            number += 1
        folders[name] = folder
    return folders


def write_images(shards, found, folders, at_most):
    """Write at most so many images of each class into its folder, or all of them if it is None.
    Returns the numbers of written images by class, a Counter, and of those that cannot be read."""
    written = Counter()
    unreadable = 0
    for row, name in data.progress(found, "writing", unit="image"):
        if name not in folders or written[name] == at_most:
            continue
        try:
            content = shards.read(row, data.IMAGE)
        except data.BadSample:  # of a truncated shard
            unreadable += 1
            continue
        folders[name].mkdir(exist_ok=True)
        # Whatever the format is: readers look into the file.
        image = folders[name] / f"{written[name]:06d}.jpg"
        image.write_bytes(content)
        written[name] += 1
    return written, unreadable


def main(argv):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("shards", nargs="+", help="tar shards: paths, folders, globs or braces")
    add("--field", required=True, help="field of .json that names the class")
    add("--out", type=Path, required=True, help="folder to create")
    add("--largest", type=number(int, 1), help="keep this many classes, the largest ones")
    add("--at_most", type=number(int, 1), help="keep this many images of a class")
    args = parser.parse_args(argv)
    check(not args.out.exists(), f"{args.out} is there already")
    source = f"json.{args.field}"
    data.check_sources([source])
    shards = data.Shards(data.expand(args.shards))
    found = read_classes(shards, source)
    check(found, f"no sample has a field {args.field} with a text in it")
    sizes = Counter(name for _, name in found)
    names = folder_names([name for name, _ in sizes.most_common(args.largest)])

    # The folder appears complete or not at all.
    parent = args.out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.name}-", dir=parent) as temporary:
        whole = Path(temporary, "classes")
        whole.mkdir()
        folders = {name: whole / folder for name, folder in names.items()}
        written, unreadable = write_images(shards, found, folders, args.at_most)
        check(written, "none of the images can be read")
        whole.rename(args.out)

    for name, n in written.most_common():
        text = names[name]
        if text != name:
            text += f"  (the class {name})"
        print(f"{n:8,}  {printable(text)}")
    if unreadable > 0:
        print(f"images that cannot be read: {unreadable:,}")


if __name__ == "__main__":
    run_command(main)
