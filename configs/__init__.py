"""What a user may set: frozen, validated dataclasses and presets. Imports nothing of ours."""
