"""What only CUDA has: `kernels/cuda/<operation>.py` is the `cuda` version of an operation."""
