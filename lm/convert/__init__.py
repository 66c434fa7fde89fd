"""Writes checkpoints in other formats: `python -m lm.convert`."""
