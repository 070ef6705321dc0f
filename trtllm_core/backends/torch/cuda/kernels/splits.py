"""A row's cache split over programs, and the mean of what each of them saw (FlashDecoding, 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_core.backends.torch.cuda.support import launch_options, up

PROGRAMS = 132
"""Programs that a launch should have, one for each multiprocessor of an H100: caches are split until there are."""
LONG, MORE = 4096, 512
"""Entries from which caches of numbers are split into more, until there are so many programs: more of the memory is
waited for at a time. Those of short caches have nothing to wait for, and codes keep multiprocessors busy."""
MOST_SPLITS = 32


@dataclass(frozen=True, slots=True)
class Launch:
    """How a program goes through its part of a cache."""

    tile: int
    """Entries that it looks at together, of heads of up to 128 elements."""
    warps: int
    stages: int
    """Tiles that are on their way."""


NUMBERS, CODES = Launch(64, 4, 3), Launch(128, 4, 5)
"""Of caches of numbers and of codes, as measured on an H200."""


def splits_for(rows: int, kv_heads: int, longest: int, coded: bool = False) -> int:
    """Parts that each cache is split into: a number that a launch of ``rows`` is captured with."""
    parts, most = 1, min(MOST_SPLITS, -(-longest // NUMBERS.tile))
    programs = PROGRAMS if coded or longest < LONG else MORE
    while parts < most and rows * kv_heads * parts < programs:
        parts *= 2
    return parts


def mean_of_parts(parts: torch.Tensor, sums: torch.Tensor, out: torch.Tensor) -> None:
    """Put together what was seen of each head.

    Args:
        parts: float32 ``[rows, heads, splits, head_size]``: means, each of one part of a cache.
        sums: float32 ``[rows, heads, splits]``: log2 of what each is worth.
        out: ``[rows, heads * head_size]``: written.
    """
    count, heads, splits, size = parts.shape
    _combine[(count * heads,)](
        parts,
        sums,
        out,
        SIZE=size,
        PADDED=max(16, up(size)),
        SPLITS=splits,
        num_warps=2,
        **launch_options(parts.device),
    )


@triton.jit
def _combine(
    parts_ptr,
    sums_ptr,
    out_ptr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head of a row: the mean of its parts, each weighted by what it has seen."""
    head = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    split = tl.arange(0, SPLITS)
    element = tl.arange(0, PADDED)
    inside = element < SIZE
    sums = tl.load(sums_ptr + head * SPLITS + split)
    weights = tl.exp2(sums - tl.max(sums, 0))
    weights = weights / tl.sum(weights, 0)
    at = (head * SPLITS + split)[:, None] * SIZE + element[None, :]
    parts = tl.load(parts_ptr + at, mask=inside[None, :], other=0.0)
    mean = tl.sum(parts * weights[:, None], 0)
    tl.store(out_ptr + head * SIZE + element, mean.to(out_ptr.dtype.element_ty), mask=inside)
