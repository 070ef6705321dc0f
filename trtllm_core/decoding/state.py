"""State that is kept by slot: what device plugins share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trtllm_core.plugin.views import CommitBatch, LogitsBatch


def per_row(values: torch.Tensor, batch: LogitsBatch, neutral: float) -> torch.Tensor:
    """Values of a step's rows as a column.

    Args:
        values: ``[slots]``, one number a slot.
        neutral: what rows get that are not ``active``: the number at which the plugin changes nothing.

    Returns:
        ``[n, 1]``, of the dtype of ``values``.
    """
    # Indexing by a tensor, as in values[batch.slot], costs the host several times as much.
    return torch.where(batch.active, values.index_select(0, batch.slot), neutral).unsqueeze(1)


def copy_slots(src: torch.Tensor, dst: torch.Tensor, *states: torch.Tensor) -> None:
    """Copy rows ``src`` of each tensor to rows ``dst`` (int64 ``[m]``), all at the same time."""
    for state in states:
        state[dst] = state[src]  # the right side is a new tensor before anything is written


class Everybody:
    """bool ``[n]``, all true: the same memory each time.

    Args:
        rows: as many as there mostly are at most.
        device: of the tensor.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._flags = torch.ones(rows, dtype=torch.bool, device=device)
        self._wide = self._flags  # for more rows than those; apart, because graphs hold the address of the others
        self._count, self._view = rows, self._flags

    def of(self, count: int) -> torch.Tensor:
        """For ``count`` rows. Read-only."""
        if count != self._count:
            if count > len(self._wide):
                self._wide = self._flags.new_ones(1 << (count - 1).bit_length())
            flags = self._flags if count <= len(self._flags) else self._wide
            self._count, self._view = count, flags[:count]
        return self._view


def accepted(batch: CommitBatch) -> torch.Tensor:
    """bool ``[n, k]``: which entries of ``batch.tokens`` are tokens, of rows that are ``active``."""
    if batch.tokens.shape[1] == 1:  # outside of verify steps, all of them
        return ((batch.counts > 0) & batch.active).unsqueeze(1)
    column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return (column < batch.counts.unsqueeze(1)) & batch.active.unsqueeze(1)


class SlotTable:
    """Lists of numbers, one list (or list of lists) for each slot, in one padded tensor.

    The tensor grows when a longer list comes and is then another one, so a plugin that keeps a table names
    ``table.shape`` in its ``graph_key``.

    Args:
        slots: how many there are.
        device: of the tensor.
        fill: pads shorter lists.
        depth: 1 for a list of numbers for each slot, 2 for a list of lists.
        dtype: of the tensor.
    """

    def __init__(
        self, slots: int, device: torch.device, fill: float, depth: int = 1, dtype: torch.dtype = torch.int64
    ) -> None:
        self._fill = fill
        self.rows = torch.full((slots, *[1] * depth), fill, dtype=dtype, device=device)
        """``[slots, width]``, or ``[slots, lists, width]``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes within one slot."""
        return tuple(self.rows.shape[1:])

    def write(self, slot: int, values: Sequence[float] | Sequence[Sequence[float]]) -> None:
        """Set the list of a slot."""
        lists = [value for value in values if isinstance(value, Sequence)]
        self._grow((len(values), max(map(len, lists), default=1))[: len(self.shape)])
        row = torch.full(self.shape, self._fill, dtype=self.rows.dtype)
        if lists:
            for i, value in enumerate(lists):
                row[i, : len(value)] = torch.tensor(value, dtype=row.dtype)
        elif values:
            row[: len(values)] = torch.tensor(values, dtype=row.dtype)
        self.rows[slot] = row.to(self.rows.device, non_blocking=True)

    def _grow(self, wanted: tuple[int, ...]) -> None:
        if all(size <= have for size, have in zip(wanted, self.shape, strict=True)):
            return
        # Powers of two, so that growth, and with it the capture of new graphs, is rare.
        shape = [max(have, 1 << (size - 1).bit_length()) for size, have in zip(wanted, self.shape, strict=True)]
        rows = self.rows.new_full((self.rows.shape[0], *shape), self._fill)
        rows[tuple(slice(size) for size in self.rows.shape)] = self.rows
        self.rows = rows
