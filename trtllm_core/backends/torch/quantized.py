"""Products with quantised weights on the torch backend, chosen when an engine is loaded."""

from __future__ import annotations

import torch
from torch import nn

from trtllm_core.backends.torch.cpu.kernels import Kernels, Quantized
from trtllm_core.nn import Linear
from trtllm_core.nn.linear import MatMul
from trtllm_core.nn.quantized import weight_of
from trtllm_core.quantize import QuantizedWeight

DIRECT_UP_TO = 8
"""Rows up to which the compiled product reads codes. From there on weights are dequantised, piece by piece, for
PyTorch's own product: arithmetic counts there, and its is faster."""

PIECE = 1 << 20
"""Elements that are dequantised at a time: what a core's cache holds."""


def use_products(module: nn.Module, product: MatMul, kernels: Kernels | None) -> None:
    """Give every quantised layer the product that suits the machine.

    Args:
        module: weights in place.
        product: with weights in the engine's dtype.
        kernels: compiled; None: PyTorch alone, which dequantises the weight in every call.
    """
    for layer in module.modules():
        if isinstance(layer, Linear) and layer.quantized is not None:
            weight = weight_of(layer)
            layer.matmul = (
                PiecewiseProduct(weight, product) if kernels is None else NativeProduct(weight, kernels, product)
            )


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


class NativeProduct:
    """See ``MatMul``. Reads codes for few rows, and dequantises pieces of the weight for many, by compiled kernels."""

    def __init__(self, weight: QuantizedWeight, kernels: Kernels, product: MatMul) -> None:
        self._kernels, self._product = kernels, product
        self._memory = _with_offsets(weight)  # the structures point into it
        self._bases = _bases(self._memory)
        self._whole = _structure(self._memory, self._bases)
        self._pieces = [_structure(piece) for piece in _pieces(self._memory)]
        self._most = DIRECT_UP_TO * self._whole.inputs

    def __call__(self, x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x [..., in] -> [..., out]``."""
        if x.numel() <= self._most:
            return self._kernels.quantized_linear(self._whole, x, bias)
        parts = [self._product(x, self._kernels.dequantize(piece), None) for piece in self._pieces]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if bias is None else out + bias


def _pieces(weight: QuantizedWeight) -> list[QuantizedWeight]:
    out, groups = weight.scales.shape
    rows = max(1, PIECE // (groups * weight.layer.group_size))
    return [weight.rows(slice(first, first + rows)) for first in range(0, out, rows)]


def _with_offsets(weight: QuantizedWeight) -> QuantizedWeight:
    """Zero points as offsets, ``-scale * zero_point``: one form less for kernels, at 4 bytes a group."""
    if weight.zero_points is None:
        return weight
    zeros = weight.zeros()
    assert isinstance(zeros, torch.Tensor)
    how = weight.layer.replace(form="offsets")
    return QuantizedWeight(how, weight.codes, weight.scales, None, -weight.scales * zeros.squeeze(-1))


def _bases(weight: QuantizedWeight) -> torch.Tensor:
    """float32 ``[out, groups]``: what a code of 0 is worth. The product of codes leaves it to a sum a group."""
    if weight.offsets is not None:
        return weight.offsets
    return weight.scales * -weight.middle


def _structure(weight: QuantizedWeight, bases: torch.Tensor | None = None) -> Quantized:
    """``bases``: for products; without, it can only be dequantised."""
    out, groups = weight.scales.shape
    symmetric = weight.offsets is None
    return Quantized(
        codes=weight.codes.data_ptr(),
        scales=weight.scales.data_ptr(),
        offsets=None if weight.offsets is None else weight.offsets.data_ptr(),
        bases=None if bases is None else bases.data_ptr(),
        out=out,
        inputs=groups * weight.layer.group_size,
        group=weight.layer.group_size,
        bits=weight.layer.bits,
        middle=weight.middle if symmetric else 0,
    )
