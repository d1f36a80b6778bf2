"""What only the CPU has: C++ kernels, the functions that call them, packed weights, memory in huge pages."""
