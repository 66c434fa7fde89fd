"""Sampling from a checkpoint; imports nothing from lm.train."""
