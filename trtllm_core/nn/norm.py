"""Normalisation layers, computed in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from trtllm_core.nn.layer import Layer

Norm = Callable[[torch.Tensor], torch.Tensor]
"""``x [..., size] ->`` same shape and dtype."""


class RMSNorm(Layer):
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension.

    ``kernel`` may be put in place by a backend, as ``Linear.matmul`` may; it brings its own weight.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.shape = (size,)
        self.eps = eps
        self.kernel: Norm | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., size] ->`` same shape and dtype."""
        if self.kernel is not None:
            return self.kernel(x)
        return functional.rms_norm(x, self.shape, self.weight, self.eps)


class LayerNorm(Layer):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension. ``kernel`` is as of ``RMSNorm``."""

    def __init__(self, size: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None
        self.shape = (size,)
        self.eps = eps
        self.kernel: Norm | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., size] ->`` same shape and dtype."""
        if self.kernel is not None:
            return self.kernel(x)
        return functional.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
