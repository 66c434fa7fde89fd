"""Evaluation of a model on text: loss, perplexity, bits per byte."""
