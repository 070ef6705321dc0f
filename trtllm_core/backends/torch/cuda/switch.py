"""Whether layers run the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Switch:
    """On while a graph is captured, and off in between.

    Launching a Triton kernel takes the host several times as long as launching one of PyTorch's. In a graph nobody
    waits for that; outside, where the host hardly keeps up with the GPU anyway, it would cost more than it saves.
    """

    def __init__(self) -> None:
        self.on = False

    @contextmanager
    def turned_on(self) -> Iterator[None]:
        """On, for as long as this lasts."""
        self.on = True
        try:
            yield
        finally:
            self.on = False
