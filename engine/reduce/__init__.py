"""Which visual tokens, or which weighted sums of them, enter the language model: one method, one file."""
