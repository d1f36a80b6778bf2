"""What a vision tower gives and what it can be asked for: signals, inputs of reducers, token transforms, cuts."""
