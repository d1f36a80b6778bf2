"""The user's settings: frozen, validated dataclasses and presets. Imports no other folder of the project."""
