"""A run on a platform that is not Linux, as far as Linux can show it."""

import os
import subprocess
import sys

from children import ROOT
from material import checkpoint_of, short_run


def test_a_run_with_loading_processes_needs_nothing_that_only_linux_has(shards, tmp_path):
    options = short_run(shards, tmp_path, "--steps", 2, "--workers", 1, "--val_data", "none")
    command = [sys.executable, ROOT / "tests" / "elsewhere.py", *options]

    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})

    assert done.returncode == 0
    assert checkpoint_of(tmp_path)["step"] == 2
