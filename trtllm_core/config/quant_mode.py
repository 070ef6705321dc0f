"""The classic flags for what of an engine is quantised."""

from __future__ import annotations

from enum import IntFlag, auto

from trtllm_core.config.engine import EngineConfig


class QuantMode(IntFlag):
    """As the classic runtime named and numbered them. An engine's own config says more: see ``Quantization``."""

    INT4_WEIGHTS = auto()
    INT8_WEIGHTS = auto()
    ACTIVATIONS = auto()
    PER_CHANNEL = auto()
    PER_TOKEN = auto()
    PER_GROUP = auto()
    INT8_KV_CACHE = auto()
    FP8_KV_CACHE = auto()
    FP8_QDQ = auto()

    def has_any_quant(self, exclude_kv_cache: bool = False) -> bool:
        """Whether anything is quantised; ``exclude_kv_cache``: beside the KV cache."""
        kv = QuantMode.INT8_KV_CACHE | QuantMode.FP8_KV_CACHE
        return bool(self & ~kv if exclude_kv_cache else self)

    def has_kv_cache_quant(self) -> bool:
        """Whether the KV cache is."""
        return bool(self & (QuantMode.INT8_KV_CACHE | QuantMode.FP8_KV_CACHE))


def quant_mode(config: EngineConfig) -> QuantMode:
    """Of an engine: a flag for each number of bits of its layers, so that int4 beside a head of 8 bits has two."""
    mode = QuantMode(0)
    if config.kv_dtype == "int8":
        mode |= QuantMode.INT8_KV_CACHE
    elif config.kv_dtype == "fp8":
        mode |= QuantMode.FP8_KV_CACHE
    wish = config.build.quantization
    per_row = wish is not None and wish.group_size == 0
    for layer in () if config.quantization is None else config.quantization.layers.values():
        if layer.form == "float8":
            mode |= QuantMode.FP8_QDQ
        else:
            mode |= QuantMode.INT4_WEIGHTS if layer.bits == 4 else QuantMode.INT8_WEIGHTS
            mode |= QuantMode.PER_CHANNEL if per_row else QuantMode.PER_GROUP
    return mode
