"""What every command shares with the others: how it treats mistakes, options, text for the
terminal, files, locks and the device. Nothing here is about the method."""

import argparse
import errno
import fcntl
import importlib
import json
import math
import os
import re
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch

# -----------------------------------------------------------------------------
# Mistakes


class InputError(Exception):
    """What the user gave cannot work. The message says why, in one sentence."""


def check(condition, message):
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


# Errors of the system that a user can mend: a full or broken disk, too large a file, too many open
# files or processes, too little memory.
RESOURCES = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG,
    errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM,
}  # fmt: skip


def sentence_about(error):
    """What to tell the user about an error, or None if it is a mistake of this program."""
    text = str(error)
    if isinstance(error, InputError):
        return re.sub("(?s).*InputError: ", "", text)  # a loading process puts its trace in front
    if is_out_of_memory(error):
        return "out of memory: a smaller batch, or --micro_batch_size in train.py, needs less"
    if isinstance(error, OSError) and (error.filename is not None or error.errno in RESOURCES):
        return re.sub(r"^\[Errno \d+\] ", "", text)
    return None


def is_out_of_memory(error):
    # torch has a class for a GPU's memory. For the CPU's, only the text tells.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def run_command(main):
    """Run a command: main(argv). A user's mistake ends it with a sentence and exit code 2, Ctrl-C
    with a sentence and code 130. A mistake of ours keeps its trace."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="replace")  # no caption must end a run on an odd terminal
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # the reader, such as `| head`, has left
        sys.stdout = None
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = sentence_about(error)
        if sentence is None:
            raise
        # The frames of the first error hold loading processes, which end at once without them.
        first = error.__context__ or error
        traceback.clear_frames(first.__traceback__)
        print("error:", printable(sentence.strip()), file=sys.stderr)
        sys.exit(2)


# -----------------------------------------------------------------------------
# Options

OPTIONS = {
    "checkpoint": dict(
        required=True,
        metavar="FILE",
        help="best.pt or last.pt of a run, or a file that scripts.convert has written",
    ),
    "device": dict(help="cuda, mps or cpu (default: the first there is)"),
    "captions": dict(
        nargs="+",
        default=["txt"],
        metavar="SOURCE",
        help="where captions are: txt or json.FIELD, one or more (default txt)",
    ),
}


def make_parser(doc, *names):
    """A parser for a command. doc: its module's docstring, whose first sentence --help shows;
    names: those of OPTIONS that it takes."""
    description = doc.partition("\n\n")[0].replace("\n", " ").rstrip(".:") + "."
    # no abbreviations, because a typo should not become another option
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add_options(parser, *names)
    return parser


def add_options(parser, *names):
    for name in names:
        parser.add_argument(f"--{name}", **OPTIONS[name])


def number(kind, low, high=10**12):
    """A type for argparse: an int or a float, from low to high."""

    def parse(text):
        value = kind(text)
        if math.isnan(value) or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse uses it in its own messages
    return parse


def output_file(*suffixes):
    """A type for argparse: a file to write, with one of these suffixes, in a folder that exists. It
    is checked when the option is parsed, so that no work is lost, and the suffix keeps checkpoints
    and shards from being written over."""

    def parse(text):
        path = Path(text)
        if path.suffix.lower() in suffixes and path.parent.is_dir() and not path.is_dir():
            return path
        endings = " or ".join(suffixes)
        raise argparse.ArgumentTypeError(f"{text} does not end in {endings}, in an existing folder")

    return parse


def optional(module, package=None):
    """Import a module of a package that requirements.txt does not name. Raises InputError."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise InputError(f"this needs: pip install {package or module}") from None


# -----------------------------------------------------------------------------
# Text for the terminal

# Control characters, halves of surrogate pairs, line breaks, and what turns the writing direction
ESCAPED = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text):
    """The text with control characters as escapes, so that a caption or the name of a file cannot
    give orders to the terminal that shows it."""
    return ESCAPED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class LostReader:
    """A stream that drops what is printed once its reader, such as `| head`, has left."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def outlive_readers():
    """From here on the command goes on when nobody reads what it prints any more."""
    sys.stdout = LostReader(sys.stdout)
    sys.stderr = LostReader(sys.stderr)


# -----------------------------------------------------------------------------
# Files, folders and locks


def write_file(path, write):
    """Write a file whole or not at all. `write(file)` fills a temporary file, which is flushed to
    the disk and then renamed. After an OSError, what was at `path` before is still there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there after an error


def write_json(path, content):
    """Write what a command has found to the file of --json, if there is one."""
    if path is not None:
        text = json.dumps(content, indent=2)
        write_file(path, lambda file: file.write(text.encode()))


def cache_folder():
    """A folder of this user's alone, for what can be made again: below XDG_CACHE_HOME or ~/.cache,
    or else one below /tmp, the same for all processes."""
    folders = [Path(tempfile.gettempdir(), f"superclip-{os.getuid()}")]
    with suppress(RuntimeError):  # there is no home
        parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folders.insert(0, Path(parent, "superclip"))
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(0o700, parents=True, exist_ok=True)
            # Anybody can make a folder below /tmp, so it must be this user's own.
            if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
                return folder
    raise InputError("there is no folder for a cache: set XDG_CACHE_HOME to one")


LOCK_FILES = []  # open as long as the locks are to last, because closing a file frees its lock
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES}


def lock_folder(folder, seconds=60):
    """Keep other commands out of a folder until this process ends, however that ends. A folder that
    another one has locked is waited for, so many seconds at most. Raises InputError. Returns False
    if the file system has no locks."""
    # lockf, because unlike flock's its locks are not inherited by loading processes
    file = open(Path(folder, ".lock"), "a")
    LOCK_FILES.append(file)
    deadline = time.monotonic() + seconds
    is_told = False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise InputError(f"{folder} is in use by another command") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"warning: {printable(str(folder))} cannot be locked", file=sys.stderr)
            return False
        if not is_told:
            print(f"waiting for another command to leave {printable(str(folder))}", file=sys.stderr)
            is_told = True
        time.sleep(0.1)


def unlock_folders():
    """Lets other commands into the folders again, as the end of this process does, too."""
    while LOCK_FILES:
        LOCK_FILES.pop().close()


# -----------------------------------------------------------------------------
# The device


def pick_device(name):
    """--device, or the first one there is, as a torch.device. Raises InputError."""
    if name is None:
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device: there is no {name} ({reason})") from None
    check(device.type in ("cuda", "mps", "cpu"), f"--device is cuda, mps or cpu, not {name}")
    return device


def pick_dtype(device):
    """Returns the name of the fastest dtype that the device has units for."""
    if device.type == "cuda":
        # Ampere, compute capability 8, is the first with bfloat16 units. float16, on older GPUs,
        # has a small range, which the loss scaler makes up for.
        capability = torch.cuda.get_device_capability(device)
        return "bfloat16" if capability[0] >= 8 else "float16"
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older torch cannot tell
        if torch.cpu.get_capabilities().get("avx512_bf16"):
            return "bfloat16"
    return "float32"
