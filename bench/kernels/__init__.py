"""The compiled kernels, read and estimated without a GPU; their tiles, tuned on one."""
