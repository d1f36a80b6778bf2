"""Foveate: a vision-language inference server in which every request carries a budget."""

__version__ = "0.1.0"
