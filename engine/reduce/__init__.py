"""Reducing visual tokens before the decoder: contract, budgets, compositions, cuts. The methods are in methods/."""
