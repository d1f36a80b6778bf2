"""From the events of the engine to text, log-probabilities and usage."""
