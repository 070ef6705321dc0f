"""Decode attention over the paged pool: one query a row, its cache split over programs (FlashDecoding, 2023)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_core.backends.torch.cuda.kernels.codes import encoded, halves, lower_and_upper
from trtllm_core.backends.torch.cuda.kernels.rows import DecodeRows
from trtllm_core.backends.torch.cuda.kernels.splits import CODES, NUMBERS, mean_of_parts, splits_for
from trtllm_core.backends.torch.cuda.support import launch_options, up
from trtllm_core.backends.torch.layer_cache import LayerCache, largest_of
from trtllm_core.nn import Attention

_NONE = tl.constexpr(-1e30)  # a score that counts for nothing; -inf less itself would be NaN
_LOG2E = tl.constexpr(1.4426950408889634)


def decode_attention(
    layer: Attention,
    qkv: torch.Tensor,
    cache: LayerCache,
    rows: DecodeRows,
    tokens_per_block: int,
    rotated: bool = False,
) -> torch.Tensor:
    """Rotate, write the new keys and values, and let each row's query see its cache and its own token.

    Args:
        layer: heads, scale, window, cap, rotation and biases.
        qkv: ``[rows, heads + 2 * kv_heads, head_size]``, contiguous, not yet rotated. Stays as it is.
        cache: of the layer.
        rows: where the rows' caches are.
        tokens_per_block: entries of a block.
        rotated: whether queries and keys are already.

    Returns:
        ``[rows, heads * head_size]``; 0 for what is no row.
    """
    count, size, heads, kv_heads = qkv.shape[0], layer.head_size, layer.num_heads, layer.num_kv_heads
    splits = splits_for(count, kv_heads, rows.longest, cache.scales is not None)
    out = torch.empty(count, heads * size, dtype=qkv.dtype, device=qkv.device)
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty(count, heads, splits, size, dtype=torch.float32, device=qkv.device)
        sums = torch.empty(count, heads, splits, dtype=torch.float32, device=qkv.device)
    rotary = None if layer.rotary is None or rotated else layer.rotary.table
    slopes = None if layer.alibi is None else layer.alibi.table
    padded = max(16, up(size))
    launch = NUMBERS if cache.scales is None else CODES
    exact = qkv.dtype == torch.float32
    large = padded > 128 or (exact and cache.scales is not None)  # codes become float32 numbers in shared memory
    _attend[(count, kv_heads, splits)](
        qkv,
        cache.data,
        cache.data if cache.scales is None else cache.data.view(torch.int16),
        cache.data if cache.scales is None else cache.scales,
        rows.tables,
        rows.width,
        rows.past,
        rows.positions,
        qkv if rotary is None else rotary,
        qkv if slopes is None else slopes,
        parts,
        sums,
        layer.scale,
        layer.softcap or 0.0,
        layer.sliding_window or 0,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        GROUP_PADDED=max(16, up(heads // kv_heads)),
        SIZE=size,
        PADDED=padded,
        ROTARY=0 if layer.rotary is None or rotated else layer.rotary.dim,
        BLOCK=tokens_per_block,
        TILE=launch.tile // 2 if large else launch.tile,
        STAGES=launch.stages,
        SPLITS=splits,
        CAPPED=layer.softcap is not None,
        BIASED=slopes is not None,
        WINDOWED=layer.sliding_window is not None,
        EXACT=exact,
        LARGEST=largest_of(cache),
        num_warps=launch.warps,
        **launch_options(qkv.device),
    )
    if splits > 1:
        mean_of_parts(parts, sums, out)
    return out


@triton.jit
def _turned(x, swapped, cos, sin):
    return x.to(tl.float32) * cos + swapped.to(tl.float32) * sin


@triton.jit
def _scored(dots, entry, past, scale, softcap, slope, CAPPED: tl.constexpr, BIASED: tl.constexpr):
    """Scores in units of log2 e, as exp2 wants them."""
    scores = dots * scale
    if CAPPED:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    if BIASED:
        scores += slope * (entry - past).to(tl.float32)
    return scores * _LOG2E


@triton.jit
def _attend(
    qkv_ptr,
    cache_ptr,
    pairs_ptr,
    scales_ptr,
    tables_ptr,
    width_ptr,
    past_ptr,
    positions_ptr,
    rotary_ptr,
    slopes_ptr,
    parts_ptr,
    sums_ptr,
    scale,
    softcap,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPPED: tl.constexpr,
    BIASED: tl.constexpr,
    WINDOWED: tl.constexpr,
    EXACT: tl.constexpr,
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    """One key/value head of a row, for all queries of its group; the last split has the new token too.

    ``LARGEST`` of 0: the cache holds numbers. Codes are exact in half precision, whatever the dtype of the queries; a
    key's scale goes to its score and a value's to its weight, and what could overflow or vanish is divided out before.
    Codes of values are read two by two (``pairs_ptr``, the same memory as int16): even elements, and odd ones.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    past = tl.load(past_ptr + row)
    width = tl.load(width_ptr)
    element = tl.arange(0, PADDED)
    inside = element < SIZE
    group = tl.arange(0, GROUP_PADDED)
    asked = (group < GROUP)[:, None] & inside[None, :]
    dtype = qkv_ptr.dtype.element_ty
    own = qkv_ptr + row * ((GROUP + 2) * KV_HEADS * SIZE)
    q_at = own + (kv_head * GROUP + group)[:, None] * SIZE
    k_at = own + (GROUP * KV_HEADS + kv_head) * SIZE
    q = tl.load(q_at + element[None, :], mask=asked, other=0.0)
    k_new = tl.load(k_at + element, mask=inside, other=0.0)
    if ROTARY > 0:
        # A head's first ROTARY elements turn by halves; the table holds cosines, then sines with their signs.
        swapped = tl.where(element < ROTARY // 2, element + ROTARY // 2, element - ROTARY // 2)
        turns = element < ROTARY
        swapped = tl.where(turns, swapped, element)
        table = rotary_ptr + tl.load(positions_ptr + row) * (2 * ROTARY) + element
        cos = tl.load(table, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(table + ROTARY, mask=turns, other=0.0).to(tl.float32)
        q_swapped = tl.load(q_at + swapped[None, :], mask=asked, other=0.0)
        k_swapped = tl.load(k_at + swapped, mask=inside, other=0.0)
        q = _turned(q, q_swapped, cos[None, :], sin[None, :]).to(dtype)
        k_new = _turned(k_new, k_swapped, cos, sin).to(dtype)
    narrow = dtype
    unit = tl.full((GROUP_PADDED,), 1.0, tl.float32)
    if LARGEST > 0 and not EXACT:
        narrow = tl.float16
        unit = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-30)
        q = q.to(tl.float32) / unit[:, None]
    q_narrow = q.to(narrow)
    slope = tl.zeros((GROUP_PADDED, 1), tl.float32)
    if BIASED:
        slope = tl.load(slopes_ptr + kv_head * GROUP + group, mask=group < GROUP, other=0.0)[:, None]
    top = tl.full((GROUP_PADDED,), _NONE, tl.float32)
    total = tl.zeros((GROUP_PADDED,), tl.float32)
    mean = tl.zeros((GROUP_PADDED, PADDED // 2 if LARGEST > 0 else PADDED), tl.float32)
    odd = tl.zeros((GROUP_PADDED, PADDED // 2), tl.float32)
    pair = tl.arange(0, PADDED // 2)
    if (split == SPLITS - 1) & (past >= 0):
        v_new = tl.load(own + ((GROUP + 1) * KV_HEADS + kv_head) * SIZE + element, mask=inside, other=0.0)
        block = tl.load(tables_ptr + row * width + past // BLOCK).to(tl.int64)
        place = cache_ptr + (block * BLOCK + past % BLOCK) * (2 * KV_HEADS * SIZE) + kv_head * SIZE + element
        k_own, v_own = k_new.to(tl.float32), v_new.to(tl.float32)
        if LARGEST > 0:
            k_codes, k_unit = encoded(k_own[None, :], LARGEST, cache_ptr.dtype.element_ty)
            v_codes, v_unit = encoded(v_own[None, :], LARGEST, cache_ptr.dtype.element_ty)
            units = scales_ptr + (block * (2 * KV_HEADS) + kv_head) * BLOCK + past % BLOCK + tl.arange(0, 1)
            tl.store(place[None, :], k_codes, mask=inside[None, :])
            tl.store(place[None, :] + KV_HEADS * SIZE, v_codes, mask=inside[None, :])
            tl.store(units, k_unit)
            tl.store(units + KV_HEADS * BLOCK, v_unit)
            k_own = tl.reshape(k_codes.to(tl.float32) * k_unit[:, None], (PADDED,))
            v_own = tl.reshape(v_codes.to(tl.float32) * v_unit[:, None], (PADDED,))
        else:
            tl.store(place, k_new, mask=inside)
            tl.store(place + KV_HEADS * SIZE, v_new, mask=inside)
        dots = (tl.sum(q.to(tl.float32) * k_own[None, :], 1) * unit)[:, None]
        top = tl.reshape(_scored(dots, past, past, scale, softcap, slope, CAPPED, BIASED), (GROUP_PADDED,))
        total += 1.0
        if LARGEST > 0:
            even_own, odd_own = tl.split(tl.reshape(v_own, (PADDED // 2, 2)))
            mean += even_own[None, :]
            odd += odd_own[None, :]
        else:
            mean += v_own[None, :]
    first = 0
    if WINDOWED:
        first = tl.maximum(past - window + 1, 0) // TILE
    tile = tl.arange(0, TILE)
    for number in tl.range(first + split, (past + TILE - 1) // TILE, SPLITS, num_stages=STAGES):
        entry = number * TILE + tile
        held = entry < past
        if BLOCK % TILE == 0:
            block = tl.load(tables_ptr + row * width + number * TILE // BLOCK).to(tl.int64)
            within = number * TILE % BLOCK + tile
            at = (block * BLOCK + within) * (2 * KV_HEADS * SIZE) + kv_head * SIZE
            scale_at = scales_ptr + (block * (2 * KV_HEADS) + kv_head) * BLOCK + within
        else:
            blocks = tl.load(tables_ptr + row * width + entry // BLOCK, mask=held, other=0).to(tl.int64)
            at = (blocks * BLOCK + entry % BLOCK) * (2 * KV_HEADS * SIZE) + kv_head * SIZE
            scale_at = scales_ptr + (blocks * (2 * KV_HEADS) + kv_head) * BLOCK + entry % BLOCK
        k = tl.load(cache_ptr + at[None, :] + element[:, None], mask=held[None, :] & inside[:, None], other=0.0)
        if LARGEST > 0:
            v_at = pairs_ptr + (KV_HEADS * SIZE + at[:, None]) // 2 + pair[None, :]
            v = tl.load(v_at, mask=held[:, None] & (pair < SIZE // 2)[None, :], other=0)
            if cache_ptr.dtype.element_ty == tl.int8:
                k = halves(k.to(tl.uint8, bitcast=True).to(tl.int16))
        else:
            v_at = cache_ptr + KV_HEADS * SIZE + at[:, None] + element[None, :]
            v = tl.load(v_at, mask=held[:, None] & inside[None, :], other=0.0)
        dots = tl.dot(q_narrow, k.to(narrow), input_precision="ieee" if EXACT else "tf32")
        if LARGEST > 0:
            k_scale = tl.load(scale_at, mask=held, other=0.0)
            v_scale = tl.load(scale_at + KV_HEADS * BLOCK, mask=held, other=0.0)
            dots = dots * (unit[:, None] * k_scale[None, :])
        scores = _scored(dots, entry[None, :], past, scale, softcap, slope, CAPPED, BIASED)
        seen = held
        if WINDOWED:
            seen = held & (entry > past - window)
        scores = tl.where(seen[None, :], scores, _NONE)
        higher = tl.maximum(top, tl.max(scores, 1))
        decay = tl.exp2(top - higher)
        # Where nothing was seen yet, ``higher`` is itself no score, and what is not seen would count as 1.
        weights = tl.where(seen[None, :], tl.exp2(scores - higher[:, None]), 0.0)
        total = total * decay + tl.sum(weights, 1)
        if LARGEST > 0:
            most = tl.maximum(tl.max(v_scale, 0), 1e-30)
            weights = (weights * (v_scale / most)[None, :]).to(narrow)
            lower, upper, unit_of = lower_and_upper(v, cache_ptr.dtype.element_ty)
            seen_here = tl.dot(weights, lower.to(narrow), input_precision="ieee" if EXACT else "tf32")
            seen_odd = tl.dot(weights, upper.to(narrow), input_precision="ieee" if EXACT else "tf32")
            mean = mean * decay[:, None] + seen_here * (most * unit_of)
            odd = odd * decay[:, None] + seen_odd * (most * unit_of)
        else:
            seen_here = tl.dot(weights.to(dtype), v, input_precision="ieee" if EXACT else "tf32")
            mean = mean * decay[:, None] + seen_here
        top = higher
    if LARGEST > 0:
        mean = tl.interleave(mean, odd)
    some = tl.where(total > 0, total, 1.0)
    mean = mean / some[:, None]
    head = (row * KV_HEADS + kv_head) * GROUP + group
    if SPLITS == 1:
        tl.store(parts_ptr + head[:, None] * SIZE + element[None, :], mean.to(dtype), mask=asked)
    else:
        part = head * SPLITS + split
        tl.store(parts_ptr + part[:, None] * SIZE + element[None, :], mean, mask=asked)
        tl.store(sums_ptr + part, tl.where(total > 0, top + tl.log2(some), _NONE), mask=group < GROUP)
