"""State, step, optimizer, loop and metrics."""
