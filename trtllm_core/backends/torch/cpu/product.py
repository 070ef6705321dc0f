"""Products with quantised weights by compiled kernels."""

from __future__ import annotations

import torch

from trtllm_core.backends.torch.cpu.kernels import Kernels
from trtllm_core.backends.torch.cpu.packed import BLOCK, PackedWeight
from trtllm_core.nn.linear import MatMul
from trtllm_core.quantize import QuantizedWeight

DIRECT_UP_TO = 64
"""Rows up to which the compiled product reads codes. From there on weights are dequantised, piece by piece, for
PyTorch's own product, which catches up with more rows, and does not round prompts."""

PIECE = 1 << 20
"""Elements that are dequantised at a time: what a core's cache holds."""


class PackedProduct:
    """See ``MatMul``. Reads codes for few rows, and dequantises pieces of the weight for many.

    Args:
        weight: copied in the order in which it is read.
        product: with weights in the engine's dtype.
        rounds: activations to 8 bits, for few rows.
    """

    def __init__(self, weight: QuantizedWeight, kernels: Kernels, product: MatMul, rounds: bool) -> None:
        self.weight = PackedWeight(weight, PIECE)
        self.rounds = rounds
        self._kernels, self._product = kernels, product
        self._most = DIRECT_UP_TO * self.weight.whole.inputs

    def __call__(self, x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., in] -> [..., out]``."""
        if x.numel() <= self._most:
            return self._kernels.linear(self.weight.whole, x, bias, None, self.rounds)
        parts = [self._product(x, self._kernels.dequantize(piece), None) for piece in self.weight.pieces]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if bias is None else out + bias

    def add(self, x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See ``AddMatMul``. Into memory of its own, as programs need it."""
        if x.numel() <= self._most:
            return self._kernels.linear(self.weight.whole, x, bias, residual, self.rounds)
        return residual + self(x, residual, bias)

    def lookup(self, input_ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """Rows of the table: ``input_ids [...] -> [..., in]``."""
        return self._kernels.lookup(self.weight.whole, input_ids.int())


def rounded(x: torch.Tensor) -> torch.Tensor:
    """float64 of ``x``'s shape: what products with ``rounds`` see of it. Their twin, over PyTorch."""
    blocks = x.double().view(*x.shape[:-1], -1, BLOCK)
    most = blocks.abs().amax(-1, keepdim=True).float()
    codes = (blocks * (127 / most).double()).round()
    return torch.where(most > 0, codes * (most / 127).double(), 0.0).flatten(-2)
