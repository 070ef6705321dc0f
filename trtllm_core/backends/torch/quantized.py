"""Products with quantised weights on the torch backend, chosen when an engine is loaded."""

from __future__ import annotations

import torch
from torch import nn

from trtllm_core.nn import Linear
from trtllm_core.nn.linear import MatMul
from trtllm_core.nn.quantized import PlainProduct
from trtllm_core.quantize import QuantizedWeight, float8_rows

PIECE = 1 << 20
"""Elements that are dequantised at a time: what a core's cache holds."""


def use_products(module: nn.Module, product: MatMul) -> None:
    """Give every quantised layer that still has the plain product one that needs less memory.

    Args:
        module: weights in place.
        product: with weights in the engine's dtype.
    """
    for layer in module.modules():
        if isinstance(layer, Linear) and isinstance(layer.matmul, PlainProduct):
            layer.matmul = PiecewiseProduct(layer.matmul.weight, product)


class RoundedProduct(PlainProduct):
    """With activations rounded like weights of the form ``float8``, each row for itself: what a GPU computes for many
    rows. The twin that it is tested against, and what tells what it costs."""

    def __call__(self, x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., in] -> [..., out]``."""
        numbers, scales = float8_rows(x)
        return super().__call__((numbers.float() * scales).to(x.dtype), _, bias)


class PiecewiseProduct:
    """See ``MatMul``. Dequantises some output features at a time, on whatever device the weight is."""

    def __init__(self, weight: QuantizedWeight, product: MatMul) -> None:
        self._pieces = _pieces(weight)
        self._product = product

    def __call__(self, x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., in] -> [..., out]``."""
        parts = [self._product(x, piece.dequantize().to(x.dtype), None) for piece in self._pieces]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if bias is None else out + bias


def _pieces(weight: QuantizedWeight) -> list[QuantizedWeight]:
    out, groups = weight.scales.shape
    rows = max(1, PIECE // (groups * weight.layer.group_size))
    return [weight.rows(slice(first, first + rows)) for first in range(0, out, rows)]
