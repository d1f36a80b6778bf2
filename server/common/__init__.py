"""Code shared by all folders of the server: errors, request and reply models, budget fields, metrics. No HTTP."""
