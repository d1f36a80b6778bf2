"""Methods that drop visual tokens at a layer of the decoder: one method, one file."""
