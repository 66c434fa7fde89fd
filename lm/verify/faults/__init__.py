"""Fault injection: training runs are broken on purpose and must recover."""
