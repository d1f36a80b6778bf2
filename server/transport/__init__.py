"""HTTP below the API: request bodies, server-sent events, disconnects, API keys, error responses."""
