"""Floating-point numbers of 8 bits: e4m3, four bits of exponent and three of mantissa, from -448 to 448."""

from __future__ import annotations

import torch

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest of them. What is larger would not be a number."""


def float8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows, each with the scale that makes its largest element the largest of the type.

    Args:
        x: floating point ``[..., size]``.

    Returns:
        The numbers, ``float8_e4m3fn [..., size]``, and the scales, float32 ``[..., 1]``: a row is worth their product.
        A row of zeros has the scale 1.
    """
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True) / LARGEST
    scales = torch.where(scales == 0, 1.0, scales)
    return (wide / scales).clamp(-LARGEST, LARGEST).to(FLOAT8), scales
