"""OpenAI-compatible HTTP server for a Sampler, with a web page that shows how
the next token is chosen: `python -m lm.serve`.
"""
