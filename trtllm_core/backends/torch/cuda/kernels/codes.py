"""Keys and values as codes of one byte: what every kernel that writes or reads them does, and two that do only that.

The plain twins are ``quantize`` and ``dequantize`` in ``layer_cache.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trtllm_core.backends.torch.cuda.support import up
from trtllm_core.backends.torch.layer_cache import SMALLEST, QuantizedCache

_SMALLEST = tl.constexpr(SMALLEST)
_ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 numbers near it are integers


@triton.jit
def encoded(x, LARGEST: tl.constexpr, CODE: tl.constexpr):
    """Heads ``x [heads, size]``, float32, as codes and their scales ``[heads]``; elements beyond a head are 0."""
    scale = tl.maximum(tl.max(tl.abs(x), 1), _SMALLEST) / LARGEST
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale)  # maxima pass NaN over
    ratio = x / scale[:, None]
    ratio = tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST)
    return rounded(ratio, CODE).to(CODE), scale


@triton.jit
def rounded(x, CODE: tl.constexpr):
    """To the nearest number that is a code, ties to even. Compilers convert to fp8 like that, the interpreter cuts."""
    whole = (x + _ROUNDS) - _ROUNDS
    if tl.int8 == CODE:
        return whole
    bits = x.to(tl.int32, bitcast=True)
    kept = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF  # three bits behind the point
    small = ((x * 512.0 + _ROUNDS) - _ROUNDS) / 512.0  # subnormal codes are multiples of 2^-9
    return tl.where(tl.abs(x) < 0.015625, small, kept.to(tl.float32, bitcast=True))


@triton.jit
def halves(byte):
    """Codes of int8, as bytes in int16, in half precision: exact. An integer in the mantissa of 1024 needs no
    conversion, of which there are fewer a cycle than of anything else."""
    return ((byte ^ 0x80) | 0x6400).to(tl.float16, bitcast=True) - 1152.0


@triton.jit
def lower_and_upper(pairs, CODE: tl.constexpr):
    """Two codes in each int16 ``pairs`` as numbers of half precision, and what they are to be multiplied with.

    Products want columns of values; two bytes at a time are what can be brought from shared memory in columns at once.
    """
    if tl.int8 == CODE:
        return halves(pairs & 0xFF), halves((pairs >> 8) & 0xFF), 1.0
    # Half precision has a bit more of exponent than e4m3, and its bias is larger by 8.
    lower = ((pairs & 0x80) << 8) | ((pairs & 0x7F) << 7)
    upper = (pairs & -0x8000) | ((pairs & 0x7F00) >> 1)
    return lower.to(tl.float16, bitcast=True), upper.to(tl.float16, bitcast=True), 256.0


def write_codes(cache: QuantizedCache, entries: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Write ``kv [tokens, 2 * kv_heads, head_size]`` to ``entries``, int64. Returns it as the cache keeps it."""
    heads, size = kv.shape[1:]
    kv = kv if kv.stride()[1:] == (size, 1) else kv.contiguous()
    seen = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    _write[(len(kv),)](
        kv,
        seen,
        cache.data,
        cache.scales,
        entries,
        kv.stride(0),
        HEADS=heads,
        HEADS_PADDED=up(heads),
        SIZE=size,
        PADDED=up(size),
        BLOCK=cache.tokens_per_block,
        LARGEST=cache.code.largest,
    )
    return seen


@triton.jit
def _write(
    kv_ptr,
    seen_ptr,
    codes_ptr,
    scales_ptr,
    entries_ptr,
    stride,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One token, all heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_PADDED)
    element = tl.arange(0, PADDED)
    inside = (head < HEADS)[:, None] & (element < SIZE)[None, :]
    at = head[:, None] * SIZE + element[None, :]
    x = tl.load(kv_ptr + token * stride + at, mask=inside, other=0.0).to(tl.float32)
    codes, scale = encoded(x, LARGEST, codes_ptr.dtype.element_ty)
    seen = codes.to(tl.float32) * scale[:, None]
    tl.store(seen_ptr + token * (HEADS * SIZE) + at, seen.to(seen_ptr.dtype.element_ty), mask=inside)
    entry = tl.load(entries_ptr + token)
    tl.store(codes_ptr + entry * (HEADS * SIZE) + at, codes, mask=inside)
    place = (entry // BLOCK * HEADS + head) * BLOCK + entry % BLOCK
    tl.store(scales_ptr + place, scale, mask=head < HEADS)


def read_blocks(cache: QuantizedCache, blocks: torch.Tensor) -> torch.Tensor:
    """See ``LayerCache.blocks``."""
    heads, size = cache.data.shape[1:]
    block = cache.tokens_per_block
    out = torch.empty(len(blocks) * block, heads, size, dtype=cache.dtype, device=cache.data.device)
    _read[(len(blocks), block)](
        out,
        cache.data,
        cache.scales,
        blocks,
        HEADS=heads,
        HEADS_PADDED=up(heads),
        SIZE=size,
        PADDED=up(size),
        BLOCK=block,
    )
    return out


@triton.jit
def _read(
    out_ptr,
    codes_ptr,
    scales_ptr,
    blocks_ptr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One entry of a block, all heads."""
    number = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1)
    block = tl.load(blocks_ptr + number).to(tl.int64)
    head = tl.arange(0, HEADS_PADDED)
    element = tl.arange(0, PADDED)
    inside = (head < HEADS)[:, None] & (element < SIZE)[None, :]
    at = head[:, None] * SIZE + element[None, :]
    codes = tl.load(codes_ptr + (block * BLOCK + entry) * (HEADS * SIZE) + at, mask=inside, other=0.0)
    scale = tl.load(scales_ptr + (block * HEADS + head) * BLOCK + entry, mask=head < HEADS, other=0.0)
    x = codes.to(tl.float32) * scale[:, None]
    tl.store(out_ptr + (number * BLOCK + entry) * (HEADS * SIZE) + at, x.to(out_ptr.dtype.element_ty), mask=inside)
