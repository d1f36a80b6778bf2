"""Methods by which visual tokens leave the residual stream at a layer of the decoder. One file each."""
