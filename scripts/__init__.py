"""Commands for pairs, pictures and checkpoints. Each one begins with how it is called."""
