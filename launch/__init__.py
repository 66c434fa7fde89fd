"""One spec, five places to run it: see `python -m launch --help`.

Run from the checkout, not installed; imports neither JAX nor the model.
"""
