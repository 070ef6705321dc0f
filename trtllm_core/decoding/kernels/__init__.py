"""Triton kernels of the decoding floor. Importing a file of this package imports Triton, which is optional."""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def has_triton() -> bool:
    """Whether the files of this package can be imported."""
    return find_spec("triton") is not None


def takes(tensor: torch.Tensor) -> bool:
    """Whether a tensor's work is the kernels', and not that of their plain twins."""
    return tensor.is_cuda and has_triton()
