"""Codes of quantised weights as float32, four bytes of them at a time, and their products."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _float(words, K: tl.constexpr):
    """Number ``K`` of e4m3 of each word, divided by 2 ** 120: its bits are those of a float32, but for the exponent's
    upper half. A shift that keeps the sign brings the rest in place."""
    return (((words << (24 - 8 * K)) >> 4) & -0x78100000).to(tl.float32, bitcast=True)


@triton.jit
def _floats(words, PTX: tl.constexpr):
    """The four numbers of e4m3 of each word. ``PTX``: by the instruction that converts two, which has no name in Triton
    and is nothing that its interpreter knows."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high, a, b, c, d;
            .reg .b32 two, more;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 two, low;
            cvt.rn.f16x2.e4m3x2 more, high;
            mov.b32 {a, b}, two;
            mov.b32 {c, d}, more;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            }""",
            "=f,=f,=f,=f,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    up: tl.constexpr = 1.329227995784916e36
    return _float(words, 0) * up, _float(words, 1) * up, _float(words, 2) * up, _float(words, 3) * up


@triton.jit
def _numbers(words, K: tl.constexpr, BITS: tl.constexpr, one):
    """Code number ``K`` of each word, as ``1 + code / 2 ** BITS``: the bits after the point are the code's."""
    place: tl.constexpr = 23 - BITS - K * BITS
    mask: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    moved = words << place if place >= 0 else words >> -place
    return ((moved & mask) | one).to(tl.float32, bitcast=True)


@triton.jit
def word_sums(sums, words, x, WORDS: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, PTX: tl.constexpr, one):
    """``sums [WORDS, rows]`` and the sum of each word's numbers times their ``x [WORDS, 32 / BITS]``; and the sum of
    ``x`` alone, ``[WORDS, 1]``."""
    if BITS == 4:
        even, odd = tl.split(tl.reshape(x, [WORDS, 2, 2, 2]))
        even0, even1 = tl.split(even)
        odd0, odd1 = tl.split(odd)
        x0, x4 = tl.split(even0)
        x2, x6 = tl.split(even1)
        x1, x5 = tl.split(odd0)
        x3, x7 = tl.split(odd1)
        sums += _numbers(words, 0, 4, one) * x0[:, None]
        sums += _numbers(words, 1, 4, one) * x1[:, None]
        sums += _numbers(words, 2, 4, one) * x2[:, None]
        sums += _numbers(words, 3, 4, one) * x3[:, None]
        sums += _numbers(words, 4, 4, one) * x4[:, None]
        sums += _numbers(words, 5, 4, one) * x5[:, None]
        sums += _numbers(words, 6, 4, one) * x6[:, None]
        sums += _numbers(words, 7, 4, one) * x7[:, None]
        plain = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
    else:
        even, odd = tl.split(tl.reshape(x, [WORDS, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        plain = (x0 + x1) + (x2 + x3)
    if FLOAT8:
        w0, w1, w2, w3 = _floats(words, PTX)
        sums += w0 * x0[:, None]
        sums += w1 * x1[:, None]
        sums += w2 * x2[:, None]
        sums += w3 * x3[:, None]
    elif BITS == 8:
        sums += _numbers(words, 0, 8, one) * x0[:, None]
        sums += _numbers(words, 1, 8, one) * x1[:, None]
        sums += _numbers(words, 2, 8, one) * x2[:, None]
        sums += _numbers(words, 3, 8, one) * x3[:, None]
    return sums, plain[:, None]
