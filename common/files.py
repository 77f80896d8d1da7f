"""Write files and folders whole or not at all, and find the folder of the cache."""

import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from common.cli import check


def write_file(path, write):
    """Write a file whole or not at all. `write(file)` fills a temporary file, which is flushed to
    the disk and then renamed to `path`. After an OSError, an older file at `path` is still
    there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # after an error it still exists


@contextmanager
def new_folder(path):
    """Make a folder whole or not at all. Yield a hidden folder, which the block fills, and which is
    renamed to `path` at the end. Raise InputError if `path` exists at the beginning."""
    path = Path(path).absolute()
    check(not path.exists(), f"{path} exists already. Remove it, or use another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        yield folder
        folder.rename(path)


def cache_folder():
    """Return the folder for files that can be made again, below XDG_CACHE_HOME or ~/.cache. The
    folder may not exist. Raise RuntimeError if the user has no home, as in a container that runs
    under a number without a user."""
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent, "superclip")
