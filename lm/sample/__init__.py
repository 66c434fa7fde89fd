"""Sampling from a checkpoint; knows nothing of training."""
