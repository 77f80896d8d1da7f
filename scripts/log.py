"""Read the log.jsonl of a run, for whatever shows one or compares several."""

import json
from pathlib import Path

from cli import InputError, check


def read_log(path):
    """A log.jsonl -> the last header in it, and the list of rows that count.

    A run that is resumed adds a header, with the step from which it goes on. What the attempt
    before it has logged beyond that is no part of the run, and a validation may come again: then
    the later one counts. Raises InputError.
    """
    header = None
    rows = {}  # by step and kind
    try:
        for line in Path(path).read_text("utf-8").splitlines():
            row = json.loads(line)
            if "header" in row:
                header = row["header"]
                rows = {key: x for key, x in rows.items() if x["step"] <= row["step"]}
            else:
                rows[row["step"], "loss" in row] = row
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is not a log of train.py: {error!r}") from error
    check(header, f"{path} has no header, so it is not a log of train.py")
    return header, list(rows.values())


def short_names(folders):
    """Folders, such as those of --zeroshot_data -> {folder: its name}. Where several have one name,
    as many of the folders above it stand before it as tell it from the others."""
    names = {}
    for folder in folders:
        parts = Path(folder).parts
        names[folder] = folder
        for n in range(1, len(parts) + 1):
            alike = [other for other in folders if Path(other).parts[-n:] == parts[-n:]]
            if len(alike) == 1:
                names[folder] = "/".join(parts[-n:])
                break
    return names
