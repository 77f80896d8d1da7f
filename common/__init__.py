"""What train.py, data.py and eval.py need beside the method, and share with the other folders.

cli        how a command ends, its options, and the files that it writes
devices    CPUs and GPUs
processes  those that train one model together, and those that load data
shards     tar files of pairs
images     files of images -> pixels, and pictures in order
tokenizer  text <-> token ids
run        checkpoints, and the folder and the log of a run
scenes     the built-in data
"""
