"""The data pipeline: corpora, tokenizers, token stores and batches."""
