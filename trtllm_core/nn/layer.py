"""The base of all layers."""

from __future__ import annotations

from typing import Any

from torch import nn


class Layer(nn.Module):
    """A module that only ever runs forward.

    What ``nn.Module`` does around ``forward``, for hooks and tracing, takes some microseconds; a token passes through
    hundreds of layers. So calling a layer is calling its ``forward``, and hooks do not run.
    """

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)
