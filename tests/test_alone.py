"""superclip.py needs nothing but torch, so it can be copied alone into another project."""

import os
import shutil
import subprocess
import sys

from children import ROOT

# In a process that has none of the other packages of requirements.txt, or of what they bring
CODE = """
import sys

for package in ("PIL", "regex", "tiktoken", "torchvision", "tqdm"):
    sys.modules[package] = None  # to import it fails

import torch
from superclip import PRESETS, SuperCLIP, SuperCLIPConfig

model = SuperCLIP(SuperCLIPConfig(**PRESETS["tiny"], vocab_size=60))
images = torch.zeros(2, 3, 72, 72)
model(images, torch.tensor([[58, 7, 59], [58, 8, 59]]))["loss"].backward()
"""


def test_superclip_py_needs_nothing_but_torch(tmp_path):
    """It makes a step in a folder of its own, to which no path leads from the project."""
    shutil.copy(ROOT / "superclip.py", tmp_path)
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", CODE]

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
