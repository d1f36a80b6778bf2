"""HTTP in, HTTP out: the OpenAI protocol, media, budgets on the wire, metrics. Knows no tensors."""
