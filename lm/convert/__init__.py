"""Converts checkpoints between formats: `python -m lm.convert`."""
