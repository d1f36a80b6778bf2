"""What a checkpoint's config.json says of a model, and the arithmetic that follows from it. No torch, no weights."""
