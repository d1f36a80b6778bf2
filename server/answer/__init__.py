"""Turn the engine's events into text, log-probabilities and usage."""
