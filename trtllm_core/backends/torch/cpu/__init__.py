"""Kernels of our own for decoding on a CPU, compiled for the machine that they run on."""
