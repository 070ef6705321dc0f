"""What one call of the module needs to know about its rows, worked out once for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from trtllm_core.plugin.kv_policy import KVPlan


def host(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values on the host; the same memory on the CPU."""
    return tensor.detach().cpu().numpy()


@dataclass(frozen=True)
class Row:
    """One sequence of a call."""

    tokens: slice
    """Its tokens in the packed input."""
    past: int
    """Tokens that were in its cache before this call."""
    length: int
    """Tokens in its cache after this call."""
    blocks: np.ndarray
    """int32: the blocks that hold them, in order."""
    tokens_per_block: int

    @property
    def queries(self) -> int:
        """Tokens of this call."""
        return self.length - self.past

    def read(self, cache: torch.Tensor) -> torch.Tensor:
        """The row's part of a layer's cache ``[entries, ...] -> [length, ...]``: a view where its blocks are
        neighbours."""
        if self._run is not None:
            return cache[self._run]
        blocks = cache.view(-1, self.tokens_per_block, *cache.shape[1:])
        return blocks[torch.from_numpy(self.blocks).to(cache.device)].flatten(0, 1)[: self.length]

    @cached_property
    def _run(self) -> slice | None:
        if len(self.blocks) > 1 and (np.diff(self.blocks) != 1).any():
            return None
        start = int(self.blocks[0]) * self.tokens_per_block
        return slice(start, start + self.length)


class PackedBatch:
    """Rows of a packed, paged call, split into those that run one token and those that run several."""

    def __init__(self, inputs: Mapping[str, torch.Tensor], plan: KVPlan, device: torch.device) -> None:
        lengths = host(inputs["query_lengths"])
        past = host(inputs["past_lengths"])
        self.tables = host(inputs["block_tables"])
        self.device = device
        self.tokens_per_block = size = plan.tokens_per_block
        ends = np.cumsum(lengths)
        after = past + lengths
        self.rows = [
            Row(slice(int(e - n), int(e)), int(p), int(p + n), self.tables[i, : -(-int(p + n) // size)], size)
            for i, (e, n, p) in enumerate(zip(ends, lengths, past, strict=True))
        ]
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        entry = np.arange(len(row_of)) - np.repeat(ends - lengths - past, lengths)
        self.write = self.to_device(self.tables[row_of, entry // size].astype(np.int64) * size + entry % size)
        self.single = lengths == 1
        self.after = after

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """The array as a tensor on the device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    @cached_property
    def decode(self) -> PaddedRows | None:
        """The rows with one token, padded to the longest; None when there are fewer than two."""
        rows = np.flatnonzero(self.single)
        if len(rows) < 2:
            return None
        blocks = -(-int(self.after[rows].max()) // self.tokens_per_block)
        tables = np.maximum(self.tables[rows, :blocks], 0).astype(np.int64)
        starts = np.array([self.rows[i].tokens.start for i in rows])
        return PaddedRows(
            tokens=None if len(rows) == len(self.rows) else self.to_device(starts),
            blocks=self.to_device(tables.reshape(-1)),
            lengths=self.to_device(self.after[rows].astype(np.int64)),
            count=len(rows),
            entries=blocks * self.tokens_per_block,
        )

    @cached_property
    def ragged(self) -> list[Row]:
        """The rows that are attended one by one."""
        return (
            self.rows if self.decode is None else [r for r, one in zip(self.rows, self.single, strict=True) if not one]
        )


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """Rows of one token each, whose caches are gathered to one length."""

    tokens: torch.Tensor | None
    """int64 ``[count]``: their tokens in the packed input; None: they are all of it, in order."""
    blocks: torch.Tensor
    """int64 ``[count * blocks]``."""
    lengths: torch.Tensor
    """int64 ``[count]``."""
    count: int
    entries: int

    def mask(self, window: int | None) -> torch.Tensor:
        """bool ``[count, 1, 1, entries]``: what each row's query sees."""
        entry = torch.arange(self.entries, device=self.lengths.device)
        seen = entry < self.lengths[:, None]
        if window is not None:
            seen &= entry >= self.lengths[:, None] - window
        return seen[:, None, None]


def causal_mask(row: Row, window: int | None, device: torch.device) -> torch.Tensor:
    """bool ``[queries, length]``: query i stands at position ``past + i`` and sees up to itself."""
    position = torch.arange(row.past, row.length, device=device)[:, None]
    entry = torch.arange(row.length, device=device)
    seen = entry <= position
    if window is not None:
        seen &= entry > position - window
    return seen
