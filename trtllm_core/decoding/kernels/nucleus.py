"""Where the likeliest tokens' probabilities add up to a share, without sorting the vocabulary.

Tokens fall into 256 bins by their distance to the largest logit. Two passes add up the masses of 16 bins each and leave
one bin, whose few tokens are gathered, and searched by value and then by id. Probabilities are counted in whole
numbers, as in ``ranking``: a sum is the same in whatever order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK = 4096
"""Tokens of one program."""

_PIECE, _WARPS = 256, 4  # tokens at a time, and who adds them up
_ONE = tl.constexpr(4294967296.0)
_LEAST = tl.constexpr(-3.4028234663852886e38)
_FAR = tl.constexpr(23.0)  # e^-23 in units of 2^-32 is 0
_ROUNDING = tl.constexpr(1 - 2.0**-24)


def nucleus_border(logits: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The token at which the running sum of probabilities reaches ``share``, from the largest logit to the smallest.

    Equal logits go by id. On the device alone: nothing is looked at by the host.

    Args:
        logits: float32 ``[n, vocab]``, the elements of a row side by side in memory.
        share: float32 ``[n, 1]`` in (0, 1].

    Returns:
        int64 ``[n, 1]``: ids.
    """
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    device = logits.device
    peaks = torch.empty(rows, chunks, device=device)
    sums = torch.empty(2, rows, chunks, 16, dtype=torch.int64, device=device)
    held = torch.zeros(rows, dtype=torch.int32, device=device)
    found = torch.empty(2, rows, vocab, dtype=torch.int32, device=device)
    border = torch.empty(rows, 1, dtype=torch.int64, device=device)
    sizes = {"CHUNKS": chunks, "PADDED": triton.next_power_of_2(chunks), "CHUNK": CHUNK, "PIECE": _PIECE}
    grid = (rows, chunks)
    stride = logits.stride(0)
    _peak[grid](logits, peaks, stride, vocab, CHUNK=CHUNK, CHUNKS=chunks, num_warps=4)
    for level in range(2):
        _add_up[grid](logits, share, peaks, sums, stride, vocab, rows, LEVEL=level, **sizes, num_warps=_WARPS)
    _gather[grid](logits, share, peaks, sums, held, found, stride, vocab, rows, **sizes, num_warps=4)
    _search[(rows,)](share, peaks, sums, held, found, border, vocab, rows, **sizes, num_warps=8)
    return border


@triton.jit
def _mass(x, most):
    return (tl.exp(x - most) * _ONE).to(tl.int64)


@triton.jit
def _bin(x, most):
    """0 to 255, the larger the smaller ``x``; equal for equals."""
    return (tl.minimum(most - x, _FAR) * (255.0 / _FAR)).to(tl.int32)


@triton.jit
def _key(x):
    """int64 that sort as float32 do; -0.0 is 0."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -2147483648 - bits, bits)


@triton.jit
def _most(peaks_ptr, row, CHUNKS: tl.constexpr, PADDED: tl.constexpr):
    chunk = tl.arange(0, PADDED)
    peaks = tl.load(peaks_ptr + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=_LEAST)
    return tl.maximum(tl.max(peaks, 0), _LEAST)


@triton.jit
def _level(sums_ptr, row, CHUNKS: tl.constexpr, PADDED: tl.constexpr):
    """int64 ``[16]``: the masses of a level's bins, over all chunks."""
    chunk = tl.arange(0, PADDED)
    digit = tl.arange(0, 16)
    at = (row * CHUNKS + chunk)[:, None] * 16 + digit[None, :]
    return tl.sum(tl.load(sums_ptr + at, mask=(chunk < CHUNKS)[:, None], other=0), 0)


@triton.jit
def _pick(by_digit, target):
    """The first digit at which the running sum reaches the target, and what is left of the target there."""
    digit = tl.arange(0, 16)
    running = tl.cumsum(by_digit, 0)
    place = tl.minimum(tl.sum((running < target).to(tl.int32), 0), 15)
    return place, target - tl.sum(tl.where(digit < place, by_digit, 0), 0)


@triton.jit
def _first(sums_ptr, share_ptr, row, CHUNKS: tl.constexpr, PADDED: tl.constexpr):
    """Of the first level. The target is a share of all masses: rounded up, and 1 at least."""
    by_digit = _level(sums_ptr, row, CHUNKS, PADDED)
    wanted = tl.load(share_ptr + row).to(tl.float64) * tl.sum(by_digit, 0).to(tl.float64) * _ROUNDING
    target = wanted.to(tl.int64)
    target = tl.maximum(target + (target.to(tl.float64) < wanted).to(tl.int64), 1)
    return _pick(by_digit, target)


@triton.jit
def _peak(logits_ptr, peaks_ptr, stride, vocab, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride + token, mask=token < vocab, other=float("-inf"))
    tl.store(peaks_ptr + row * CHUNKS + chunk, tl.max(x, 0))


