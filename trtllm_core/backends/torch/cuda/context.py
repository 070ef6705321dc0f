"""Attention of a call that no graph runs: prompts, chunks of them, and what else runs beside them in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from trtllm_core.backends.torch.attention import PagedContext
from trtllm_core.backends.torch.batch import PackedBatch, Row
from trtllm_core.backends.torch.cuda.kernels.attention import decode_attention
from trtllm_core.backends.torch.cuda.kernels.prompt import place_prompt
from trtllm_core.backends.torch.cuda.kernels.rows import DecodeRows
from trtllm_core.backends.torch.layer_cache import LayerCache
from trtllm_core.backends.torch.pool import KVPool
from trtllm_core.nn import Attention

FUSED = (torch.bfloat16, torch.float16)
"""What PyTorch's FlashAttention takes."""

FUSED_FROM = 512
"""Tokens of a call from which on it runs kernels of ours without a graph: then the GPU is busy with each of them for
longer than the host with the launch of the next, and what passes through memory less often is what counts."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences one after another."""

    starts: torch.Tensor
    """int32 ``[rows + 1]``: where each begins, and where the last one ends."""
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], batch: PackedBatch) -> Packed:
        """Sequences of these lengths, on the batch's device."""
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        return cls(batch.to_device(starts), max(lengths))


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts, or chunks of some."""

    tokens: slice | torch.Tensor
    """Where they are in the packed input."""
    queries: Packed
    """These tokens."""
    keys: Packed
    """What they see, up to themselves: the same tokens, or more that are cached before them."""
    rows: Sequence[Row] = ()
    """Of chunks, the rows whose caches hold what they see."""


class MixedContext(PagedContext):
    """Rows of one token in one call of the decode kernel, prompts in one call of FlashAttention, and row by row only
    what neither takes. For caches of whole sequences."""

    def __init__(self, batch: PackedBatch, pool: KVPool, positions: torch.Tensor) -> None:
        super().__init__(batch, pool, positions)
        single = np.flatnonzero(batch.single)
        several = [row for row, one in zip(batch.rows, batch.single, strict=True) if not one]
        starts = np.array([batch.rows[i].tokens.start for i in single], np.int64)
        self._single = _run([slice(start, start + 1) for start in starts], batch)
        self._decode = self._decode_rows(single, positions[self._single]) if len(single) else None
        fresh = [row for row in several if row.past == 0]
        self._prompts = self._packed(fresh) if fresh else None
        chunks = [row for row in several if row.past > 0]
        self._chunks = self._packed(chunks, behind=True) if chunks else None
        self._alone = len(fresh) == len(batch.rows)
        self._several = several
        self._tokens = self._every_token(positions) if len(positions) >= FUSED_FROM else None

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """See ``AttentionContext``. ``qkv [tokens, heads + 2 * kv_heads, head_size]``."""
        cache, given = self.pool.layers[layer.index], qkv
        if self._tokens is not None:
            qkv = place_prompt(layer, qkv.contiguous(), cache, self._tokens, self.batch.tokens_per_block)
        else:
            self._rotate(layer, qkv)
        q, kv = qkv[:, : layer.num_heads], qkv[:, layer.num_heads :]
        if self._tokens is None:
            kv = self.batch.store(cache, kv)
        if self._alone and is_fused(layer, q.dtype):
            assert self._prompts is not None
            return attend_prompts(layer, q, kv, self._prompts).flatten(1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if self._decode is not None:
            # As they were given: keys and values that were rounded to codes would be rounded once more.
            size, own = self.batch.tokens_per_block, given[self._single].contiguous()
            seen = decode_attention(layer, own, cache, self._decode, size, rotated=self._tokens is None)
            out[self._single] = seen.view(-1, *q.shape[1:])
        if is_fused(layer, q.dtype):
            if self._prompts is not None:
                out[self._prompts.tokens] = attend_prompts(layer, q, kv, self._prompts)
            if self._chunks is not None:
                out[self._chunks.tokens] = attend_chunks(layer, q, cache, self._chunks)
        else:
            for row in self._several:
                out[row.tokens] = self._row(layer, q[row.tokens], kv[row.tokens], cache, row, {})
        return out.flatten(1)

    def _decode_rows(self, rows: np.ndarray, positions: torch.Tensor) -> DecodeRows:
        batch = self.batch
        past = batch.after[rows] - 1
        width = int(past.max()) // batch.tokens_per_block + 1
        tables = batch.to_device(batch.tables[rows, :width].astype(np.int32).reshape(-1))
        past = batch.to_device(past.astype(np.int32))
        bound = batch.to_device(np.array([width], np.int32))
        return DecodeRows(past, positions.int(), tables, bound, width * batch.tokens_per_block)

    def _every_token(self, positions: torch.Tensor) -> DecodeRows:
        """Each token as a row of its own. The rows' tables lie one after another, and are as good as one table."""
        batch, (rows, width) = self.batch, self.batch.tables.shape
        lengths = np.array([row.queries for row in batch.rows])
        first = np.arange(rows) * (width * batch.tokens_per_block) + batch.after - np.cumsum(lengths)
        entry = np.arange(lengths.sum()) + np.repeat(first, lengths)
        return DecodeRows(
            batch.to_device(entry.astype(np.int32)),
            positions.int(),
            batch.to_device(batch.tables.reshape(-1)),
            batch.to_device(np.array([width], np.int32)),
            width * batch.tokens_per_block,
        )

    def _packed(self, rows: list[Row], behind: bool = False) -> Prompts:
        """``behind``: they follow what is cached."""
        tokens, queries = _run([row.tokens for row in rows], self.batch), [row.queries for row in rows]
        own = Packed.of(queries, self.batch)
        if not behind:
            return Prompts(tokens, own, own)
        return Prompts(tokens, own, Packed.of([row.length for row in rows], self.batch), rows)


