"""A quantised weight's product with one row, in one pass over its codes, with what follows it: see ``gemv``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_core.backends.torch.cuda.kernels.activation import NAMES, act
from trtllm_core.backends.torch.cuda.kernels.gemv import Tiling
from trtllm_core.backends.torch.cuda.kernels.numbers import word_sums
from trtllm_core.backends.torch.cuda.support import launch_options


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantised weight as kernels read it."""

    codes: torch.Tensor
    """uint8 ``[out, groups, group_size * bits / 8]``, as of ``QuantizedWeight``."""
    scales: torch.Tensor
    """Floating point ``[out, groups]``."""
    offsets: torch.Tensor | None
    """As ``scales``: an integer is worth ``scale * code + offset``; None: ``-scale * 2 ** (bits - 1)``."""
    bits: int
    group_size: int
    float8: bool = False
    """Whether codes are numbers of e4m3, worth ``scale * code``, with one scale a row."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        out, groups = self.scales.shape
        return out, groups * self.group_size

    @property
    def whole(self) -> bool:
        """Whether a row has one scale, and no offset."""
        return self.scales.shape[1] == 1 and self.offsets is None


CODED_TILINGS = (
    Tiling(4, 2048, 2),
    Tiling(8, 1024, 2),
    Tiling(8, 2048, 4),
    Tiling(4, 1024, 4),
    Tiling(2, 2048, 2),
    Tiling(4, 2048, 4),
    Tiling(4, 1024, 2, 2),
    Tiling(4, 2048, 4, 2),
    Tiling(8, 1024, 4, 2),
    Tiling(2, 2048, 2, 2),
)
"""What is tried when a product is measured; the first is taken for what is too small to be."""

_ONE = 0x3F800000
"""The bits of 1.0. An argument, not a constant, so that it is in a register: then one instruction masks and merges."""


def coded_gemv(
    x: torch.Tensor,
    weight: Codes,
    bias: torch.Tensor | None,
    tiling: Tiling,
    *,
    activation: str = "none",
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``gemv``. The weight has a multiple of 32 input features; ``tiling.columns`` is one of 32 * 2**n."""
    out_features, in_features = weight.shape
    if gated:
        out_features //= 2
    out = residual
    if out is None:
        out = torch.empty(1, out_features, dtype=x.dtype, device=x.device)
    _coded_gemv[(triton.cdiv(out_features, tiling.rows),)](
        x,
        weight.codes.view(torch.int32),
        weight.scales,
        weight.scales if weight.offsets is None else weight.offsets,
        weight.scales if bias is None else bias,
        out,
        out_features,
        in_features * weight.bits // 32,
        _ONE,
        ROWS=2 * tiling.rows if gated else tiling.rows,
        WORDS=tiling.columns * weight.bits // 32,
        AHEAD=tiling.ahead,
        BITS=weight.bits,
        GROUP=0 if weight.whole else weight.group_size,
        FLOAT8=weight.float8,
        OFFSETS=weight.offsets is not None,
        KIND=NAMES.index(activation),
        GATED=gated,
        BIASED=bias is not None,
        ADDED=residual is not None,
        PTX=x.device.type == "cuda",
        num_warps=tiling.warps,
        **launch_options(x.device),
    )
    return out


