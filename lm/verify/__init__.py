"""Self-checks of a config on this machine: `python -m lm.verify`."""
