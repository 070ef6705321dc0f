"""The largest logit of each row, in pieces that all of the GPU looks at: a row alone would keep one processor busy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trtllm_core.plugin.decoder import NO_TOKEN

CHUNK = 4096
"""Tokens of one program."""

_NONE = tl.constexpr(NO_TOKEN)


def largest_logit(logits: torch.Tensor) -> torch.Tensor:
    """The id of the largest logit, the lowest among equals; -1 where all are -inf. NaN is larger than any.

    Args:
        logits: float32 ``[n, vocab]``, the elements of a row side by side in memory.

    Returns:
        int64 ``[n]``.
    """
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    values = torch.empty(rows, chunks, device=logits.device)
    ids = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    found = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _peaks[(rows, chunks)](logits, values, ids, logits.stride(0), vocab, CHUNK=CHUNK, CHUNKS=chunks, num_warps=8)
    _highest[(rows,)](values, ids, found, CHUNKS=chunks, PADDED=triton.next_power_of_2(chunks), num_warps=1)
    return found


@triton.jit
def _peaks(logits, values, ids, stride, vocab, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    row, chunk = tl.program_id(0), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < vocab, other=float("-inf"))
    x = tl.where(x != x, float("inf"), x)
    value, index = tl.max(x, 0, return_indices=True)
    tl.store(values + row * CHUNKS + chunk, value)
    tl.store(ids + row * CHUNKS + chunk, chunk * CHUNK + index)


@triton.jit
def _highest(values, ids, found, CHUNKS: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0)
    chunk = tl.arange(0, PADDED)
    x = tl.load(values + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"))
    value, index = tl.max(x, 0, return_indices=True)
    token = tl.load(ids + row * CHUNKS + index).to(tl.int64)
    tl.store(found + row, tl.where(value == float("-inf"), _NONE, token))
