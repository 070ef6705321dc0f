"""Quantised weights in the order in which products read them: see ``native/tiles.h``."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

from trtllm_core.backends.torch.cpu.operations import Packed
from trtllm_core.quantize import QuantizedWeight

TILE = 16
"""Output features of a tile."""
BLOCK = 32
"""Input features of which groups are made, and that activations are rounded by."""


class PackedWeight:
    """A weight ``[out, in]`` in tiles, of which products get ``whole`` and the dequantisation ``pieces``.

    Scales and offsets are float16 where that keeps every one of them, as it does those of GGUF files.
    """

    def __init__(self, weight: QuantizedWeight, piece: int) -> None:
        how = weight.layer
        out, groups = weight.scales.shape
        self._like = Packed(
            out=out,
            inputs=groups * how.group_size,
            group=how.group_size,
            bits=how.bits,
            middle=weight.middle,
            has_offsets=how.form != "symmetric",
        )
        numbers = _numbers(weight)
        halves = all(torch.equal(one.half().float(), one) for one in numbers)
        self._like.halves = halves
        self.tiles = huge(_tiles(weight, [one.half() if halves else one for one in numbers]))
        """uint8 ``[tiles, groups, bytes]``."""
        self.whole = self._rows(0, out)
        rows = max(1, piece // (self._like.inputs * TILE)) * TILE
        self.pieces = [self._rows(first, min(first + rows, out)) for first in range(0, out, rows)]
        """Of about so many elements as were asked for."""

    def _rows(self, first: int, last: int) -> Packed:
        part = Packed.from_buffer_copy(self._like)
        part.tiles, part.out = self.tiles[first // TILE :].data_ptr(), last - first
        return part


def can_pack(weight: QuantizedWeight) -> bool:
    """Whether its codes are integers in groups of whole blocks."""
    return weight.layer.form in ("symmetric", "zero_points", "offsets") and weight.layer.group_size % BLOCK == 0


def _numbers(weight: QuantizedWeight) -> list[torch.Tensor]:
    """float32 ``[out, groups]``: scales, and offsets if codes are not symmetric. A zero point is one."""
    scales = weight.scales.float()
    if weight.offsets is not None:
        return [scales, weight.offsets.float()]
    if weight.zero_points is None:
        return [scales]
    zeros = weight.zeros()
    assert isinstance(zeros, torch.Tensor)
    return [scales, -scales * zeros.squeeze(-1)]


def _tiles(weight: QuantizedWeight, numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    out, groups = weight.scales.shape
    more = -out % TILE
    codes = _with_rows(weight.numbers(), more)
    # A word: 4 codes, or two times 4 of which the second are its upper halves.
    words = codes.view(-1, TILE, groups, weight.layer.group_size * weight.layer.bits // 32, 8 // weight.layer.bits, 4)
    words = words[..., 0, :] if weight.layer.bits == 8 else words[..., 0, :] | words[..., 1, :] << 4
    body = words.permute(0, 2, 3, 1, 4).flatten(2)
    heads = [_with_rows(one, more).view(-1, TILE, groups).transpose(1, 2) for one in numbers]
    return torch.cat((*(head.contiguous().view(torch.uint8) for head in heads), body), -1)


def _with_rows(tensor: torch.Tensor, more: int) -> torch.Tensor:
    """With so many rows of zeros behind it."""
    return torch.cat((tensor, tensor.new_zeros(more, *tensor.shape[1:]))) if more else tensor


def huge(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own, in large pages where the system gives them: less to look up for who reads it all."""
    memory = mmap.mmap(-1, max(tensor.nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a hint: some kernels are built without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    copy: torch.Tensor = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
    return copy.copy_(tensor)
