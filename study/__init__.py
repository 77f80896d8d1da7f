"""The experiments in this folder import torch before train.py can set this for it."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads sleep soon, as in train.py
