"""What makes decoding fast on CUDA: captured graphs of a step, and Triton kernels for what torch has none."""
