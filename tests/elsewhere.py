"""train.py in a Python that lacks what Windows and macOS lack, and starts processes as they do.

python tests/elsewhere.py OPTIONS
"""

import multiprocessing
import os
import signal
import sys
import sysconfig

import torch  # noqa: F401, which looks for Linux as it is imported

sysconfig.get_config_vars()  # likewise
for module in ("fcntl", "resource"):
    sys.modules[module] = None  # to import it fails
for name in ("fork", "pread", "sched_getaffinity", "sysconf"):
    delattr(os, name)
del signal.SIGHUP
sys.platform = "darwin"

import train  # noqa: E402
from cli import run_command  # noqa: E402

if __name__ == "__main__":  # not in the loading processes, which import this file
    multiprocessing.set_start_method("spawn")
    run_command(train.main)
