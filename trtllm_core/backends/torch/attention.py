"""Attention over the paged pool with PyTorch's fused kernel."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from trtllm_core.backends.torch.batch import PackedBatch, PaddedRows, Row, causal_mask, ring_mask, token_numbers
from trtllm_core.backends.torch.biases import capped_attention, causal_bias, masked_bias
from trtllm_core.backends.torch.layer_cache import LayerCache
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.nn import Alibi, Attention, RotaryEmbedding, rotate_


class PagedContext:
    """The ``AttentionContext`` of one packed, paged call."""

    def __init__(self, batch: PackedBatch, pool: KVPool, positions: torch.Tensor) -> None:
        self.positions = positions
        self.batch = batch
        self.pool = pool
        self._ropes: dict[RotaryEmbedding, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[tuple[int, int | None, Alibi | None], torch.Tensor] = {}

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """See ``AttentionContext``. ``qkv [tokens, heads + 2 * kv_heads, head_size]``."""
        self._rotate(layer, qkv)
        cache = self.pool.layers[layer.index]
        q, kv = qkv[:, : layer.num_heads], qkv[:, layer.num_heads :]
        padded, ragged = self.batch.decode, self.batch.ragged
        # What a ring overwrites with the tokens of this call, the first of them still see.
        past = {row.tokens.start: row.read_past(cache) for row in ragged if row.wraps and row.queries > 1}
        kv = self.batch.store(cache, kv)
        if padded is not None and not ragged:
            return self._padded(layer, q, cache, padded).flatten(1)
        if padded is None and len(ragged) == 1:
            return self._row(layer, q, kv, cache, ragged[0], past).flatten(1)
        out = torch.empty_like(q)
        if padded is not None:
            assert padded.tokens is not None
            out[padded.tokens] = self._padded(layer, q[padded.tokens], cache, padded)
        for row in ragged:
            out[row.tokens] = self._row(layer, q[row.tokens], kv[row.tokens], cache, row, past)
        return out.flatten(1)

    def _rotate(self, layer: Attention, qkv: torch.Tensor) -> None:
        if layer.rotary is None:
            return
        rope = self._ropes.get(layer.rotary)
        if rope is None:
            rope = self._ropes[layer.rotary] = layer.rotary(self.positions)
        rotate_(qkv, layer.num_heads + layer.num_kv_heads, *rope)

    def _padded(self, layer: Attention, q: torch.Tensor, cache: LayerCache, rows: PaddedRows) -> torch.Tensor:
        kv = cache.blocks(rows.blocks).view(rows.count, rows.entries, 2 * layer.num_kv_heads, layer.head_size)
        return _grouped(layer, q, kv, self._mask(layer, layer.sliding_window, rows))

    def _row(
        self,
        layer: Attention,
        q: torch.Tensor,
        kv: torch.Tensor,
        cache: LayerCache,
        row: Row,
        past: dict[int, torch.Tensor],
    ) -> torch.Tensor:
        window = layer.sliding_window if layer.sliding_window and layer.sliding_window < row.length else None
        if row.wraps and row.queries > 1:
            return _dense(layer, q, torch.cat((past[row.tokens.start], kv)), self._mask(layer, window, row))
        if row.past > 0:
            kv = row.read(cache)
        if row.queries == 1:
            mask = None
            if layer.alibi is not None or (window is not None and row.wraps):
                mask = self._mask(layer, window, row)
            if window is not None and not row.wraps:
                kv, mask = kv[-window:], None if mask is None else mask[..., -window:]
            return _grouped(layer, q, kv.unsqueeze(0), mask)
        if row.past == 0 and window is None and layer.alibi is None:
            return _dense(layer, q, kv, None)
        return _dense(layer, q, kv, self._mask(layer, window, row))

    def _mask(self, layer: Attention, window: int | None, rows: Row | PaddedRows) -> torch.Tensor:
        """What ``rows`` see in layers with this window, with the biases of its ALiBi: made once for all of them."""
        key = (rows.tokens.start if isinstance(rows, Row) else -1, window, layer.alibi)
        mask = self._masks.get(key)
        if mask is None:
            mask = self._masks[key] = self._made(layer, window, rows)
        return mask

    def _made(self, layer: Attention, window: int | None, rows: Row | PaddedRows) -> torch.Tensor:
        dtype, device = self.pool.dtype, self.positions.device
        if isinstance(rows, PaddedRows):
            seen = rows.mask(window)
            if layer.alibi is None:
                return seen
            bias = masked_bias(layer.alibi, rows.offsets(), seen.squeeze(1), dtype)
            return bias.view(rows.count, layer.num_kv_heads, -1, rows.entries)
        if rows.wraps:
            return self._ring(layer, window, rows)
        if layer.alibi is None:
            return causal_mask(rows, window, device)
        return causal_bias(layer.alibi, rows.queries, rows.length, window, dtype)

    def _ring(self, layer: Attention, window: int | None, row: Row) -> torch.Tensor:
        """What a row whose ring wraps sees: of its entries as they lie there for one query, else of ``seen_past`` and
        the call's own tokens. With ALiBi ``[heads, queries, keys]``, the queries in reverse as in ``causal_bias``."""
        device = self.positions.device
        query = torch.arange(row.past, row.length, device=device)
        if row.queries == 1:
            assert row.plan.window is not None
            number = token_numbers(torch.arange(row.plan.window, device=device), row.length, row.plan)
        else:
            number = torch.cat((torch.from_numpy(row.seen_past).to(device), query))
        if layer.alibi is None:
            return ring_mask(number, query, window, row.plan)
        query = query.flip(0)
        seen = ring_mask(number, query, window, row.plan)
        bias = masked_bias(layer.alibi, number - query[:, None], seen[:, None], self.pool.dtype)
        return bias.transpose(0, 1)