def _run(parts: list[slice], batch: PackedBatch) -> slice | torch.Tensor:
    """Parts of the packed input as one: neighbours are a view."""
    if not parts:
        return slice(0, 0)
    if all(a.stop == b.start for a, b in pairwise(parts)):
        return slice(parts[0].start, parts[-1].stop)
    return batch.to_device(np.concatenate([np.arange(part.start, part.stop) for part in parts]))


def is_fused(layer: Attention, dtype: torch.dtype) -> bool:
    """Whether ``attend_prompts`` does what the layer asks for."""
    plain = layer.alibi is None and layer.softcap is None
    return plain and dtype in FUSED and layer.head_size % 8 == 0 and layer.head_size <= 256


def attend_prompts(layer: Attention, q: torch.Tensor, kv: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    """Each token sees its own prompt up to itself.

    ``q [tokens, heads, d]`` and ``kv [tokens, 2 * kv_heads, d]`` of all tokens ``->`` ``[prompts' tokens, heads, d]``.
    """
    return _flash(layer, q[prompts.tokens], kv[prompts.tokens], prompts)


def attend_chunks(layer: Attention, q: torch.Tensor, cache: LayerCache, chunks: Prompts) -> torch.Tensor:
    """The same where a part of each prompt is cached: the call's own keys and values are in the cache as well.

    ``q [tokens, heads, d]`` of all tokens ``->`` ``[chunks' tokens, heads, d]``.
    """
    seen = [row.read(cache) for row in chunks.rows]
    return _flash(layer, q[chunks.tokens], seen[0] if len(seen) == 1 else torch.cat(seen), chunks)


def _flash(layer: Attention, q: torch.Tensor, kv: torch.Tensor, prompts: Prompts) -> torch.Tensor:
    """``q [queries, heads, d]``, ``kv [keys, 2 * kv_heads, d] -> [queries, heads, d]``: a sequence's last query sees
    all of its keys, and each one before it one key less."""
    k, v = kv.chunk(2, dim=1)
    window = None if layer.sliding_window is None else layer.sliding_window - 1
    seen: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        prompts.queries.starts,
        prompts.keys.starts,
        prompts.queries.longest,
        prompts.keys.longest,
        0.0,
        True,
        False,
        scale=layer.scale,
        window_size_left=window,
        window_size_right=None if window is None else 0,
    )[0]
    return seen
