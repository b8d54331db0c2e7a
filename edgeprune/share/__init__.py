"""Sharing: the model card that travels with the file."""
