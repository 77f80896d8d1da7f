"""The experiments in this folder import torch before train.py, so import common before."""

import common  # noqa: F401, it sets an environment variable that torch reads
