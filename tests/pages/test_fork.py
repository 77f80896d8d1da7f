"""The diff of docs/fork.md applies to this code, and the line that it adds to a test passes in
micro-batches. (Two processes would take six seconds more, most of them to start.)"""

import re
import shutil
import subprocess
import sys

from children import ROOT

PAGE = (ROOT / "docs" / "fork.md").read_text()


def test_the_fork_on_the_page_has_the_same_gradients_in_micro_batches(tmp_path):
    for name in ("scripts", "tests", "pyproject.toml", *(path.name for path in ROOT.glob("*.py"))):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    diff = re.search("```diff\n(.*?)```", PAGE, re.DOTALL)[1]
    subprocess.run(["git", "apply"], cwd=tmp_path, input=diff, text=True, check=True)
    chosen = ["-k", "uniformity and micro_batches", "tests/test_step.py"]
    command = [sys.executable, "-m", "pytest", *chosen]

    tested = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert re.search(r"\b5 passed", tested.stdout), tested.stdout
