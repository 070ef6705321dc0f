"""Rounding weights to codes."""

from __future__ import annotations

import torch

from trtllm_core.config import QuantizedLayer
from trtllm_core.quantize.float8 import float8_rows
from trtllm_core.quantize.weight import QuantizedWeight, pack


def quantize(weight: torch.Tensor, layer: QuantizedLayer) -> QuantizedWeight:
    """Round a weight ``[out, in]`` (floating point) to the nearest codes, group by group.

    Symmetric codes of 8 bits reach from -127 to 127. Those of 4 bits reach from -8 to 7, where the largest element of
    a group, with its sign, is -8: so all 16 codes are used. With zero points, codes span from the smallest element to
    the largest, and 0 is one of them. Those of floating point have one group, the row, whose largest element is theirs.
    """
    if layer.form == "float8":
        numbers, scales = float8_rows(weight)
        return QuantizedWeight(layer, numbers.view(torch.uint8)[:, None], scales)
    groups = weight.float().reshape(weight.shape[0], -1, layer.group_size)
    if layer.form == "zero_points":
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = _positive((high - low) / 15)
        zeros = (-low / scales).round().clamp(0, 15)
        codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
        return QuantizedWeight(layer, pack(codes.byte()), scales, pack(zeros.byte()))
    if layer.bits == 8:
        scales = _positive(groups.abs().amax(-1) / 127)
        codes = (groups / scales[..., None]).round().clamp(-127, 127) + 128
        return QuantizedWeight(layer, codes.byte(), scales)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scales = torch.where(largest == 0, 1.0, largest / -8)
    codes = (groups / scales[..., None]).round().clamp(-8, 7) + 8
    return QuantizedWeight(layer, pack(codes.byte()), scales)


def _positive(scales: torch.Tensor) -> torch.Tensor:
    """A group of zeros has a scale too, so that nothing is divided by 0."""
    return torch.where(scales == 0, 1.0, scales)
