"""Corpora, tokenizers, token stores and the batches made of them."""
