"""The decoder, KV cache, loss, and closed-form parameter and FLOP counts."""
