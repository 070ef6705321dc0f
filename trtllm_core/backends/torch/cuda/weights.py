"""Quantised weights as the kernels read them."""

from __future__ import annotations

import torch
from torch import nn

from trtllm_core.backends.torch.cuda.kernels.coded import Codes
from trtllm_core.backends.torch.cuda.support import HOPPER
from trtllm_core.nn import Linear
from trtllm_core.nn.quantized import weight_of

SMALLEST = torch.finfo(torch.float16).tiny
"""Below it, float16 has fewer digits."""

ALIGNED = 32
"""What divides the input features: rows of codes then begin where a thread can load 16 bytes."""


def codes_of(layer: Linear) -> Codes | None:
    """The weight of a quantised layer, on a GPU; None: the kernels cannot read it. Before Hopper, PyTorch's product of
    rows of e4m3 gives bfloat16 alone, or nothing.

    Scales and offsets take two bytes each where that costs no more than a rounding of them. The layer's own ``scales``
    become those, so that nothing is held twice.
    """
    weight = weight_of(layer)
    float8 = weight.layer.form == "float8"
    out, groups = weight.scales.shape
    if groups * weight.layer.group_size % ALIGNED:
        return None
    if float8:
        device = weight.codes.device
        if out % 16 or (device.type == "cuda" and torch.cuda.get_device_capability(device) < HOPPER):
            return None
        return Codes(weight.codes, weight.scales, None, 8, weight.layer.group_size, True)
    scales, offsets, zeros = halved(weight.scales), None, weight.zeros()
    layer.scales = nn.Parameter(scales, requires_grad=False)
    if weight.offsets is not None:
        offsets = halved(weight.offsets)
        layer.offsets = nn.Parameter(offsets, requires_grad=False)
    elif isinstance(zeros, torch.Tensor):
        offsets = halved(-weight.scales.float() * zeros.squeeze(-1))
    return Codes(weight.codes, scales, offsets, weight.layer.bits, weight.layer.group_size)


def halved(numbers: torch.Tensor) -> torch.Tensor:
    """In float16, if all are in the range where it has 11 digits: those of GGUF files are, without a rounding."""
    size = numbers.abs()
    fits = ((size >= SMALLEST) | (size == 0)).all() & (size <= torch.finfo(torch.float16).max).all()
    exact = numbers.half().float() == numbers
    return numbers.half() if bool(fits) or bool(exact.all()) else numbers
