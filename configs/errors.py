"""The error a user's setting causes."""


class ConfigError(ValueError):
    """A setting is wrong. The message is one line: the key, the value, what is legal, the remedy."""
