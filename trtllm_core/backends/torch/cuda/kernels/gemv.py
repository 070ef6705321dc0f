"""A weight's product with one row, in one pass over the weight, with what follows it: bias, activation, residual."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_core.backends.torch.cuda.kernels.activation import NAMES, act
from trtllm_core.backends.torch.cuda.support import launch_options


class Tiling(NamedTuple):
    """How a product is cut up."""

    rows: int
    """Of the weight, in one program."""
    columns: int
    """Of these, at a time."""
    warps: int
    ahead: int = 1
    """Pieces of the weight that are under way while one is used: 1 or 2."""


TILINGS = (
    Tiling(4, 1024, 4),
    Tiling(2, 1024, 4),
    Tiling(8, 512, 4),
    Tiling(4, 512, 4),
    Tiling(8, 1024, 8),
    Tiling(2, 2048, 4),
    Tiling(16, 256, 4),
    Tiling(16, 512, 4),
    Tiling(4, 512, 4, 2),
    Tiling(8, 512, 4, 2),
    Tiling(2, 1024, 4, 2),
    Tiling(4, 1024, 4, 2),
)
"""What is tried when a product is measured; the first is taken for what is too small to be."""


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tiling: Tiling,
    *,
    activation: str = "none",
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``act(x Wᵀ + b) + residual``, or ``act(gate) * up`` of a weight whose rows are the gate's and then the other's.

    Args:
        x: one row, ``[1, in]``.
        weight: ``[out, in]``, contiguous.
        bias: ``[out]``; None: none.
        tiling: any; it decides about the time, and nothing else but the last bits.
        activation: one of ``NAMES``.
        gated: as above; then ``out`` is even.
        residual: ``[1, out]``, overwritten with the result; None: none.

    Returns:
        ``[1, out]``; gated, ``[1, out / 2]``.
    """
    out_features, in_features = weight.shape
    if gated:
        out_features //= 2
    out = residual
    if out is None:
        out = torch.empty(1, out_features, dtype=x.dtype, device=x.device)
    _gemv[(triton.cdiv(out_features, tiling.rows),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        out_features,
        in_features,
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        AHEAD=tiling.ahead,
        KIND=NAMES.index(activation),
        GATED=gated,
        BIASED=bias is not None,
        ADDED=residual is not None,
        EVEN=in_features % tiling.columns == 0,
        num_warps=tiling.warps,
        **launch_options(x.device),
    )
    return out


@triton.jit
def _gemv(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    out_features,
    in_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = row < out_features
    at = weight_ptr + row.to(tl.int64)[:, None] * in_features + column[None, :]
    other_at = at + tl.full((), 1, tl.int64) * out_features * in_features
    # The first pieces of the weight are on their way before the kernel waits for the one before it.
    mask = live[:, None] & (column < in_features)[None, :]
    piece = tl.load(at, mask=mask, other=0.0)
    if GATED:
        other_piece = tl.load(other_at, mask=mask, other=0.0)
    if AHEAD == 2:
        mask = live[:, None] & (COLUMNS + column < in_features)[None, :]
        second = tl.load(at + COLUMNS, mask=mask, other=0.0)
        if GATED:
            other_second = tl.load(other_at + COLUMNS, mask=mask, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    if GATED:
        other_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, in_features, COLUMNS):
        later = start + AHEAD * COLUMNS
        mask = live[:, None] & (later + column < in_features)[None, :]
        following = tl.load(at + later, mask=mask, other=0.0)
        if GATED:
            other_following = tl.load(other_at + later, mask=mask, other=0.0)
        if EVEN:
            x = tl.load(x_ptr + start + column).to(tl.float32)
        else:
            x = tl.load(x_ptr + start + column, mask=start + column < in_features, other=0.0).to(tl.float32)
        sums += piece.to(tl.float32) * x[None, :]
        if GATED:
            other_sums += other_piece.to(tl.float32) * x[None, :]
        if AHEAD == 2:
            piece = second
            second = following
            if GATED:
                other_piece = other_second
                other_second = other_following
        else:
            piece = following
            if GATED:
                other_piece = other_following
    y = tl.sum(sums, 1)
    if BIASED:
        y += tl.load(bias_ptr + row, mask=live, other=0.0).to(tl.float32)
    y = act(y, KIND)
    if GATED:
        up = tl.sum(other_sums, 1)
        if BIASED:
            up += tl.load(bias_ptr + out_features + row, mask=live, other=0.0).to(tl.float32)
        y = y * up
    if ADDED:
        y += tl.load(out_ptr + row, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=live)
