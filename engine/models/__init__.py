"""Lean modules that run Hugging Face vision-language checkpoints: one file per family."""
