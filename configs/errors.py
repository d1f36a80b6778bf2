"""The error for a wrong setting."""


class ConfigError(ValueError):
    """A setting is wrong. The message is one line: the key, the value, the legal values, the remedy."""
