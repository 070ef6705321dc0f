"""What comes before the attention of a prompt: rotation, and its keys and values in the paged pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_core.backends.torch.cuda.kernels.codes import encoded
from trtllm_core.backends.torch.cuda.kernels.rows import DecodeRows
from trtllm_core.backends.torch.cuda.support import launch_options, up
from trtllm_core.backends.torch.layer_cache import LayerCache, largest_of
from trtllm_core.nn import Attention


def place_prompt(
    layer: Attention, qkv: torch.Tensor, cache: LayerCache, tokens: DecodeRows, tokens_per_block: int
) -> torch.Tensor:
    """Rotate the queries and keys of one sequence's tokens, and write its keys and values to its cache.

    Args:
        layer: heads and rotation.
        qkv: ``[tokens, heads + 2 * kv_heads, head_size]``, contiguous, not yet rotated. Stays as it is.
        cache: of the layer.
        tokens: of each its position, and its entry (``past``); -1: it fills up the bucket, and is written nowhere.
            ``tables`` is that of the one sequence.
        tokens_per_block: entries of a block.

    Returns:
        ``qkv``, rotated, keys and values as the cache keeps them.
    """
    out = torch.empty_like(qkv)
    heads = layer.num_heads + 2 * layer.num_kv_heads
    rotary = None if layer.rotary is None else layer.rotary.table
    _place[(qkv.shape[0],)](
        qkv,
        out,
        cache.data,
        cache.data if cache.scales is None else cache.scales,
        tokens.tables,
        tokens.past,
        tokens.positions,
        qkv if rotary is None else rotary,
        QUERIES=layer.num_heads,
        TURNED=layer.num_heads + layer.num_kv_heads,
        HEADS=heads,
        HEADS_PADDED=up(heads),
        SIZE=layer.head_size,
        PADDED=up(layer.head_size),
        ROTARY=0 if layer.rotary is None else layer.rotary.dim,
        BLOCK=tokens_per_block,
        LARGEST=largest_of(cache),
        num_warps=4,
        **launch_options(qkv.device),
    )
    return out


@triton.jit
def _place(
    qkv_ptr,
    out_ptr,
    cache_ptr,
    scales_ptr,
    tables_ptr,
    past_ptr,
    positions_ptr,
    rotary_ptr,
    QUERIES: tl.constexpr,
    TURNED: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token, all heads. ``LARGEST`` of 0: the cache holds numbers."""
    token = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.arange(0, HEADS_PADDED)
    element = tl.arange(0, PADDED)
    inside = (head < HEADS)[:, None] & (element < SIZE)[None, :]
    own = token * HEADS * SIZE + head[:, None] * SIZE
    x = tl.load(qkv_ptr + own + element[None, :], mask=inside, other=0.0)
    if ROTARY > 0:
        turns = element < ROTARY
        swapped = tl.where(element < ROTARY // 2, element + ROTARY // 2, element - ROTARY // 2)
        swapped = tl.where(turns, swapped, element)
        table = rotary_ptr + tl.load(positions_ptr + token) * (2 * ROTARY) + element
        cos = tl.load(table, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(table + ROTARY, mask=turns, other=0.0).to(tl.float32)
        other = tl.load(qkv_ptr + own + swapped[None, :], mask=inside, other=0.0).to(tl.float32)
        turned = x.to(tl.float32) * cos[None, :] + other * sin[None, :]
        x = tl.where((head < TURNED)[:, None], turned.to(x.dtype), x)
    codes = x
    if LARGEST > 0:
        codes, scale = encoded(x.to(tl.float32), LARGEST, cache_ptr.dtype.element_ty)
        seen = codes.to(tl.float32) * scale[:, None]
        x = tl.where((head < QUERIES)[:, None], x, seen.to(x.dtype))
    tl.store(out_ptr + own + element[None, :], x, mask=inside)
    past = tl.load(past_ptr + token)
    if past >= 0:
        block = tl.load(tables_ptr + past // BLOCK).to(tl.int64)
        place = (block * BLOCK + past % BLOCK) * ((HEADS - QUERIES) * SIZE)
        kept = inside & (head >= QUERIES)[:, None]
        tl.store(cache_ptr + place + (head - QUERIES)[:, None] * SIZE + element[None, :], codes, mask=kept)
        if LARGEST > 0:
            at = (block * (HEADS - QUERIES) + head - QUERIES) * BLOCK + past % BLOCK
            tl.store(scales_ptr + at, scale, mask=(head >= QUERIES) & (head < HEADS))
