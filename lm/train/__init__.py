"""Training: state, step, optimizer, loop and metrics."""
