"""``QuantMode``, for scripts that ask. Engines of trtllm-core say in their own config how they were quantised."""

from __future__ import annotations

from enum import IntFlag, auto


class QuantMode(IntFlag):
    """The classic flags."""

    INT4_WEIGHTS = auto()
    INT8_WEIGHTS = auto()
    ACTIVATIONS = auto()
    PER_CHANNEL = auto()
    PER_TOKEN = auto()
    PER_GROUP = auto()
    INT8_KV_CACHE = auto()
    FP8_KV_CACHE = auto()
    FP8_QDQ = auto()

    def has_any_quant(self) -> bool:
        """Whether weights or activations are quantised."""
        kv = QuantMode.INT8_KV_CACHE | QuantMode.FP8_KV_CACHE
        return bool(self & ~kv)

    def has_kv_cache_quant(self) -> bool:
        """Whether the KV cache is."""
        return bool(self & (QuantMode.INT8_KV_CACHE | QuantMode.FP8_KV_CACHE))
