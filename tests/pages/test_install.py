"""After `pip install -e .`, the modules can be imported in any folder."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from material import make_model, write_checkpoint
from PIL import Image

import train

ROOT = Path(train.__file__).parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
NOT_INSTALLED = {"docs", "tests"}


def list_in_pyproject(name):
    return ast.literal_eval(re.search(rf"^{name} = (\[.*?\])", PYPROJECT, re.M | re.S)[1])


def test_the_modules_that_are_installed_are_those_of_the_folder():
    files = {path.stem for path in ROOT.glob("*.py")}

    assert sorted(list_in_pyproject("py-modules")) == sorted(files)


def test_the_folders_that_are_installed_are_those_with_commands():
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - NOT_INSTALLED

    assert sorted(list_in_pyproject("packages")) == sorted(folders)


def test_the_readmes_lines_of_inference_run_in_another_folder(tmp_path):
    """An installation adds this folder to Python's path, as PYTHONPATH does."""
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n([^`]*?from eval import load.+?)```", readme, re.S)[1]
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out" / "best.pt", make_model())
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.jpg")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )

    assert re.fullmatch(r"tensor\(\[\[.+,.+\]\]\)\n", result.stdout), result.stderr
