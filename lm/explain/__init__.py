"""Shows how a model continues, and how likely a text is."""
