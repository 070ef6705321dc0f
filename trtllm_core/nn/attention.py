"""The attention layer: the only layer that knows that there is a cache."""

from __future__ import annotations

from typing import Protocol

import torch

from trtllm_core.nn.alibi import Alibi
from trtllm_core.nn.layer import Layer
from trtllm_core.nn.rotary import RotaryEmbedding


class AttentionContext(Protocol):
    """What a backend hands to a family's module: the tokens of this call and their cache.

    All that depends on where a token stands is the context's business: rotation, masks, biases of distance. So a
    backend may rotate while it writes, or cache keys as they come and rotate them where they are read.
    """

    positions: torch.Tensor
    """int64, shaped like ``input_ids``: the position of each token, for tables of learned positions."""

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """Write keys and values to the cache of ``layer.index`` and let each query see its own sequence up to itself.

        ``qkv [..., heads + 2 * kv_heads, head_size]``: queries, keys and values of each token side by side, as a fused
        product gives them, not yet rotated, leading dimensions as ``input_ids``. They may be changed in place.
        Returns ``[..., heads * head_size]``.
        """
        ...


class Attention(Layer):
    """Scaled dot-product attention over the cache of one layer; grouped queries where ``kv_heads < heads``.

    A score is ``q · k * scale``, then ``softcap * tanh(score / softcap)`` where there is a cap, then biased by ALiBi.

    Args:
        index: of the layer in the model, and so of its cache.
        num_heads: query heads of this rank.
        num_kv_heads: key/value heads of this rank.
        head_size: elements of a head.
        scale: of the scores; None: ``head_size ** -0.5``.
        sliding_window: how many tokens a token sees, itself included; None: all.
        softcap: bound of the scores' size; None: none.
        rotary: turns queries and keys by their positions. Layers that share one share its table.
        alibi: biases of distance. Layers that share one share its biases.
    """

    def __init__(
        self,
        index: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        *,
        scale: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        rotary: RotaryEmbedding | None = None,
        alibi: Alibi | None = None,
    ) -> None:
        super().__init__()
        self.index = index
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = head_size**-0.5 if scale is None else scale
        self.sliding_window = sliding_window
        self.softcap = softcap
        self.rotary = rotary
        self.alibi = alibi

    def forward(self, qkv: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """As ``AttentionContext.attend``."""
        return context.attend(self, qkv)
