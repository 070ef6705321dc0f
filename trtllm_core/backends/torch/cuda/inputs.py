"""The inputs of a decode step where a captured graph reads them: one packed copy from the host a step."""

from __future__ import annotations

import numpy as np
import torch

from trtllm_core.backends.torch.cuda.kernels.rows import DecodeRows

PINNED = 4
"""Host buffers in turn: a step may be on its way to the device while the next ones are written."""

_ALIGNED = 4  # each part begins at a multiple of 16 bytes


class DecodeInputs:
    """One int32 buffer on the device, laid out anew for each bucket of rows:

    ``width, last, -, - | ids [bucket] | positions [bucket] | past [bucket] | tables [rows * width]``

    The parts' places depend on the bucket alone, so that a graph can be captured over them. ``width`` is the longest
    row's number of blocks, which kernels read: nobody copies the empty part of a table.

    Args:
        rows: most rows of a step.
        entries: most blocks of all its tables.
        device: where.
    """

    def __init__(self, rows: int, entries: int, device: torch.device) -> None:
        size = _ALIGNED + 3 * _aligned(rows) + entries
        self.device = device
        self.buffer = torch.zeros(size, dtype=torch.int32, device=device)
        pin = device.type == "cuda"
        self._host = [torch.zeros(size, dtype=torch.int32, pin_memory=pin) for _ in range(PINNED)]
        self._arrays = [tensor.numpy() for tensor in self._host]
        self._sent = [torch.cuda.Event() for _ in range(PINNED)] if pin else []  # type: ignore[no-untyped-call]
        self._turn = 0

    def ids(self, bucket: int) -> torch.Tensor:
        """int32 ``[bucket]``: the rows' tokens."""
        return self.buffer[_ALIGNED : _ALIGNED + bucket]

    @property
    def last(self) -> torch.Tensor:
        """int32 ``[1]``: the number of the last row."""
        return self.buffer[1:2]

    def rows(self, bucket: int, longest: int) -> DecodeRows:
        """Where a graph of this bucket reads the rest; ``longest`` as of ``DecodeRows``."""
        step = _aligned(bucket)
        positions, past, tables = (_ALIGNED + n * step for n in (1, 2, 3))
        return DecodeRows(
            past=self.buffer[past : past + bucket],
            positions=self.buffer[positions : positions + bucket],
            tables=self.buffer[tables:],
            width=self.buffer[:1],
            longest=longest,
        )

    def clear(self, bucket: int) -> None:
        """No row at all: what is captured then runs without touching a cache."""
        self.buffer.zero_()
        self.rows(bucket, 0).past.fill_(-1)

    def send(
        self,
        bucket: int,
        ids: np.ndarray | torch.Tensor,
        positions: np.ndarray,
        past: np.ndarray,
        tables: np.ndarray,
        tokens_per_block: int,
    ) -> None:
        """Put a step's rows in place, in the order of the current stream. Rows up to ``bucket`` become none.

        Args:
            bucket: at least as many as there are rows.
            ids: ``[rows]``; a tensor on the device stays there.
            positions, past: ``[rows]``.
            tables: ``[rows, blocks]``, or of one sequence to which all rows belong.
            tokens_per_block: of the pool.
        """
        turn = self._turn = (self._turn + 1) % PINNED
        array, count, step = self._arrays[turn], len(past), _aligned(bucket)
        if self._sent:
            self._sent[turn].synchronize()  # PINNED steps ago: done long since
        array[0] = width = int(past.max()) // tokens_per_block + 1
        array[1] = count - 1
        array[_ALIGNED : _ALIGNED + 2 * step] = 0
        if isinstance(ids, np.ndarray):
            array[_ALIGNED : _ALIGNED + count] = ids
        start = _ALIGNED + step
        array[start : start + count] = positions
        start += step
        array[start : start + count] = past
        array[start + count : start + step] = -1
        start += step
        end = start + len(tables) * width
        array[start:end].reshape(len(tables), width)[:] = tables[:, :width]
        self.buffer[:end].copy_(self._host[turn][:end], non_blocking=True)
        if isinstance(ids, torch.Tensor):
            self.ids(bucket)[:count].copy_(ids, non_blocking=True)
        if self._sent:
            self._sent[turn].record()


def _aligned(rows: int) -> int:
    return -(-rows // _ALIGNED) * _ALIGNED
