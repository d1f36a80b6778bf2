"""What every folder of the server uses: errors, the shapes of requests and replies, budget fields, metrics. No HTTP."""
