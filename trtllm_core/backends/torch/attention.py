"""Attention over the paged pool with PyTorch's fused kernel."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from trtllm_core.backends.torch.batch import PackedBatch, PaddedRows, Row, causal_mask
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.nn import Attention


class PagedContext:
    """The ``AttentionContext`` of one packed, paged call."""

    def __init__(self, batch: PackedBatch, pool: KVPool, positions: torch.Tensor) -> None:
        self.positions = positions
        self.batch = batch
        self.pool = pool
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """See ``AttentionContext``. ``qkv [tokens, heads + 2 * kv_heads, head_size]``."""
        cache = self.pool.layers[layer.index]
        q, kv = qkv[:, : layer.num_heads], qkv[:, layer.num_heads :]
        cache.index_copy_(0, self.batch.write, kv)
        padded, ragged = self.batch.decode, self.batch.ragged
        if padded is not None and not ragged:
            return self._padded(layer, q, cache, padded).flatten(1)
        if padded is None and len(ragged) == 1:
            return self._row(layer, q, kv, cache, ragged[0]).flatten(1)
        out = torch.empty_like(q)
        if padded is not None:
            assert padded.tokens is not None
            out[padded.tokens] = self._padded(layer, q[padded.tokens], cache, padded)
        for row in ragged:
            out[row.tokens] = self._row(layer, q[row.tokens], kv[row.tokens], cache, row)
        return out.flatten(1)

    def _padded(self, layer: Attention, q: torch.Tensor, cache: torch.Tensor, rows: PaddedRows) -> torch.Tensor:
        # Whole blocks are gathered, as one long row each: far fewer and longer copies than entry by entry.
        blocks = cache.view(cache.shape[0] // self.batch.tokens_per_block, -1)
        kv = blocks.index_select(0, rows.blocks).view(rows.count, rows.entries, *cache.shape[1:])
        return _grouped(layer, q, kv, self._mask(-1, layer.sliding_window, rows))

    def _row(self, layer: Attention, q: torch.Tensor, kv: torch.Tensor, cache: torch.Tensor, row: Row) -> torch.Tensor:
        window = layer.sliding_window if layer.sliding_window and layer.sliding_window < row.length else None
        if row.past > 0:
            kv = row.read(cache)
        if row.queries == 1:
            return _grouped(layer, q, kv.unsqueeze(0) if window is None else kv[-window:].unsqueeze(0), None)
        if row.past == 0 and window is None:
            return _dense(layer, q, kv, None)
        return _dense(layer, q, kv, self._mask(row.tokens.start, window, row))

    def _mask(self, key: int, window: int | None, rows: Row | PaddedRows) -> torch.Tensor:
        mask = self._masks.get((key, window))
        if mask is None:
            if isinstance(rows, PaddedRows):
                mask = rows.mask(window)
            else:
                mask = causal_mask(rows, window, self.positions.device)
            self._masks[key, window] = mask
        return mask


def _grouped(layer: Attention, q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """One query a row: ``q [rows, heads, d]``, ``kv [rows, entries, 2 * kv_heads, d]`` -> ``[rows, heads, d]``.

    The queries of a group see the same keys, so they stand as if they were positions: nothing is repeated.
    """
    k, v = kv.transpose(1, 2).chunk(2, dim=1)
    grouped = q.reshape(q.shape[0], layer.num_kv_heads, -1, layer.head_size)
    return scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=layer.scale).flatten(1, 2)


def _dense(layer: Attention, q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """One sequence: ``q [queries, heads, d]``, ``kv [entries, 2 * kv_heads, d]`` -> ``[queries, heads, d]``.

    Without a mask, query i sees entries up to i.
    """
    k, v = kv.transpose(0, 1).unsqueeze(0).chunk(2, dim=1)
    out = scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=layer.scale,
        enable_gqa=layer.num_heads != layer.num_kv_heads,
    )
    return out.squeeze(0).transpose(0, 1)
