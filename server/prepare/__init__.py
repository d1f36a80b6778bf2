"""Turn a validated request into the engine's `Generate`: budget, prompt, images. No HTTP; `tune` uses this folder."""
