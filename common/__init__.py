"""What train.py, data.py and eval.py need beside the method, and share with the other folders.

No file here imports one of the three. superclip.py is the only file of the root that is used here.
"""