@triton.jit
def _add_up(
    logits_ptr,
    share_ptr,
    peaks_ptr,
    sums_ptr,
    stride,
    vocab,
    rows,
    LEVEL: tl.constexpr,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The masses of a level's 16 bins in one chunk of a row."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    most = _most(peaks_ptr, row, CHUNKS, PADDED)
    high = 0
    if LEVEL == 1:
        high, _ = _first(sums_ptr, share_ptr, row, CHUNKS, PADDED)
    digit = tl.arange(0, 16)
    sums = tl.zeros((16, PIECE), tl.int64)
    for start in range(0, CHUNK, PIECE):
        token = chunk * CHUNK + start + tl.arange(0, PIECE)
        x = tl.load(logits_ptr + row * stride + token, mask=token < vocab, other=float("-inf"))
        mass = _mass(x, most)
        number = _bin(x, most)
        if LEVEL == 0:
            number = number >> 4
        else:
            mass = tl.where(number >> 4 == high, mass, 0)
            number = number & 15
        sums += tl.where(number[None, :] == digit[:, None], mass[None, :], 0)
    at = ((LEVEL * rows + row) * CHUNKS + chunk) * 16 + digit
    tl.store(sums_ptr + at, tl.sum(sums, 1))


@triton.jit
def _gather(
    logits_ptr,
    share_ptr,
    peaks_ptr,
    sums_ptr,
    held_ptr,
    found_ptr,
    stride,
    vocab,
    rows,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The tokens in the bin that is left, in any order: their ids, and their logits' bits."""
    row = tl.program_id(0).to(tl.int64)
    most = _most(peaks_ptr, row, CHUNKS, PADDED)
    high, target = _first(sums_ptr, share_ptr, row, CHUNKS, PADDED)
    low, target = _pick(_level(sums_ptr + rows * CHUNKS * 16, row, CHUNKS, PADDED), target)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride + token, mask=token < vocab, other=float("-inf"))
    inside = (_bin(x, most) == high * 16 + low) & (_mass(x, most) > 0)
    count = tl.sum(inside.to(tl.int32), 0)
    if count > 0:
        place = tl.atomic_add(held_ptr + row, count) + tl.cumsum(inside.to(tl.int32), 0) - 1
        at = found_ptr + row * vocab + place
        tl.store(at, token, mask=inside)
        tl.store(found_ptr + (row + rows) * vocab + place, x.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _search(
    share_ptr,
    peaks_ptr,
    sums_ptr,
    held_ptr,
    found_ptr,
    border_ptr,
    vocab,
    rows,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Of what was gathered: by value, 16 ranges at a time; then by id, among those of the value that is found."""
    row = tl.program_id(0).to(tl.int64)
    most = _most(peaks_ptr, row, CHUNKS, PADDED)
    _, target = _first(sums_ptr, share_ptr, row, CHUNKS, PADDED)
    _, target = _pick(_level(sums_ptr + rows * CHUNKS * 16, row, CHUNKS, PADDED), target)
    held = tl.load(held_ptr + row)
    ids_ptr = found_ptr + row * vocab
    bits_ptr = found_ptr + (row + rows) * vocab
    digit = tl.arange(0, 16)
    place = tl.arange(0, PIECE)
    lowest = tl.full((PIECE,), 2147483647, tl.int64)
    highest = tl.full((PIECE,), -2147483648, tl.int64)
    for start in range(0, held, PIECE):
        live = start + place < held
        key = _key(tl.load(bits_ptr + start + place, mask=live, other=0).to(tl.float32, bitcast=True))
        lowest = tl.minimum(lowest, tl.where(live, key, 2147483647))
        highest = tl.maximum(highest, tl.where(live, key, -2147483648))
    low = tl.min(lowest, 0)
    high = tl.max(highest, 0)
    while low < high:
        width = (high - low) // 16 + 1
        sums = tl.zeros((16, PIECE), tl.int64)
        for start in range(0, held, PIECE):
            live = start + place < held
            x = tl.load(bits_ptr + start + place, mask=live, other=0).to(tl.float32, bitcast=True)
            down = high - _key(x)  # counted from the largest: sums run that way
            mass = tl.where(live & (down >= 0) & (down <= high - low), _mass(x, most), 0)
            sums += tl.where(
                (down.to(tl.uint32) // width.to(tl.uint32)).to(tl.int32)[None, :] == digit[:, None], mass[None, :], 0
            )
        number, target = _pick(tl.sum(sums, 1), target)
        high = high - number * width
        low = tl.maximum(low, high - width + 1)
    lowest = tl.full((PIECE,), 2147483647, tl.int64)
    highest = tl.full((PIECE,), -1, tl.int64)
    for start in range(0, held, PIECE):
        live = start + place < held
        key = _key(tl.load(bits_ptr + start + place, mask=live, other=0).to(tl.float32, bitcast=True))
        token = tl.load(ids_ptr + start + place, mask=live, other=0).to(tl.int64)
        lowest = tl.minimum(lowest, tl.where(live & (key == low), token, 2147483647))
        highest = tl.maximum(highest, tl.where(live & (key == low), token, -1))
    first = tl.min(lowest, 0)
    last = tl.max(highest, 0)
    while first < last:
        width = (last - first) // 16 + 1
        sums = tl.zeros((16, PIECE), tl.int64)
        for start in range(0, held, PIECE):
            live = start + place < held
            x = tl.load(bits_ptr + start + place, mask=live, other=0).to(tl.float32, bitcast=True)
            token = tl.load(ids_ptr + start + place, mask=live, other=0).to(tl.int64)
            along = token - first
            mass = tl.where(live & (_key(x) == low) & (along >= 0) & (along <= last - first), _mass(x, most), 0)
            sums += tl.where(
                (along.to(tl.uint32) // width.to(tl.uint32)).to(tl.int32)[None, :] == digit[:, None], mass[None, :], 0
            )
        number, target = _pick(tl.sum(sums, 1), target)
        first = first + number * width
        last = tl.minimum(last, first + width - 1)
    tl.store(border_ptr + row, tl.minimum(first, vocab - 1))  # of a row where all is forbidden, any
