"""RMS norm and layer norm of rows, computed in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_core.backends.torch.cuda.support import launch_options, up


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, centred: bool) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) * weight + bias`` over the last dimension.

    Args:
        x: ``[..., size]``.
        weight: ``[size]``.
        bias: ``[size]``; None: none.
        eps: as above.
        centred: whether the mean is taken off first: layer norm.

    Returns:
        Shape and dtype of ``x``.
    """
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    out = torch.empty_like(rows)
    block = up(size)
    _norm[(rows.shape[0],)](
        rows,
        weight,
        weight if bias is None else bias,
        out,
        rows.stride(0),
        eps,
        SIZE=size,
        PADDED=block,
        CENTRED=centred,
        BIASED=bias is not None,
        num_warps=min(8, max(1, block // 256)),
        **launch_options(x.device),
    )
    return out.view(x.shape)


@triton.jit
def _norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride,
    eps,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    CENTRED: tl.constexpr,
    BIASED: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, PADDED)
    inside = element < SIZE
    weight = tl.load(weight_ptr + element, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        bias = tl.load(bias_ptr + element, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * stride + element, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / SIZE, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * weight
    if BIASED:
        y += bias
    tl.store(out_ptr + row * SIZE + element, y.to(out_ptr.dtype.element_ty), mask=inside)
