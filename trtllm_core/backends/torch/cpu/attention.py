"""Attention of a decode step in one call a layer: rotation, the cache's new entry, scores, and the weighted sum."""

from __future__ import annotations

import numpy as np
import torch

from trtllm_core.backends.torch.attention import PagedContext
from trtllm_core.backends.torch.batch import PackedBatch
from trtllm_core.backends.torch.cpu.kernels import Kernels
from trtllm_core.backends.torch.cpu.operations import Heads, Rows
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.nn import Attention

MOST_HEAD_SIZE = 256


class DecodeAttention:
    """The kernel and what it needs to know of each layer.

    Layers with biases of distance or capped scores are left to ``PagedContext``, and so are rings.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self._heads: dict[Attention, Heads | None] = {}

    def heads(self, layer: Attention) -> Heads | None:
        """What the kernel is told of a layer; None: it is not for that one."""
        if layer not in self._heads:
            self._heads[layer] = _heads(layer) if _can(layer, self.kernels.dtype) else None
        return self._heads[layer]

    def context(self, batch: PackedBatch, pool: KVPool, positions: torch.Tensor) -> PagedContext:
        """The context of one call."""
        if pool.plan.window is None and batch.single.all():
            return DecodeContext(batch, pool, positions, self)
        return PagedContext(batch, pool, positions)


class DecodeContext(PagedContext):
    """Of a call in which every row runs one token."""

    def __init__(self, batch: PackedBatch, pool: KVPool, positions: torch.Tensor, attention: DecodeAttention) -> None:
        super().__init__(batch, pool, positions)
        self._attention = attention
        lengths = batch.after.astype(np.int64)
        self._kept = (batch.tables, lengths, positions)  # the structure holds their addresses alone
        self._entries = int(lengths.sum())
        tables = batch.tables
        assert tables.strides[1] == tables.itemsize == 4, "block tables are int32, row by row"
        self._rows = Rows(
            tables.ctypes.data,
            lengths.ctypes.data,
            positions.data_ptr(),
            len(tables),
            tables.strides[0] // tables.itemsize,
            batch.tokens_per_block,
        )

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """See ``AttentionContext``."""
        heads = self._attention.heads(layer)
        if heads is None:
            return super().attend(layer, qkv)
        work = self._entries * layer.num_heads * layer.head_size
        return self._attention.kernels.attend(self._rows, heads, qkv, self.pool.layers[layer.index], work)


def _can(layer: Attention, dtype: torch.dtype) -> bool:
    rotary = layer.rotary is None or (layer.rotary.table is not None and layer.rotary.table.dtype == dtype)
    return rotary and layer.alibi is None and layer.softcap is None and layer.head_size <= MOST_HEAD_SIZE


def _heads(layer: Attention) -> Heads:
    rotary = layer.rotary
    table = None if rotary is None or rotary.table is None else rotary.table.data_ptr()
    dim, window = 0 if rotary is None else rotary.dim, layer.sliding_window or 0
    return Heads(table, layer.num_heads, layer.num_kv_heads, layer.head_size, dim, window, layer.scale)
