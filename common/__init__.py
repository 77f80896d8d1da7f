"""What the files of the root need beside the method, which is all that is used of them here."""
