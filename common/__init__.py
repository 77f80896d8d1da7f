"""What superclip.py, train.py, data.py and eval.py share with scripts/, study/ and docs/."""
