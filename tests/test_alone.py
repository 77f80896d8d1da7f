"""superclip.py needs nothing but torch, so it can be copied alone into another project."""

import runpy
import sys

import torch
from children import ROOT

# The other packages of requirements.txt, and what they bring
PACKAGES = ["PIL", "regex", "tiktoken", "torchvision", "tqdm"]


def test_superclip_py_needs_nothing_but_torch(monkeypatch):
    """It makes a step where no other package and no other file of the project can be imported."""
    for name in (*PACKAGES, *(path.stem for path in ROOT.glob("*.py"))):
        monkeypatch.setitem(sys.modules, name, None)  # to import it fails

    code = runpy.run_path(ROOT / "superclip.py")

    config = code["SuperCLIPConfig"](**code["PRESETS"]["tiny"], vocab_size=60)
    model = code["SuperCLIP"](config)
    tokens = torch.tensor([[58, 7, 59], [58, 8, 59]])
    model(torch.zeros(2, 3, 72, 72), tokens)["loss"].backward()
