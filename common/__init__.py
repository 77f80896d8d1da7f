"""What train.py, data.py and eval.py need beside the method, and share with the other folders.

cli        how a command ends, its options, and the files that it writes
devices    CPUs and GPUs
processes  those that train one model together, and those that load data
shards     tar files of pairs
tokenizer  text <-> token ids
run        checkpoints, and the folder and the log of a run
scenes     the built-in data
"""

import os

# OpenMP's threads sleep while they wait, or runs side by side would be up to fifty times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # torch reads it when it is imported
