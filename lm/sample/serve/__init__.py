"""An OpenAI-compatible server over one Sampler, and a page that shows how the
next token is chosen; `python -m lm.sample.serve`.
"""
