"""PyTorch on CPU and CUDA: packed ragged input over a paged KV pool."""
