"""One token a row becomes history, in one kernel: what is done in each step should not take ten."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 128
"""Rows of one program."""


def commit_one(
    slot: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    history: torch.Tensor,
    lengths: torch.Tensor,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append to each slot's history the token that was chosen, where there is one.

    Args:
        slot: int64 ``[n]``, each once.
        chosen: int64 ``[n, 1]``; what is no token is taken as the nearest one.
        counts: int64 ``[n]``, 0 or 1.
        history: int32 ``[slots, max_seq_len]``; written.
        lengths: int64 ``[slots]``; written.
        vocab_size: tokens that there are.

    Returns:
        What was appended, int64 ``[n, 1]`` and int32 ``[n]``.
    """
    rows = len(slot)
    tokens = torch.empty(rows, 1, dtype=torch.int64, device=slot.device)
    newest = torch.empty(rows, dtype=torch.int32, device=slot.device)
    _commit[(triton.cdiv(rows, ROWS),)](
        slot,
        chosen,
        counts,
        history,
        lengths,
        tokens,
        newest,
        rows,
        chosen.stride(0),
        history.stride(0),
        history.shape[1],
        vocab_size,
        ROWS=ROWS,
        num_warps=4,
    )
    return tokens, newest


@triton.jit
def _commit(
    slot,
    chosen,
    counts,
    history,
    lengths,
    tokens,
    newest,
    rows,
    chosen_stride,
    history_stride,
    longest,
    vocab_size,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    at = tl.load(slot + row, mask=here, other=0)
    token = tl.load(chosen + row * chosen_stride, mask=here, other=0)
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
    tl.store(tokens + row, token, mask=here)
    tl.store(newest + row, token.to(tl.int32), mask=here)
    count = tl.load(counts + row, mask=here, other=0)
    length = tl.load(lengths + at, mask=here, other=0)
    place = at * history_stride + tl.minimum(length, longest - 1)
    tl.store(history + place, token.to(tl.int32), mask=here & (count > 0))
    tl.store(lengths + at, length + count, mask=here)
