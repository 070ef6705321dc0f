"""What the fused kernel takes only as a mask, or not at all: biases of distance and capped scores."""

from __future__ import annotations

import torch

from trtllm_core.nn import Alibi

SCORES = 1 << 24
"""Scores that ``capped_attention`` holds at a time: 64 MiB."""


def masked_bias(alibi: Alibi, offset: torch.Tensor, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[queries, heads, keys]``: for ``offset [queries, keys]``, numbers of keys less those of their queries; -inf
    where ``seen [queries, 1, keys]`` is false."""
    bias: torch.Tensor = alibi(offset)
    return bias.masked_fill_(~seen, -torch.inf).to(dtype)


def causal_bias(alibi: Alibi, queries: int, length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """``[heads, queries, length]``: for the last ``queries`` positions of a row **in reverse order**.

    A bias depends on ``key - query`` alone. With the queries in reverse that is a constant along the diagonals from
    bottom left to top right, so that all rows are views of one vector a head: a long prompt needs no matrix a head.
    """
    assert alibi.table is not None
    offset = torch.arange(1 - length, queries, device=alibi.table.device)
    seen = offset <= 0
    if window is not None:
        seen &= offset > -window
    vector: torch.Tensor = alibi(offset)
    vector = vector.masked_fill_(~seen, -torch.inf).to(dtype)
    return vector.as_strided((vector.shape[0], queries, length), (vector.stride(0), 1, 1))


def capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores are ``softcap * tanh(q · k * scale / softcap)``, before mask and bias.

    ``q [rows, heads, queries, d]``, ``k`` and ``v [rows, kv_heads, entries, d]``; ``mask`` is bool, true where a query
    sees, or a bias in the dtype of q, and broadcasts to ``[rows, heads, queries, entries]``; ``causal`` is for as many
    queries as entries. Returns ``[rows, heads, queries, d]``.
    """
    rows, heads, queries, d = q.shape
    kv_heads, entries = k.shape[1:3]
    if causal:
        mask = torch.ones(queries, entries, dtype=torch.bool, device=q.device).tril_()
    out = torch.empty_like(q)
    step = max(1, SCORES // (rows * heads * entries))
    for start in range(0, queries, step):
        part = q[:, :, start : start + step]
        grouped = part.reshape(rows, kv_heads, -1, d)
        scores = (grouped @ k.transpose(-1, -2)).float().view(rows, heads, -1, entries).mul_(scale / softcap)
        scores = scores.tanh_().mul_(softcap)
        if mask is not None:
            here = mask[..., start : start + step, :] if mask.shape[-2] > 1 else mask
            scores = scores.masked_fill_(~here, -torch.inf) if mask.dtype == torch.bool else scores.add_(here)
        weights = scores.softmax(-1).to(q.dtype).view((*grouped.shape[:-1], entries))
        out[:, :, start : start + step] = (weights @ v).view(part.shape)
    return out
