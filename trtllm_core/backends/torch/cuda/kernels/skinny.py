"""Products of few rows, with what follows them, in one pass over a weight. It may be quantised: its codes become
numbers in registers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_core.backends.torch.cuda.kernels.activation import NAMES, act
from trtllm_core.backends.torch.cuda.kernels.coded import Codes
from trtllm_core.backends.torch.cuda.kernels.combine import combine
from trtllm_core.backends.torch.cuda.support import launch_options, up


class Blocks(NamedTuple):
    """How a product of few rows is cut up."""

    out: int
    """Rows of the weight, in one program."""
    columns: int
    """Of these, at a time."""
    splits: int
    """Programs that share the columns of a row."""
    warps: int
    stages: int
    """Steps that are loaded ahead."""


BLOCKS = (
    Blocks(64, 128, 1, 4, 4),
    Blocks(128, 128, 2, 8, 4),
    Blocks(64, 128, 2, 4, 5),
    Blocks(64, 256, 2, 4, 3),
    Blocks(128, 128, 1, 8, 4),
    Blocks(32, 256, 1, 2, 4),
)
"""What is tried when a product is measured; the first is taken for what is too small to be."""

CODED_BLOCKS = (
    Blocks(64, 128, 1, 4, 4),
    Blocks(64, 256, 1, 4, 3),
    Blocks(64, 256, 2, 4, 3),
    Blocks(64, 256, 4, 4, 3),
    Blocks(64, 128, 4, 4, 4),
    Blocks(128, 128, 2, 8, 4),
    Blocks(128, 128, 4, 4, 3),
)
"""The same for quantised weights, whose numbers take longer to make."""

MOST_ROWS = 64
"""Of ``x``, in one program."""


def skinny(
    x: torch.Tensor,
    weight: torch.Tensor | Codes,
    bias: torch.Tensor | None,
    blocks: Blocks,
    *,
    activation: str = "none",
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``gemv``: the same of several rows, by the matrix units.

    Args:
        x: ``[rows, in]``, bfloat16 or float16, each row contiguous.
        weight: ``[out, in]`` in the type of ``x``, contiguous, or quantised, with a multiple of 32 input features.
        bias: ``[out]``; None: none.
        blocks: any; it decides about the time, and nothing else but the last bits.
        activation, gated: as of ``gemv``.
        residual: ``[rows, out]``, overwritten with the result; None: none.

    Returns:
        ``[rows, out]``; gated, ``[rows, out / 2]``.
    """
    (rows, _), (features, in_features) = x.shape, weight.shape
    codes = None if isinstance(weight, torch.Tensor) else weight
    stored = weight if isinstance(weight, torch.Tensor) else weight.codes
    scales = stored if codes is None else codes.scales
    float8, whole = codes is not None and codes.float8, codes is not None and codes.whole
    offsets = None if codes is None else codes.offsets
    out_features = features // 2 if gated else features
    out = residual
    if out is None:
        out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    splits = min(blocks.splits, triton.cdiv(in_features, blocks.columns))
    partial = out
    if splits > 1:
        partial = torch.empty(splits, rows, features, dtype=torch.float32, device=x.device)
    tile = min(MOST_ROWS, max(8, up(rows)))
    after = {
        "KIND": NAMES.index(activation),
        "GATED": gated,
        "SCALED": whole,
        "BIASED": bias is not None,
        "ADDED": residual is not None,
        **launch_options(x.device),
    }
    _skinny[(triton.cdiv(features, blocks.out), triton.cdiv(rows, tile), splits)](
        x,
        stored.view(torch.float8_e4m3fn) if float8 else stored,
        scales,
        scales if offsets is None else offsets,
        stored if bias is None else bias,
        partial,
        rows,
        out_features,
        in_features,
        x.stride(0),
        OUT=blocks.out,
        ROWS=tile,
        COLUMNS=blocks.columns,
        SPLITS=splits,
        BITS=16 if codes is None or float8 else codes.bits,
        GROUP=0 if codes is None or whole else codes.group_size,
        OFFSETS=offsets is not None,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **after,
    )
    if splits > 1:
        combine(partial, scales, stored if bias is None else bias, out, after)
    return out


@triton.jit
def _worth(codes, scales, bases, PLACE: tl.constexpr, BITS: tl.constexpr):
    """Codes of ``BITS`` at bit ``PLACE``, as ``1 + code / 2 ** BITS``, times scales and plus bases: float32."""
    up: tl.constexpr = 23 - BITS - PLACE
    mask: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    number = (((codes << up) & mask) | 0x3F800000).to(tl.float32, bitcast=True)
    return number * scales + bases


