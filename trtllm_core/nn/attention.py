"""The attention layer: the only layer that knows that there is a cache."""

from __future__ import annotations

from typing import Protocol

import torch

from trtllm_core.nn.layer import Layer


class AttentionContext(Protocol):
    """What a backend hands to a family's module: the tokens of this call and their cache."""

    positions: torch.Tensor
    """int64, shaped like ``input_ids``: the rotary position of each token."""

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """Write keys and values to the cache of ``layer.index`` and let each query see its own sequence up to itself.

        ``qkv [..., heads + 2 * kv_heads, head_size]``: queries, keys and values of each token side by side, as a fused
        product gives them, leading dimensions as ``input_ids``. Returns ``[..., heads * head_size]``.
        """
        ...


class Attention(Layer):
    """Scaled dot-product attention over the cache of one layer; grouped queries where ``kv_heads < heads``.

    ``sliding_window`` lets a token see that many tokens, itself included. Head counts are this rank's.
    """

    def __init__(
        self,
        index: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float | None = None,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        self.index = index
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = head_size**-0.5 if scale is None else scale
        self.sliding_window = sliding_window

    def forward(self, qkv: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """As ``AttentionContext.attend``."""
        return context.attend(self, qkv)
