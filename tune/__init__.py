"""`foveate tune`: finds budgets and schedules on a user's own pictures and questions, and writes a preset of them."""
