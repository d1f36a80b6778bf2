"""The HTTP server: the OpenAI protocol, media, budgets on the wire, metrics. The server handles no tensors."""
