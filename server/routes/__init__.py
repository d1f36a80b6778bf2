"""The HTTP routes. The folders `prepare` and `answer` prepare requests and build answers."""
