"""Products by PyTorch's libraries, which are the fastest for many rows."""

from __future__ import annotations

import torch
from torch.nn import functional

from trtllm_core.backends.torch.cuda.kernels.coded import Codes
from trtllm_core.backends.torch.cuda.kernels.rounded import dequantized, rounded_rows

PIECE = 1 << 26
"""Elements of a quantised weight that are in 16 bits at a time."""


def library_product(
    x: torch.Tensor, weight: torch.Tensor | Codes, bias: torch.Tensor | None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """``x Wᵀ + b + residual``, ``x [rows, in]``. A residual is overwritten with the result.

    Weights of e4m3 meet activations rounded to it, each row with a scale of its own; integers are dequantised, in every
    call, to the type of ``x``.
    """
    if isinstance(weight, torch.Tensor):
        if residual is None:
            return functional.linear(x, weight, bias)
        if bias is None:
            return residual.addmm_(x, weight.t())
        return residual.add_(functional.linear(x, weight, bias))
    y = _rounded(x, weight, bias) if weight.float8 else _dequantized(x, weight, bias)
    return y if residual is None else residual.add_(y)


def _rounded(x: torch.Tensor, weight: Codes, bias: torch.Tensor | None) -> torch.Tensor:
    numbers, scales = rounded_rows(x)
    codes = weight.codes.view(torch.float8_e4m3fn).flatten(1)
    return torch._scaled_mm(numbers, codes.t(), scales, weight.scales.t(), bias, out_dtype=x.dtype)


def _dequantized(x: torch.Tensor, weight: Codes, bias: torch.Tensor | None) -> torch.Tensor:
    out, size = weight.shape
    rows = max(1, PIECE // size)
    if out <= rows:
        return functional.linear(x, dequantized(weight, 0, out, x.dtype), bias)
    y = x.new_empty(x.shape[0], out)
    for first in range(0, out, rows):
        count = min(rows, out - first)
        piece = dequantized(weight, first, count, x.dtype)
        part = None if bias is None else bias[first : first + count]
        y[:, first : first + count] = functional.linear(x, piece, part)
    return y
