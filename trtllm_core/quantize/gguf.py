"""The codes of GGUF files, taken over bit for bit.

A block of 32 elements is, in bytes: Q4_0: scale (float16), 16 of codes; Q4_1: scale, offset (float16), 16 of codes;
Q8_0: scale, 32 of codes, signed. Of 4-bit codes the first half of a block lies in the bytes' lower halves.
"""

from __future__ import annotations

import torch

from trtllm_core.config import QuantizedLayer
from trtllm_core.config.quantization import Form
from trtllm_core.quantize.weight import QuantizedWeight, pack

GGUF_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""Bits of a code, by the types that can be taken over."""

GGUF_GROUP = 32


def gguf_form(stored: str) -> Form:
    """What a type's codes are worth."""
    return "offsets" if stored == "Q4_1" else "symmetric"


def from_gguf(raw: torch.Tensor, stored: str) -> QuantizedWeight:
    """A tensor's blocks, uint8 ``[out, bytes]``, as codes and scales; dequantised they are gguf's values to the bit.

    Args:
        raw: as in the file.
        stored: one of ``GGUF_BITS``.
    """
    bits, form = GGUF_BITS[stored], gguf_form(stored)
    header = 4 if form == "offsets" else 2
    blocks = raw.reshape(raw.shape[0], -1, header + GGUF_GROUP * bits // 8)
    numbers = blocks[..., :header].contiguous().view(torch.float16).float()
    body = blocks[..., header:]
    codes = body ^ 128 if bits == 8 else pack(torch.cat((body & 15, body >> 4), -1))
    layer = QuantizedLayer(bits=bits, group_size=GGUF_GROUP, form=form)  # type: ignore[arg-type]
    offsets = numbers[..., 1].contiguous() if form == "offsets" else None
    return QuantizedWeight(layer, codes.contiguous(), numbers[..., 0].contiguous(), None, offsets)


def widened(weight: QuantizedWeight, layer: QuantizedLayer) -> QuantizedWeight:
    """The same values in another layer's form: more bits, or offsets, as fused layers need whose parts differ.

    Offsets that symmetric codes get, ``-scale * middle``, are exact; the sum with ``scale * code`` may round.
    """
    codes, offsets = weight.numbers(), weight.offsets
    if layer.form == "offsets" and offsets is None:
        offsets = weight.scales * -weight.middle
    if layer.bits == 8 and layer.form == "symmetric" and weight.layer.bits == 4:
        codes = codes + (128 - weight.middle)
    return QuantizedWeight(layer, codes if layer.bits == 8 else pack(codes), weight.scales, None, offsets)
