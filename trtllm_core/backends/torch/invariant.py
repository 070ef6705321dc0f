"""Attention whose result for a row depends on that row alone, bit for bit: the float32 CPU mode that tests rely on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trtllm_core.backends.torch.attention import PagedContext
from trtllm_core.backends.torch.batch import Row, ring_mask
from trtllm_core.backends.torch.kernels import invariant_rows
from trtllm_core.backends.torch.layer_cache import LayerCache
from trtllm_core.backends.torch.plain import turned
from trtllm_core.nn import Attention

TILE = 64
"""Cache entries of one tile. Sums run tile by tile, so that what follows a row's end adds exact zeros."""

_TANH = invariant_rows(torch.tanh)


class InvariantContext(PagedContext):
    """Each query is computed by itself over fixed tiles of its cache, however its sequence was cut into calls."""

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """See ``AttentionContext``. ``qkv [tokens, heads + 2 * kv_heads, head_size]``."""
        within = self.pool.plan.positions == "cache"  # then keys are rotated where they are read: see ``PlainContext``
        if not within:
            self._rotate(layer, qkv)
        cache = self.pool.layers[layer.index]
        q, kv = qkv[:, : layer.num_heads], qkv[:, layer.num_heads :]
        past = {row.tokens.start: row.read_past(cache) for row in self.batch.rows if row.wraps}
        kv = self.batch.store(cache, kv)
        out = torch.empty_like(q)
        with one_thread():
            for row in self.batch.rows:
                if row.wraps:
                    tiles, k, v = _tiled_ring(row, torch.cat((past[row.tokens.start], kv[row.tokens])))
                else:
                    tiles, k, v = _tiled(row, cache)
                near = far = q[row.tokens]
                if within:
                    near, far, k = _turn(layer, near, tiles, k, row)
                out[row.tokens] = _attend(layer, near, far, tiles, k, v, row)
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


Tiles = tuple[list[int], torch.Tensor, torch.Tensor]
"""Numbers of the tiles that a row sees, and keys and values ``[tiles, kv_heads, TILE, d]``, filled up with zeros."""


def _tiled(row: Row, cache: LayerCache) -> Tiles:
    padded = torch.nn.functional.pad(row.read(cache), (0, 0, 0, 0, 0, -row.length % TILE))
    k, v = padded.view(-1, TILE, *padded.shape[1:]).transpose(1, 2).chunk(2, dim=1)
    return list(range(len(k))), k, v


def _tiled_ring(row: Row, kv: torch.Tensor) -> Tiles:
    """Each token stands where it would stand if nothing were ever overwritten. Tiles that nobody sees are left out:
    they would add exact zeros."""
    number = torch.cat((torch.from_numpy(row.seen_past), torch.arange(row.past, row.length)))
    tiles = torch.unique(number // TILE)
    spread = kv.new_zeros(len(tiles) * TILE, *kv.shape[1:])
    spread[torch.searchsorted(tiles, number // TILE) * TILE + number % TILE] = kv
    k, v = spread.view(-1, TILE, *kv.shape[1:]).transpose(1, 2).chunk(2, dim=1)
    return tiles.tolist(), k, v


def _turn(
    layer: Attention, q: torch.Tensor, tiles: list[int], k: torch.Tensor, row: Row
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries rotated for what is near and for the sinks of a ring, and rotated keys, at positions in the cache."""
    query = torch.arange(row.past, row.length)
    number = torch.tensor(tiles)[:, None] * TILE + torch.arange(TILE)
    far = query if row.plan.window is None else query.clamp(max=row.plan.window - 1)
    # Filled-up places may lie beyond the table; they hold zeros.
    number = number.clamp(max=row.length - 1).flatten()
    keys = turned(layer, k.transpose(1, 2).flatten(0, 1), number).view(k.transpose(1, 2).shape).transpose(1, 2)
    return turned(layer, q, query), turned(layer, q, far), keys


def _attend(
    layer: Attention,
    q: torch.Tensor,
    far: torch.Tensor,
    tiles: list[int],
    k: torch.Tensor,
    v: torch.Tensor,
    row: Row,
) -> torch.Tensor:
    """``q [queries, heads, d]`` over tiles: softmax by its running maximum and sum, as in FlashAttention.

    ``far`` is ``q`` as the sinks of a ring see it: the same, unless positions are those within the cache.
    """
    queries, heads, d = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    # One product for each (query, kv head), always [group, d] x [d, TILE]: the shape never depends on the batch.
    grouped = q.reshape(queries * kv_heads, group, d)
    position = torch.arange(row.past, row.length)[:, None]
    best = torch.full((queries, kv_heads, group, 1), -torch.inf)
    total = torch.zeros(queries, kv_heads, group, 1)
    out = torch.zeros(queries, kv_heads, group, d)
    for tile, number in enumerate(tiles):
        entry = torch.arange(number * TILE, (number + 1) * TILE)
        if row.wraps:
            seen = ring_mask(entry, position[:, 0], layer.sliding_window, row.plan)
        else:
            seen = entry <= position
            if layer.sliding_window is not None:
                seen &= entry > position - layer.sliding_window
        keys = k[tile].expand(queries, -1, -1, -1).reshape(queries * kv_heads, TILE, d)
        values = v[tile].expand(queries, -1, -1, -1).reshape(queries * kv_heads, TILE, d)
        scores = torch.bmm(grouped, keys.transpose(1, 2))
        sinks = entry < row.plan.sink if row.plan.sink and row.plan.positions == "cache" else None
        if sinks is not None:
            other = torch.bmm(far.reshape(grouped.shape), keys.transpose(1, 2))
            scores = torch.where(sinks, other, scores)
        scores = scores.view(queries, kv_heads, group, TILE) * layer.scale
        if layer.softcap is not None:
            scores = _TANH(scores / layer.softcap) * layer.softcap
        if layer.alibi is not None:
            offset = entry - position
            if sinks is not None and row.plan.window is not None:
                offset = torch.where(sinks, entry - position.clamp(max=row.plan.window - 1), offset)
            scores = scores + layer.alibi(offset).view(queries, kv_heads, group, TILE)
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
