"""Rows rounded to floating-point numbers of 8 bits, and quantised weights made numbers of 16."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_core.backends.torch.cuda.kernels.coded import Codes
from trtllm_core.backends.torch.cuda.support import launch_options, up

_BYTES = 2048
"""Of codes, in one program of ``dequantized``."""


def rounded_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``trtllm_core.quantize.float8_rows``. ``x [rows, size]``, each row contiguous."""
    rows, size = x.shape
    numbers = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = up(size)
    warps = min(16, max(1, block // 512))
    _round[(rows,)](
        x,
        numbers,
        scales,
        x.stride(0),
        SIZE=size,
        PADDED=block,
        num_warps=warps,
        **launch_options(x.device),
    )
    return numbers, scales


def dequantized(weight: Codes, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """``count`` rows of a weight of integers, from row ``first`` on: ``[count, in]`` in ``dtype``."""
    in_features = weight.shape[1]
    out = torch.empty(count, in_features, dtype=dtype, device=weight.codes.device)
    width = in_features * weight.bits // 8
    block = min(_BYTES, up(width))
    _dequantize[(count, triton.cdiv(width, block))](
        weight.codes,
        weight.scales,
        weight.scales if weight.offsets is None else weight.offsets,
        out,
        first,
        width,
        BLOCK=block,
        BITS=weight.bits,
        GROUP=weight.group_size,
        OFFSETS=weight.offsets is not None,
        num_warps=4,
        **launch_options(out.device),
    )
    return out


@triton.jit
def _round(x_ptr, numbers_ptr, scales_ptr, stride, SIZE: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, PADDED)
    inside = element < SIZE
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * stride + element, mask=inside, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), 0) / 448.0
    scale = tl.where(scale == 0.0, 1.0, scale)
    scale = tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), scale)  # maxima pass NaN over
    x = tl.minimum(tl.maximum(x / scale, -448.0), 448.0)
    tl.store(numbers_ptr + row * SIZE + element, x.to(numbers_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit
def _dequantize(
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    out_ptr,
    first,
    width,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSETS: tl.constexpr,
    PDL: tl.constexpr,
):
    each: tl.constexpr = 8 // BITS
    share: tl.constexpr = GROUP // each
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    codes = tl.load(codes_ptr + (first + row) * width + place, mask=inside, other=0).to(tl.int32)
    group = (first + row) * (width // share) + place // share
    scales = tl.load(scales_ptr + group, mask=inside, other=0.0).to(tl.float32)
    if OFFSETS:
        bases = tl.load(offsets_ptr + group, mask=inside, other=0.0).to(tl.float32)
    else:
        bases = scales * -(1 << (BITS - 1))
    # What is written may be read by the kernel before this one: it must be done.
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if BITS == 8:
        values = codes.to(tl.float32) * scales + bases
        tl.store(out_ptr + row * width + place, values.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        low = (codes & 15).to(tl.float32) * scales + bases
        high = (codes >> 4).to(tl.float32) * scales + bases
        pairs = tl.join(low, high).to(out_ptr.dtype.element_ty)
        at = out_ptr + row * width * 2 + place[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(at, pairs, mask=inside[:, None])
