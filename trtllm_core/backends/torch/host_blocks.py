"""Blocks of the KV pool that lie in the host's memory, to come back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

STAGED = 64 << 20
"""Bytes that are brought together on the device at a time, between the pool and the host."""


class HostBlocks:
    """Room for blocks beside a pool, a block's layers one after another; pinned where the pool is on CUDA.

    Copies are queued on the current stream: what is written to the pool afterwards comes after them, and so does a copy
    back of what was just copied out.

    Args:
        parts: of the pool, each ``[layers, blocks, ...]``, the bytes of a layer's block together.
        count: blocks that there is room for.
    """

    def __init__(self, parts: Sequence[torch.Tensor], count: int) -> None:
        self._device = [part.flatten(2).view(torch.uint8) for part in parts]
        pin = parts[0].is_cuda
        self._host = [
            torch.empty(count, part.shape[0], part.shape[2], dtype=torch.uint8, pin_memory=pin) for part in self._device
        ]
        self._step = max(1, STAGED // sum(part.shape[0] * part.shape[2] for part in self._device))

    @property
    def bytes(self) -> int:
        """Bytes of the room."""
        return sum(part.nbytes for part in self._host)

    def save(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of the pool to places here: (block, place)."""
        for start in range(0, len(pairs), self._step):
            some = pairs[start : start + self._step]
            for device, host in zip(self._device, self._host, strict=True):
                blocks = torch.tensor([block for block, _ in some], device=device.device)
                staged = device.index_select(1, blocks).transpose(0, 1).contiguous()
                for number, (_, place) in enumerate(some):
                    host[place].copy_(staged[number], non_blocking=True)

    def load(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy places here to blocks of the pool: (place, block)."""
        for start in range(0, len(pairs), self._step):
            some = pairs[start : start + self._step]
            for device, host in zip(self._device, self._host, strict=True):
                staged = torch.empty(len(some), *host.shape[1:], dtype=torch.uint8, device=device.device)
                for number, (place, _) in enumerate(some):
                    staged[number].copy_(host[place], non_blocking=True)
                blocks = torch.tensor([block for _, block in some], device=device.device)
                device.index_copy_(1, blocks, staged.transpose(0, 1))
