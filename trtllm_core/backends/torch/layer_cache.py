"""Keys and values of one layer: as numbers, or as codes of one byte with a scale for each token and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch


class LayerCache:
    """Numbers, ``data [entries, 2 * kv_heads, head_size]``; entry = block * tokens_per_block + i.

    An entry holds a token's keys and then its values, so that both are written, gathered and copied in one go.
    """

    kind: str | None = None
    """Name in ``CODES``; None: data are numbers."""
    scales: torch.Tensor | None = None
    """float32 ``[blocks, 2 * kv_heads, tokens_per_block]``: what codes are multiplied with."""

    def __init__(self, data: torch.Tensor, tokens_per_block: int) -> None:
        self.data = data
        self.tokens_per_block = tokens_per_block

    def write(self, entries: torch.Tensor, kv: torch.Tensor, which: torch.Tensor | None = None) -> torch.Tensor:
        """Write keys and values ``kv [tokens, 2 * kv_heads, head_size]`` to ``entries`` (int64).

        ``which``, int64: the tokens that are written; None: all. Returns ``kv`` of all tokens as the cache keeps them.
        A query sees each token as it is kept, its own too: so nothing depends on how a sequence was cut into calls.
        """
        self.data.index_copy_(0, entries, kv if which is None else kv[which])
        return kv

    def read(self, entries: slice) -> torch.Tensor:
        """``[entries, 2 * kv_heads, head_size]``: a view where that is possible."""
        return self.data[entries]

    def gather(self, entries: torch.Tensor) -> torch.Tensor:
        """The same of ``entries``, int64."""
        return self.data.index_select(0, entries)

    def blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """All entries of ``blocks``, int64 or int32, one block after the other: ``[blocks * tokens_per_block, ...]``.

        Whole blocks are gathered, as one long row each: far fewer and longer copies than entry by entry.
        """
        rows = self.data.view(self.data.shape[0] // self.tokens_per_block, -1)
        return rows.index_select(0, blocks).view(-1, *self.data.shape[1:])


@dataclass(frozen=True, slots=True)
class Code:
    """A type of codes, and the largest of them: that of an entry's largest number."""

    dtype: torch.dtype
    largest: float


CODES = {"fp8": Code(torch.float8_e4m3fn, 448.0), "int8": Code(torch.int8, 127.0)}
"""By ``kv_dtype``."""

SMALLEST = 1e-30
"""Largest number of a head at least, as far as its scale goes: a head of zeros has a scale, too."""


def largest_of(cache: LayerCache) -> float:
    """The largest code of a cache; 0: it holds numbers."""
    return cache.code.largest if isinstance(cache, QuantizedCache) else 0.0


def quantize(kv: torch.Tensor, code: Code) -> tuple[torch.Tensor, torch.Tensor]:
    """``kv [tokens, heads, head_size]`` as codes, and their scales, float32 ``[tokens, heads]``: to the nearest code,
    ties to even. Where a number is NaN or infinite, all of its head become NaN."""
    wide = kv.float()
    scales = wide.abs().amax(-1).clamp_(min=SMALLEST) / code.largest
    ratio = wide / scales[..., None]
    return (ratio.round_() if code.dtype == torch.int8 else ratio).to(code.dtype), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``codes [..., head_size]`` times ``scales [...]``, in float32 and then as ``dtype``."""
    return (codes.float() * scales[..., None]).to(dtype)


class QuantizedCache(LayerCache):
    """Codes, ``data [entries, 2 * kv_heads, head_size]``, and their scales.

    A scale is of one token's key, or value, in one head. So an entry depends on nothing but its token: what is copied,
    moved, shared or computed again has the same codes, and nothing must be calibrated.

    Args:
        data: codes.
        scales: see ``LayerCache``; of the same blocks.
        kind: of codes.
        dtype: of what is read.
    """

    scales: torch.Tensor

    def __init__(self, data: torch.Tensor, scales: torch.Tensor, kind: str, dtype: torch.dtype) -> None:
        super().__init__(data, scales.shape[-1])
        self.scales = scales
        self.kind = kind
        self.code = CODES[kind]
        self.dtype = dtype
        self._bytes = data.view(torch.uint8)  # PyTorch copies and gathers no fp8

    def write(self, entries: torch.Tensor, kv: torch.Tensor, which: torch.Tensor | None = None) -> torch.Tensor:
        """See ``LayerCache``."""
        codes, scales = quantize(kv, self.code)
        seen = dequantize(codes, scales, self.dtype)
        raw = codes.view(torch.uint8)
        if which is not None:
            raw, scales = raw[which], scales[which]
        self._bytes.index_copy_(0, entries, raw)
        size = self.tokens_per_block
        self.scales[entries // size, :, entries % size] = scales
        return seen

    def read(self, entries: slice) -> torch.Tensor:
        """See ``LayerCache``; always a copy."""
        size = self.tokens_per_block
        first = entries.start // size
        scales = self.scales[first : -(-entries.stop // size)].transpose(1, 2).flatten(0, 1)
        scales = scales[entries.start - first * size : entries.stop - first * size]
        return dequantize(self.data[entries], scales, self.dtype)

    def gather(self, entries: torch.Tensor) -> torch.Tensor:
        """See ``LayerCache``."""
        size = self.tokens_per_block
        return self._dequantized(self._bytes.index_select(0, entries), self.scales[entries // size, :, entries % size])

    def blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """See ``LayerCache``."""
        raw = self._bytes.view(len(self.scales), -1).index_select(0, blocks).view(-1, *self.data.shape[1:])
        return self._dequantized(raw, self.scales.index_select(0, blocks).transpose(1, 2).flatten(0, 1))

    def _dequantized(self, raw: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return dequantize(raw.view(self.code.dtype), scales, self.dtype)
