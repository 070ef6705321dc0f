"""Triton kernels of the decoding floor. Importing a file of this package imports Triton, which is optional."""
