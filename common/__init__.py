"""What train.py, data.py and eval.py need beside the method, and share with the other folders.

cli        how a command ends, and its options
machine    devices, processes and files
shards     tar files of pairs, and pictures
tokenizer  text <-> token ids
run        checkpoints, and the folder and the log of a run
scenes     the built-in data
"""