def _grouped(layer: Attention, q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """One query a row: ``q [rows, heads, d]``, ``kv [rows, entries, 2 * kv_heads, d]`` -> ``[rows, heads, d]``.

    The queries of a group see the same keys, so they stand as if they were positions: nothing is repeated.
    """
    k, v = kv.transpose(1, 2).chunk(2, dim=1)
    grouped = q.reshape(q.shape[0], layer.num_kv_heads, -1, layer.head_size)
    if mask is not None and mask.dim() == 3:  # one row's biases, [heads, 1, entries]
        mask = mask.reshape(1, layer.num_kv_heads, -1, mask.shape[-1])
    return _scaled_dot_product(layer, grouped, k, v, mask).flatten(1, 2)


def _dense(layer: Attention, q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """One sequence: ``q [queries, heads, d]``, ``kv [entries, 2 * kv_heads, d]`` -> ``[queries, heads, d]``.

    Without a mask, query i sees entries up to i. A mask with heads is of queries in reverse: see ``causal_bias``.
    """
    k, v = kv.transpose(0, 1).unsqueeze(0).chunk(2, dim=1)
    q = q.transpose(0, 1).unsqueeze(0)
    if mask is None or mask.dim() == 2:
        return _scaled_dot_product(layer, q, k, v, mask, mask is None).squeeze(0).transpose(0, 1)
    return _scaled_dot_product(layer, q.flip(2), k, v, mask.unsqueeze(0)).flip(2).squeeze(0).transpose(0, 1)


def _scaled_dot_product(
    layer: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool = False
) -> torch.Tensor:
    if layer.softcap is not None:
        return capped_attention(q, k, v, mask, causal, layer.scale, layer.softcap)
    gqa = q.shape[1] != k.shape[1]
    if mask is not None and mask.is_cuda:
        # The fused kernel reads rows of a mask in aligned pieces, which views of a vector or of a part are not.
        mask = mask.contiguous()
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=layer.scale, enable_gqa=gqa)
