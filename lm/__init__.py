"""Pretrain decoder language models by next-token prediction, in JAX."""