@triton.jit
def _spread(numbers, OUT: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """``[OUT, GROUPS] -> [OUT, WIDTH]``, each of them for its share of the columns; or ``[OUT, 1]`` as it is."""
    if GROUPS > 1:
        wide = tl.broadcast_to(numbers[:, :, None], (OUT, GROUPS, WIDTH // GROUPS))
        numbers = tl.reshape(wide, (OUT, WIDTH))
    return numbers


@triton.jit(do_not_specialize=["rows"])
def _skinny(
    x_ptr,
    weight_ptr,
    scales_ptr,
    offsets_ptr,
    bias_ptr,
    out_ptr,
    rows,
    out_features,
    in_features,
    x_stride,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSETS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    # A place is what is loaded as one: a number, or a byte of codes.
    each: tl.constexpr = 2 if BITS == 4 else 1
    places: tl.constexpr = COLUMNS // each
    groups: tl.constexpr = max(1, COLUMNS // GROUP) if GROUP > 0 else 1
    half: tl.constexpr = OUT // 2
    step = tl.arange(0, OUT)
    if GATED and SPLITS == 1:  # rows of the gate, and as many of the other
        first_out = tl.program_id(0) * half
        live = first_out + step % half < out_features
        out = first_out + step % half + tl.where(step < half, 0, out_features)
    else:
        out = tl.program_id(0) * OUT + step
        live = out < (2 * out_features if GATED else out_features)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    given = row < rows
    width = in_features // each
    place = tl.arange(0, places)
    weight_at = weight_ptr + out.to(tl.int64)[:, None] * width
    x_at = x_ptr + row.to(tl.int64)[None, :] * x_stride
    span = tl.cdiv(tl.cdiv(in_features, COLUMNS), SPLITS) * COLUMNS
    first = tl.program_id(2) * span
    last = min(first + span, in_features)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sums = tl.zeros((OUT, ROWS), tl.float32)
    for start in range(first, last, COLUMNS):
        now = start // each + place
        inside = now < last // each
        weight = tl.load(weight_at + now[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        mask = inside[:, None] & given[None, :]
        x = tl.load(x_at + now[:, None] * each, mask=mask, other=0.0)
        if BITS == 16:
            if weight.dtype != x.dtype:
                weight = weight.to(tl.float32)  # on the straight road, one instruction converts one number at a time
            sums = tl.dot(weight.to(x.dtype), x, sums)
        else:
            codes = weight.to(tl.int32)
            if GROUP == 0:
                scales = tl.full((OUT, 1), 1 << BITS, tl.float32)
                bases = tl.full((OUT, 1), -(3 << (BITS - 1)), tl.float32)
            else:
                group = start // GROUP + tl.arange(0, groups)
                at = out.to(tl.int64)[:, None] * (in_features // GROUP) + group[None, :]
                there = live[:, None] & (group < in_features // GROUP)[None, :]
                scales = tl.load(scales_ptr + at, mask=there, other=0.0).to(tl.float32)
                if OFFSETS:
                    bases = tl.load(offsets_ptr + at, mask=there, other=0.0).to(tl.float32) - scales * (1 << BITS)
                else:
                    bases = scales * -(3 << (BITS - 1))
                scales = _spread(scales * (1 << BITS), OUT, places, groups)
                bases = _spread(bases, OUT, places, groups)
            sums = tl.dot(_worth(codes, scales, bases, 0, BITS).to(x.dtype), x, sums)
            if BITS == 4:
                x = tl.load(x_at + now[:, None] * each + 1, mask=mask, other=0.0)
                sums = tl.dot(_worth(codes, scales, bases, 4, BITS).to(x.dtype), x, sums)
    if SPLITS > 1:
        width = 2 * out_features if GATED else out_features
        at = (tl.program_id(2).to(tl.int64) * rows + row[None, :]) * width + out[:, None]
        tl.store(out_ptr + at, sums, mask=live[:, None] & given[None, :])
    else:
        if SCALED:
            sums *= tl.load(scales_ptr + out, mask=live, other=0.0).to(tl.float32)[:, None]
        if BIASED:
            sums += tl.load(bias_ptr + out, mask=live, other=0.0).to(tl.float32)[:, None]
        if GATED:
            gate, other = tl.split(tl.permute(tl.reshape(sums, (2, half, ROWS)), (1, 2, 0)))
            sums = act(gate, KIND) * other
            out = first_out + tl.arange(0, half)
            live = out < out_features
        else:
            sums = act(sums, KIND)
        at = row.to(tl.int64)[None, :] * out_features + out[:, None]
        mask = live[:, None] & given[None, :]
        if ADDED:
            sums += tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=mask)
