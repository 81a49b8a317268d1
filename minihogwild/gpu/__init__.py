"""The same mathematics on CUDA GPUs, fast: kernels, recorded steps, a loop that does not wait. It may stay shut."""
