"""The sum of what several programs computed of a product, and what follows it: the second half of ``skinny``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_core.backends.torch.cuda.kernels.activation import act

_BLOCK = 1024


def combine(
    partial: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, after: dict[str, Any]
) -> None:
    """Write to ``out [rows, out]``.

    Args:
        partial: float32 ``[splits, rows, features]``.
        scales, bias: ``[features]``, where ``after`` says that there are any.
        out: a residual, where ``after`` says so, and then the result.
        after: what follows, as ``_skinny`` is told.
    """
    splits, rows, _ = partial.shape
    _combine[(rows, triton.cdiv(out.shape[1], _BLOCK))](
        partial, scales, bias, out, rows, out.shape[1], SPLITS=splits, BLOCK=_BLOCK, num_warps=4, **after
    )


@triton.jit(do_not_specialize=["rows"])
def _combine(
    partial_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    rows,
    out_features,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    y = _combined(partial_ptr, scales_ptr, bias_ptr, rows, out_features, out, 0, SPLITS, BLOCK, GATED, SCALED, BIASED)
    y = act(y, KIND)
    if GATED:
        y *= _combined(
            partial_ptr, scales_ptr, bias_ptr, rows, out_features, out, 1, SPLITS, BLOCK, GATED, SCALED, BIASED
        )
    live = out < out_features
    at = out_ptr + tl.program_id(0).to(tl.int64) * out_features + out
    if ADDED:
        y += tl.load(at, mask=live, other=0.0).to(tl.float32)
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _combined(
    partial_ptr,
    scales_ptr,
    bias_ptr,
    rows,
    out_features,
    out,
    PART: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Of one row, the features ``out`` of the gate (``PART`` 0) or of the other."""
    live = out < out_features
    width = 2 * out_features if GATED else out_features
    column = PART * out_features + out
    y = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        line = split * rows + tl.program_id(0)
        y += tl.load(partial_ptr + line.to(tl.int64) * width + column, mask=live, other=0.0)
    if SCALED:
        y *= tl.load(scales_ptr + column, mask=live, other=0.0).to(tl.float32)
    if BIASED:
        y += tl.load(bias_ptr + column, mask=live, other=0.0).to(tl.float32)
    return y
