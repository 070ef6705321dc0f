"""Attention whose result for a row depends on that row alone, bit for bit: the float32 CPU mode that tests rely on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trtllm_core.backends.torch.attention import PagedContext
from trtllm_core.backends.torch.batch import Row
from trtllm_core.backends.torch.kernels import invariant_rows
from trtllm_core.nn import Attention

TILE = 64
"""Cache entries of one tile. Sums run tile by tile, so that what follows a row's end adds exact zeros."""

_TANH = invariant_rows(torch.tanh)


class InvariantContext(PagedContext):
    """Each query is computed by itself over fixed tiles of its cache, however its sequence was cut into calls."""

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """See ``AttentionContext``. ``qkv [tokens, heads + 2 * kv_heads, head_size]``."""
        self._rotate(layer, qkv)
        cache = self.pool.layers[layer.index]
        q = qkv[:, : layer.num_heads]
        cache.index_copy_(0, self.batch.write, qkv[:, layer.num_heads :])
        out = torch.empty_like(q)
        with one_thread():
            for row in self.batch.rows:
                k, v = _tiled(row, cache)
                out[row.tokens] = _attend(layer, q[row.tokens], k, v, row)
        return out.flatten(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """How a batch of small products is shared out over threads depends on its size, and with it the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tiled(row: Row, cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The row's keys and values as ``[tiles, kv_heads, TILE, d]``, filled up with zeros."""
    padded = torch.nn.functional.pad(row.read(cache), (0, 0, 0, 0, 0, -row.length % TILE))
    return padded.view(-1, TILE, *cache.shape[1:]).transpose(1, 2).chunk(2, dim=1)


def _attend(layer: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row: Row) -> torch.Tensor:
    """``q [queries, heads, d]`` over tiles: softmax by its running maximum and sum, as in FlashAttention."""
    queries, heads, d = q.shape
    kv_heads, tiles = k.shape[1], k.shape[0]
    group = heads // kv_heads
    # One product for each (query, kv head), always [group, d] x [d, TILE]: the shape never depends on the batch.
    grouped = q.reshape(queries * kv_heads, group, d)
    position = torch.arange(row.past, row.length)[:, None]
    best = torch.full((queries, kv_heads, group, 1), -torch.inf)
    total = torch.zeros(queries, kv_heads, group, 1)
    out = torch.zeros(queries, kv_heads, group, d)
    for tile in range(tiles):
        entry = torch.arange(tile * TILE, (tile + 1) * TILE)
        seen = entry <= position
        if layer.sliding_window is not None:
            seen &= entry > position - layer.sliding_window
        keys = k[tile].expand(queries, -1, -1, -1).reshape(queries * kv_heads, TILE, d)
        values = v[tile].expand(queries, -1, -1, -1).reshape(queries * kv_heads, TILE, d)
        scores = torch.bmm(grouped, keys.transpose(1, 2)).view(queries, kv_heads, group, TILE) * layer.scale
        if layer.softcap is not None:
            scores = _TANH(scores / layer.softcap) * layer.softcap
        if layer.alibi is not None:
            scores = scores + layer.alibi(entry - position).view(queries, kv_heads, group, TILE)
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        peak = torch.maximum(best, scores.amax(-1, keepdim=True))
        safe = torch.where(peak == -torch.inf, 0.0, peak)
        weights = torch.exp(scores - safe)
        decay = torch.exp(best - safe)
        total = total * decay + weights.sum(-1, keepdim=True)
        part = torch.bmm(weights.view(queries * kv_heads, group, TILE), values)
        out = out * decay + part.view(queries, kv_heads, group, d)
        best = peak
    return (out / total).view(queries, heads, d)
