"""Attention written out, for what fused kernels do not do: positions within the cache, and attention scores."""

from __future__ import annotations

import torch

from trtllm_core.backends.torch.attention import PagedContext
from trtllm_core.backends.torch.batch import PackedBatch, Row, ring_mask
from trtllm_core.backends.torch.biases import SCORES
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.nn import Attention, RotaryEmbedding, rotate_


class PlainContext(PagedContext):
    """Row by row, with a matrix of scores. Much slower than ``PagedContext``: only plans that ask for it get it.

    With ``positions="cache"`` keys are cached as they come and rotated where they are read. A token's number among the
    entries is its position, and in a ring that has wrapped the newest one is at the last place: seen from there, all
    but the sinks are as far away as in the text. So queries are rotated twice, once for the sinks.
    """

    def __init__(self, batch: PackedBatch, pool: KVPool, positions: torch.Tensor) -> None:
        super().__init__(batch, pool, positions)
        self.within = pool.plan.positions == "cache"
        self.scores: list[list[torch.Tensor]] = [[] for _ in batch.rows] if pool.plan.scores else []
        """By row and layer, float32 ``[kv_heads, entries]``: see ``KVStatistics``."""

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """See ``AttentionContext``. ``qkv [tokens, heads + 2 * kv_heads, head_size]``."""
        if not self.within:
            self._rotate(layer, qkv)
        cache = self.pool.layers[layer.index]
        q, kv = qkv[:, : layer.num_heads], qkv[:, layer.num_heads :]
        past = {row.tokens.start: row.read_past(cache) for row in self.batch.rows if row.wraps}
        kv = self.batch.store(cache, kv)
        out = torch.empty_like(q)
        for i, row in enumerate(self.batch.rows):
            query = torch.arange(row.past, row.length, device=q.device)
            if row.wraps:
                held = torch.cat((past[row.tokens.start], kv[row.tokens]))
                number = torch.cat((torch.from_numpy(row.seen_past).to(q.device), query))
            else:
                held, number = row.read(cache), torch.arange(row.length, device=q.device)
            looked = self._written_out(layer, q[row.tokens], held, number, query, row, out[row.tokens])
            if self.scores:
                self.scores[i].append(looked)
        return out.flatten(1)

    def _written_out(
        self,
        layer: Attention,
        q: torch.Tensor,
        held: torch.Tensor,
        number: torch.Tensor,
        query: torch.Tensor,
        row: Row,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of tokens ``query`` over ``held [keys, 2 * kv_heads, d]``, which are the tokens ``number``, into
        ``out [queries, heads, d]``. Returns how much they looked at each, ``[kv_heads, keys]``."""
        k, v = held[:, : layer.num_kv_heads], held[:, layer.num_kv_heads :].transpose(0, 1).float()
        near = far = q
        seen_from = query
        if self.within:
            seen_from = query if row.plan.window is None else query.clamp(max=row.plan.window - 1)
            near, far, k = turned(layer, q, query), turned(layer, q, seen_from), turned(layer, k, number)
        k = k.permute(1, 2, 0).float()
        sinks = number < row.plan.sink
        looked = torch.zeros(layer.num_kv_heads, len(number), device=q.device)
        step = max(1, SCORES // (layer.num_heads * len(number)))
        for start in range(0, len(q), step):
            part = slice(start, start + step)
            scores = _products(near[part], k)
            if self.within and sinks.any():
                scores = torch.where(sinks, _products(far[part], k), scores)
            scores *= layer.scale
            if layer.softcap is not None:
                scores = (scores / layer.softcap).tanh_().mul_(layer.softcap)
            if layer.alibi is not None:
                offset = number - torch.where(sinks, seen_from[part, None], query[part, None])
                bias = layer.alibi(offset).transpose(0, 1)  # [heads, queries, keys]
                scores += bias.reshape(layer.num_kv_heads, -1, *bias.shape[1:])
            scores.masked_fill_(~_seen(layer, number, query[part], row), -torch.inf)
            chances = scores.softmax(-1)  # [kv_heads, group, queries, keys]
            looked += chances.sum((1, 2))
            out[part] = (chances @ v[:, None]).flatten(0, 1).transpose(0, 1).to(out.dtype)
        return looked


def turned(layer: Attention, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``x [tokens, heads, d]`` rotated to ``positions``: itself where the layer has no rotary embedding."""
    rotary: RotaryEmbedding | None = layer.rotary
    return x if rotary is None else rotate_(x.clone(), x.shape[1], *rotary(positions))


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``q [queries, heads, d]`` and ``k [kv_heads, d, keys] ->`` float32 ``[kv_heads, group, queries, keys]``."""
    grouped = q.transpose(0, 1).float().reshape(k.shape[0], -1, *q.shape[::2])
    products: torch.Tensor = grouped @ k[:, None]
    return products


def _seen(layer: Attention, number: torch.Tensor, query: torch.Tensor, row: Row) -> torch.Tensor:
    if row.plan.window is not None:
        return ring_mask(number, query, layer.sliding_window, row.plan)
    offset = number - query[:, None]
    seen = offset <= 0
    if layer.sliding_window is not None:
        seen &= offset > -layer.sliding_window
    return seen
