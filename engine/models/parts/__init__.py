"""What several model families are made of. A family itself is one file in the folder above."""
