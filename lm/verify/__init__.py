"""Proves a config on this machine: `python -m lm.verify`."""
