"""The commands in this folder import torch before the core, so import common before."""

import common  # noqa: F401, it sets an environment variable that torch reads