@triton.jit(do_not_specialize=["width"])
def _coded_gemv(
    x_ptr,
    words_ptr,
    scales_ptr,
    offsets_ptr,
    bias_ptr,
    out_ptr,
    out_features,
    width,
    one,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    AHEAD: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOAT8: tl.constexpr,
    OFFSETS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    # A thread has a word of each row, four bytes of codes, and the elements of x that meet them.
    size: tl.constexpr = 32 // BITS
    whole: tl.constexpr = GROUP == 0  # a scale a row
    share: tl.constexpr = max(1, GROUP // size)  # words that share a scale
    groups = width // share
    step = tl.arange(0, ROWS)
    if GATED:  # rows of the gate, and as many of the other
        half: tl.constexpr = ROWS // 2
        out_row = tl.program_id(0) * half + step % half
        live = out_row < out_features
        row = tl.where(step < half, out_row, out_features + out_row)
    else:
        row = tl.program_id(0) * ROWS + step
        live = row < out_features
    row = row.to(tl.int64)
    word = tl.arange(0, WORDS)
    element = tl.arange(0, size)
    at = words_ptr + row[None, :] * width + word[:, None]
    scale_at = scales_ptr + row[None, :] * groups
    offset_at = offsets_ptr + row[None, :] * groups
    # The first codes are on their way before the kernel waits for the one before it.
    mask = live[None, :] & (word < width)[:, None]
    words = tl.load(at, mask=mask, other=0)
    if not whole:
        scales = tl.load(scale_at + (word // share)[:, None], mask=mask, other=0.0)
    if OFFSETS:
        offsets = tl.load(offset_at + (word // share)[:, None], mask=mask, other=0.0)
    if AHEAD == 2:
        second = WORDS + word
        mask = live[None, :] & (second < width)[:, None]
        more_words = tl.load(at + WORDS, mask=mask, other=0)
        if not whole:
            more_scales = tl.load(scale_at + (second // share)[:, None], mask=mask, other=0.0)
        if OFFSETS:
            more_offsets = tl.load(offset_at + (second // share)[:, None], mask=mask, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sums = tl.zeros((WORDS, ROWS), tl.float32)
    plains = tl.zeros((WORDS, 1), tl.float32)
    for start in range(0, width, WORDS):
        later = start + AHEAD * WORDS + word
        mask = live[None, :] & (later < width)[:, None]
        next_words = tl.load(at + (start + AHEAD * WORDS), mask=mask, other=0)
        if not whole:
            next_scales = tl.load(scale_at + (later // share)[:, None], mask=mask, other=0.0)
        if OFFSETS:
            next_offsets = tl.load(offset_at + (later // share)[:, None], mask=mask, other=0.0)
        now = start + word
        x = tl.load(x_ptr + now[:, None] * size + element[None, :], mask=(now < width)[:, None], other=0.0)
        x = x.to(tl.float32)
        # Numbers are 1 + code / 2 ** BITS.
        if whole:
            sums, plain = word_sums(sums, words, x, WORDS, BITS, FLOAT8, PTX, one)
            plains += plain
        else:
            worth, plain = word_sums(tl.zeros((WORDS, ROWS), tl.float32), words, x, WORDS, BITS, False, PTX, one)
            worth *= 1 << BITS
        if OFFSETS:
            sums += scales.to(tl.float32) * (worth - plain * (1 << BITS))
            sums += offsets.to(tl.float32) * plain
        elif not whole:
            sums += scales.to(tl.float32) * (worth - plain * (3 << (BITS - 1)))
        if AHEAD == 2:
            words = more_words
            more_words = next_words
            if not whole:
                scales = more_scales
                more_scales = next_scales
            if OFFSETS:
                offsets = more_offsets
                more_offsets = next_offsets
        else:
            words = next_words
            if not whole:
                scales = next_scales
            if OFFSETS:
                offsets = next_offsets
    if FLOAT8:
        y = tl.sum(sums, 0)
    elif whole:
        y = tl.sum(sums * (1 << BITS) - plains * (3 << (BITS - 1)), 0)
    else:
        y = tl.sum(sums, 0)
    if whole:
        y *= tl.load(scales_ptr + row, mask=live, other=0.0).to(tl.float32)
    if BIASED:
        y += tl.load(bias_ptr + row, mask=live, other=0.0).to(tl.float32)
    if GATED:
        gate, other = tl.split(tl.permute(tl.reshape(y, [2, ROWS // 2]), [1, 0]))
        y = act(gate, KIND) * other
        row = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        live = row < out_features
    else:
        y = act(y, KIND)
    if ADDED:
        y += tl.load(out_ptr + row, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=live)
