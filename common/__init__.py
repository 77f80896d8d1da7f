"""What train.py, data.py and eval.py need beside the method, and share with the other folders."""
