"""A quantised weight as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from trtllm_core.config import QuantizedLayer
from trtllm_core.quantize.float8 import FLOAT8


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A linear layer's weight ``[out, in]`` in groups of neighbouring input features.

    Codes are unsigned and lie as ONNX Runtime's MatMulNBits reads them, so that it maps an engine's file: two codes of
    4 bits in a byte, the first in its lower half. ``middle`` (8 or 128) is what a symmetric code is counted from. Codes
    of the form ``float8`` are numbers as they are.
    """

    layer: QuantizedLayer
    codes: torch.Tensor
    """uint8 ``[out, groups, group_size * bits / 8]``."""
    scales: torch.Tensor
    """Floating point ``[out, groups]``."""
    zero_points: torch.Tensor | None = None
    """uint8 ``[out, ceil(groups * bits / 8)]``, packed as codes are; of the form ``zero_points``."""
    offsets: torch.Tensor | None = None
    """As ``scales``; of the form ``offsets``: a code is worth ``scale * code + offset``."""

    @property
    def middle(self) -> int:
        """What a symmetric code is counted from."""
        return 1 << (self.layer.bits - 1)

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors, by field."""
        found = {"codes": self.codes, "scales": self.scales, "zero_points": self.zero_points, "offsets": self.offsets}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of(cls, layer: QuantizedLayer, parts: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """From what ``parts`` gave."""
        return cls(layer, **parts)

    def numbers(self) -> torch.Tensor:
        """The codes one by one: ``[out, groups, group_size]``, uint8 or, of the form ``float8``, ``float8_e4m3fn``."""
        if self.layer.form == "float8":
            return self.codes.view(FLOAT8)
        return self.codes if self.layer.bits == 8 else unpack(self.codes)

    def dequantize(self, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
        """float32 ``[out, in]``, or the ``rows`` of it, which may be indices of any shape."""
        picked = self if rows is None else self.rows(rows)
        scales = picked.scales.float()[..., None]
        numbers = picked.numbers().float()
        if picked.offsets is not None:  # GGUF's order of operations, so that not a bit differs
            values = scales * numbers + picked.offsets.float()[..., None]
        else:
            values = scales * (numbers - picked.zeros())
        return values.flatten(-2)

    def zeros(self) -> torch.Tensor | int:
        """What codes are counted from: float32 ``[..., groups, 1]``, or the same for all."""
        if self.layer.form == "float8":
            return 0
        if self.zero_points is None:
            return self.middle
        packed = self.zero_points
        each = packed if self.layer.bits == 8 else unpack(packed)[..., : self.scales.shape[-1]]
        return each.float()[..., None]

    def rows(self, which: slice | torch.Tensor) -> QuantizedWeight:
        """Some output features."""
        return QuantizedWeight(self.layer, **{name: part[which] for name, part in self.parts().items()})

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedWeight:
        """Each tensor changed: moved, or cast."""
        return QuantizedWeight(self.layer, **{name: change(part) for name, part in self.parts().items()})


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 to 15, uint8 ``[..., n] -> [..., ceil(n / 2)]``."""
    if numbers.shape[-1] % 2:
        numbers = torch.nn.functional.pad(numbers, (0, 1))
    return numbers[..., ::2] | (numbers[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """``[..., n] -> [..., 2 n]``: the inverse of ``pack``."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def part_shapes(layer: QuantizedLayer, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that store a weight ``[out, in]``."""
    out, inputs = shape
    groups = inputs // layer.group_size
    shapes: dict[str, tuple[int, ...]] = {
        "codes": (out, groups, layer.group_size * layer.bits // 8),
        "scales": (out, groups),
    }
    if layer.form == "zero_points":
        shapes["zero_points"] = (out, -(-groups * layer.bits // 8))
    elif layer.form == "offsets":
        shapes["offsets"] = (out, groups)
    return shapes
