"""Train the bundled tiny models: tokenizer, architectures, data, losses, loop, evaluation and export."""
