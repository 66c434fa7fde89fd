"""The decoder, its loss, and its counts in closed form."""
