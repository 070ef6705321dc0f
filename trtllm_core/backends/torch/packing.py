"""Weights in the layout that oneDNN computes in, for bfloat16 on CPUs with AVX-512."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trtllm_core.nn.linear import MatMul

PACK_FOR_ROWS = 8
"""Rows that the layout is chosen for: decoding with a small batch. It serves any number."""


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing pays: without it, oneDNN rearranges a bfloat16 weight in every call."""
    return device.type == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def packed_linear(weight: torch.Tensor, evict: Callable[[torch.Tensor], None]) -> MatMul:
    """The product with a weight ``[out, in]`` that is packed now.

    ``evict`` is told that the plain weight will hardly be read any more, so that it need not stay in memory beside
    the packed one.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_FOR_ROWS)
    evict(weight)
    product = torch.ops.mkldnn._linear_pointwise.default

    def linear(x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return product(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]

    return linear
