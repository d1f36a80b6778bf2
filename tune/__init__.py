"""`foveate tune`: find a budget and a schedule on the user's own images and questions, and write a preset."""
