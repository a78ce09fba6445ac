"""Counts of the training text and of the document so far, mixed with what the network says."""
