"""The same mathematics on CUDA GPUs, fast: kernels, recorded steps, a loop that does not wait; and on several of them.

It may stay shut.
"""
