"""PyTorch's threads on the host, where an engine has threads of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FEW = 1 << 18
"""Elements below which one thread is as good as several: two rows of a large vocabulary."""


@contextmanager
def few_threads(apart: bool, elements: int) -> Iterator[None]:
    """PyTorch on one thread for little work, where ``apart``: the engine computes on threads of its own.

    OpenMP's threads wait actively for a while after each operation that they shared. They would do so on the cores that
    the engine's threads need for the next step, which then takes half as long again.
    """
    threads = torch.get_num_threads()
    if not apart or elements > FEW or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
