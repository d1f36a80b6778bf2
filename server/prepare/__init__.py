"""From a validated request to the engine's `Generate`: budget, prompt, pictures. Knows no HTTP; `tune` uses it."""
