"""The hardware: which version of an operation runs, and what callers may ask of a device."""
