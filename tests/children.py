"""Start processes that run train.py or another command, and let something happen to them at a
chosen moment.

The processes are forked from a server that has imported torch once, so none of them takes seconds
to start. A test gives them preparations, functions that run before the command. A preparation from
`before` says what is to happen, and before which call of which function.
"""

import importlib
import itertools
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import torch
from material import TINY

import superclip
from common import processes
from common.cli import run_command

ROOT = Path(superclip.__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")
# The server imports these modules.
PRELOAD = ["torch._dynamo.testing", "eval", "pytest"]


class Children:
    """Start the processes of a test. They end with the test, whatever it does."""

    def __init__(self, folder):
        self.folder = folder
        self.started = []

    def start(self, module, options, *preparations):
        """Start `python -m MODULE` with these options, after the preparations, which are functions
        that can be pickled. Return the process. It prints to the file process.output."""
        output = self.folder / f"output-{len(self.started)}.txt"
        argv = [module, *map(str, options)]
        process = CONTEXT.Process(target=run, args=(argv, output, preparations))
        process.output = output
        process.start()
        self.started.append(process)
        return process

    def train_two(self, first, second):
        """Start process 0 and process 1 of one run, as torchrun does, and return both. first,
        second: for each a list with its options, followed by its preparations."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank, (options, *preparations) in enumerate((first, second)):
            become = partial(become_rank, rank, port)
            processes.append(self.start("train", options, become, *preparations))
        return processes

    def end(self):
        for process in self.started:
            process.kill()
            process.join()


def finish(process):
    """Wait for a process. Return its exit code, and the text that it has printed."""
    process.join(120)  # a busy machine needs one minute for two processes that compile
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, process.output.read_text()


# ---- what runs in the process


def run(argv, output, preparations):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for loading processes
    superclip.PRESETS["tiny"] = TINY
    for prepare in preparations:
        prepare()
    # The server's objects write to other files.
    sys.__stdout__ = sys.stdout = open(1, "w", closefd=False)
    sys.__stderr__ = sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = argv
    run_command(importlib.import_module(argv[0]).main)


def become_rank(rank, port):
    """Set the variables by which torchrun tells one of two processes its rank."""
    os.environ.update(
        TORCHELASTIC_RUN_ID="a run",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    importlib.reload(processes)  # the server has read the variables when it imported this module


# ---- preparations


def before(function, number, act):
    """Return a preparation. It lets act() happen before a call of a function. function: its name,
    such as "os.fsync"; number: the number of that call, from 1 on."""
    return partial(hook, function, number, act)


def hook(function, number, act):
    owner, _, name = function.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    original = getattr(owner, name)
    calls = itertools.count(1)

    def call(*args, **options):
        if next(calls) == number:
            act()
        return original(*args, **options)

    setattr(owner, name, call)


def in_step(number, act):
    """Return a preparation that lets act() happen in a training step. number: the number of the
    step, from 1 on. A step calls the model once. A validation calls only its towers."""
    return before("superclip.SuperCLIP.forward", number, act)


def killed():
    """Kill the process, as a scheduler or a machine that is switched off does."""
    os.kill(os.getpid(), signal.SIGKILL)
