"""HTTP below the API: bodies, server-sent events, disconnects, keys, errors as responses."""
