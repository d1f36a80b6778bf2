"""Requests to tokens: scheduler, paged cache, models and the families of methods. Knows no HTTP."""
