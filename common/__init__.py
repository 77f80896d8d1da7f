"""What train.py, data.py and eval.py need beside the method, and share with the other folders.

cli        how a command ends, and its options
machine    devices, processes and files
shards     tar files of pairs, and pictures
tokenizer  text <-> token ids
run        checkpoints, and the folder of a run
scenes     the built-in data
"""

import os

# Let a waiting thread sleep after a thousand rounds. GNU's OpenMP would let it spin for so long
# that beside another busy program a run would hardly advance. torch reads this at its import, so
# train.py imports this package first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
