"""The protocols of amsoftmax_kernels.evaluation on features that are in files."""
