"""A family's module over padded rows and linear caches: run eagerly, or traced for export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from trtllm_core.backends.linear import ops
from trtllm_core.backends.linear.grouped import grouped_attention
from trtllm_core.backends.linear.watching import watching
from trtllm_core.nn import Alibi, Attention, RotaryEmbedding

UNSEEN = -1e4
"""Added to the score of an entry that a query does not see, where biases make the mask: float16 holds it."""

AttentionKind = Literal["mask", "lower_right", "grouped"]
"""How queries are kept from later entries: by an explicit mask, or by the kernel from the rows' lengths.

``grouped`` is ONNX Runtime's kernel, which rotates and writes the cache as well.
"""


class LinearContext:
    """The ``AttentionContext`` of one padded call. All that it knows follows from where each row writes.

    Args:
        input_ids: int64 ``[batch, tokens]``.
        write_indices: int64 ``[batch]``: entries in each row's cache before this call.
        entries: how many entries of the caches attention looks at, at least ``max(write_indices) + tokens``.
        caches: keys and values of each layer in turn, ``[batch, kv_heads, capacity, head_size]``.
        kind: of attention; other than ``mask`` only where no layer needs one, see ``kind_for``.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        write_indices: torch.Tensor,
        entries: int,
        caches: Sequence[torch.Tensor],
        kind: AttentionKind,
    ) -> None:
        tokens = input_ids.shape[1]
        self.positions = write_indices[:, None] + torch.arange(tokens, device=input_ids.device)
        self.caches = list(caches)
        """As ``caches``; each is replaced by its updated form when its layer has run."""
        self._write, self._lengths = write_indices, write_indices + tokens
        self._entries, self._kind = entries, kind
        self._last: torch.Tensor | None = None
        self._longest = self._lengths
        self._masks: dict[tuple[int | None, Alibi | None], torch.Tensor] = {}
        self._ropes: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        """See ``AttentionContext``. ``qkv [batch, tokens, heads + 2 * kv_heads, head_size]``."""
        if self._kind == "grouped":
            return self._grouped(layer, qkv)
        heads, kv = layer.num_heads, layer.num_kv_heads
        qkv = qkv.transpose(1, 2)
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv], qkv[:, heads + kv :]
        if layer.rotary is not None:
            q, k = self._turn(layer, q), self._turn(layer, k)
        key, value = 2 * layer.index, 2 * layer.index + 1
        self.caches[key] = ops.kv_update(self.caches[key], k, self._write)
        self.caches[value] = ops.kv_update(self.caches[value], v, self._write)
        out = self._attention(
            layer, q * layer.scale, self.caches[key][:, :, : self._entries], self.caches[value][:, :, : self._entries]
        )
        return out.transpose(1, 2).flatten(2)

    def _attention(self, layer: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor
        if self._kind == "lower_right":
            out = ops.attention_lower_right(q, k, v, self._lengths)
        else:
            out = ops.attention_masked(q, k, v, self._mask(layer, q.dtype), layer.softcap or 0.0)
        return out

    def _grouped(self, layer: Attention, qkv: torch.Tensor) -> torch.Tensor:
        key, value = 2 * layer.index, 2 * layer.index + 1
        cos, sin = (None, None) if layer.rotary is None else self._rope(layer.rotary)
        if self._last is None:
            self._last = (self._lengths - 1).int()
            self._longest = self._lengths.max().int()
        out: torch.Tensor
        out, self.caches[key], self.caches[value] = grouped_attention(
            qkv,
            self.caches[key],
            self.caches[value],
            self._last,
            self._longest,
            cos,
            sin,
            layer.scale,
            layer.sliding_window or -1,
            layer.softcap or 0.0,
        )
        return out

    def _turn(self, layer: Attention, x: torch.Tensor) -> torch.Tensor:
        rotary = layer.rotary
        assert rotary is not None
        turned: torch.Tensor = ops.rotary(x, *self._rope(rotary), self.positions, rotary.dim)
        return turned

    def _rope(self, rotary: RotaryEmbedding) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of half a head, once for all layers that share them."""
        assert rotary.table is not None, "prepare() comes first"
        if rotary not in self._ropes:
            half = rotary.dim // 2
            self._ropes[rotary] = rotary.table[:, :half].contiguous(), rotary.table[:, -half:].contiguous()
        return self._ropes[rotary]

    def _mask(self, layer: Attention, dtype: torch.dtype) -> torch.Tensor:
        """Made once for all layers that have the same window and biases."""
        key = layer.sliding_window, layer.alibi
        if key not in self._masks:
            offset = torch.arange(self._entries, device=self.positions.device) - self.positions[:, :, None]
            seen = offset <= 0
            if layer.sliding_window is not None:
                seen = seen & (offset > -layer.sliding_window)
            mask = seen.unsqueeze(1)
            if layer.alibi is not None:
                # Relative to the query, so that numbers are small where they matter.
                bias = layer.alibi(offset).transpose(1, 2)
                mask = torch.where(mask, bias, UNSEEN).to(dtype)
            self._masks[key] = mask
        return self._masks[key]


def kind_for(module: nn.Module, wanted: AttentionKind) -> AttentionKind:
    """``wanted``, unless a layer needs a mask: then all layers have one, because a graph has one kind of attention."""
    attentions = (layer for layer in module.modules() if isinstance(layer, Attention))
    suits = _suits_grouped if wanted == "grouped" else _is_plain
    return wanted if all(suits(layer) for layer in attentions) else "mask"


def _is_plain(layer: Attention) -> bool:
    return layer.sliding_window is None and layer.alibi is None and layer.softcap is None


def _suits_grouped(layer: Attention) -> bool:
    """The kernel has windows and caps, and wants whole vectors of 16 bytes in a head and in what is rotated of it."""
    rotated = 0 if layer.rotary is None else layer.rotary.dim
    return layer.alibi is None and layer.head_size % 8 == 0 and rotated % 16 == 0


class LinearModule(nn.Module):
    """A family's module with the tensors of the padded, linear contract as its inputs and outputs."""

    def __init__(self, module: nn.Module, kind: AttentionKind, watched: Sequence[str] = ()) -> None:
        super().__init__()
        self.module: Any = module
        self.kind: AttentionKind = kind
        self.watched = tuple(watched)
        """Modules inside whose outputs are outputs too."""

    def forward(
        self,
        input_ids: torch.Tensor,
        write_indices: torch.Tensor,
        logit_indices: torch.Tensor,
        past: list[torch.Tensor],
        cache_entries: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Logits, float32 ``[batch, n, vocab]`` at ``logit_indices`` (int64 ``[batch, n]``), the updated caches, and
        what the watched modules gave.

        Of ``cache_entries`` (``[entries]``) only the length counts, see ``LinearContext``; None: all of the caches.
        """
        entries = past[0].shape[2] if cache_entries is None else cache_entries.shape[0]
        context = LinearContext(input_ids, write_indices, entries, past, self.kind)
        with watching(self.module, self.watched) as found:
            hidden = self.module(input_ids, context)
            hidden = hidden.gather(1, logit_indices.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
            logits = self.module.logits(hidden).float()
        return logits, *context.caches, *(found[name] for name in self.watched)
