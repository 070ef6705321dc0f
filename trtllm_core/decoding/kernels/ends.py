"""The criteria that every request has, a kernel each: end tokens, and the limit of tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 128
"""Rows of one program that looks at limits."""


def end_tokens(
    slot: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, active: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Where each row's one token is among the end tokens of its slot.

    Args:
        slot: int64 ``[n]``.
        tokens: int64 ``[n, 1]``.
        counts: int64 ``[n]``, 0 or 1.
        active: bool ``[n]``.
        ends: int64 ``[slots, width]``.

    Returns:
        int64 ``[n]``: 0 there, else -1.
    """
    found = torch.empty_like(slot)
    width = ends.shape[1]
    _end_tokens[(len(slot),)](
        slot,
        tokens,
        counts,
        active,
        ends,
        found,
        tokens.stride(0),
        ends.stride(0),
        width,
        PADDED=triton.next_power_of_2(width),
        num_warps=1,
    )
    return found


def limits_reached(
    slot: torch.Tensor, counts: torch.Tensor, active: torch.Tensor, lengths: torch.Tensor, limits: torch.Tensor
) -> torch.Tensor:
    """At which of its new tokens each row reaches its slot's limit.

    Args:
        slot: int64 ``[n]``.
        counts: int64 ``[n]``: new tokens.
        active: bool ``[n]``.
        lengths, limits: int64 ``[slots]``: tokens before them, and the most that there may be.

    Returns:
        int64 ``[n]``: the token's index; -1: it does not.
    """
    found = torch.empty_like(slot)
    rows = len(slot)
    _limits[(triton.cdiv(rows, ROWS),)](slot, counts, active, lengths, limits, found, rows, ROWS=ROWS, num_warps=4)
    return found


@triton.jit
def _end_tokens(slot, tokens, counts, active, ends, found, token_stride, end_stride, width, PADDED: tl.constexpr):
    row = tl.program_id(0)
    at = tl.load(slot + row)
    token = tl.load(tokens + row * token_stride)
    column = tl.arange(0, PADDED)
    end = tl.load(ends + at * end_stride + column, mask=column < width, other=-1)
    hits = tl.sum(((end == token) & (column < width)).to(tl.int32), 0)
    asked = (tl.load(counts + row) > 0) & tl.load(active + row).to(tl.int1)
    tl.store(found + row, tl.where((hits > 0) & asked, 0, -1).to(tl.int64))


@triton.jit
def _limits(slot, counts, active, lengths, limits, found, rows, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    at = tl.load(slot + row, mask=here, other=0)
    last = tl.load(limits + at, mask=here, other=1) - tl.load(lengths + at, mask=here, other=0) - 1
    last = tl.maximum(last, 0)
    asked = tl.load(active + row, mask=here, other=0).to(tl.int1)
    reached = asked & (last < tl.load(counts + row, mask=here, other=0))
    tl.store(found + row, tl.where(reached, last, -1), mask=here)
