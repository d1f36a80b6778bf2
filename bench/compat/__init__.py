"""Compatibility: unmodified clients, checkpoint layouts and picture formats, tried by one command."""
