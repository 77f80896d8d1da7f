"""Processes that do what `python train.py` or another command does, and to which something happens
at a firm moment.

They are forked from a server that has imported torch once, so that none takes seconds to start. A
test adds preparations: what is to happen, and before which call of which function.
"""

import importlib
import itertools
import multiprocessing
import os
import pkgutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from material import TINY, WIDE

import superclip
from cli import run_command

ROOT = Path(superclip.__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")
# What the server imports. Nothing may import distributed.py, where each process reads its rank.
PRELOAD = ["torch._dynamo.testing", "scripts.words", "eval", "pytest"]


class Children:
    """The processes of a test. Whatever the test does, they end with it."""

    def __init__(self, folder):
        self.folder = folder
        self.started = []

    def start(self, module, options, *preparations):
        """Starts `python -m MODULE` with these options, after the preparations, which are functions
        that can be pickled. What it prints goes to process.output, a file."""
        output = self.folder / f"output-{len(self.started)}.txt"
        argv = [module, *map(str, options)]
        process = CONTEXT.Process(target=run, args=(argv, output, preparations))
        process.output = output
        process.start()
        self.started.append(process)
        return process

    def train_two(self, first, second):
        """Starts rank 0 and rank 1 of one run, as torchrun does. first, second: their options, and
        whatever else start takes. Returns both processes."""
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
    """Waits for a process. Returns its exit code, and what it has printed."""
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, process.output.read_text()


# ---- in the process


def run(argv, output, preparations):
    os.setpgid(0, 0)  # so that a signal to its group reaches its loading processes, and no others
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its own children
    superclip.PRESETS["tiny"] = TINY
    for prepare in preparations:
        prepare()
    # the objects of the server were for other files
    sys.__stdout__ = sys.stdout = open(1, "w", closefd=False)
    sys.__stderr__ = sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = argv
    run_command(importlib.import_module(argv[0]).main)


def become_rank(rank, port):
    """What torchrun tells a process of two."""
    os.environ.update(
        TORCHELASTIC_RUN_ID="a run",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


# ---- preparations


def before(function, number, act):
    """At its number-th call, a function such as "os.fsync" first does something else."""
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
    """A training step calls the model once. (A validation calls its towers.)"""
    return before("superclip.SuperCLIP.forward", number, act)


def receive(number):
    """The process and all that it has started get a signal. Another process sends it, as a terminal
    or a scheduler does, because a loading process tells its parent from others."""
    return partial(subprocess.run, ["sh", "-c", f"kill -{number:d} -$PPID"])


def compile_wide_towers():
    """The model is WIDE. torch.compile makes no code for the machine, which would need a C++
    compiler, and prints a line for each graph."""
    superclip.PRESETS["tiny"] = WIDE
    torch.compile = partial(torch.compile, backend=compile_cheaply)


def compile_cheaply(graph, inputs):
    print("compiled a graph")
    return torch._dynamo.lookup_backend("eager")(graph, inputs)
