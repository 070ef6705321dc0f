"""The shape of a model, as far as the generation loop and the KV cache need to know it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from trtllm_core.config.base import Config

DType = Literal["float32", "bfloat16", "float16"]
KVDType = Literal["float32", "bfloat16", "float16", "fp8", "int8"]
"""How keys and values are cached: as numbers, or as codes of one byte (fp8 is e4m3) with a scale for each token and
head."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
SCALE_BYTES = {"fp8": 4, "int8": 4}
"""Beside the codes of one head of a token's key, or of its value."""


class ModelConfig(Config):
    """What every family has in common. What only one family knows lives in ``extras``, which that family validates.

    Head and layer counts are those of the whole model, never of one rank.
    """

    family: str = Field(description="name under which the family plugin registered, such as 'llama'")
    architecture: str = Field(description="architecture named by the checkpoint, such as 'LlamaForCausalLM'")
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_size: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0, description="longest sequence that the checkpoint was made for")
    sliding_window: int | None = Field(default=None, gt=0, description="tokens that a query sees, itself included")
    dtype: DType = "float32"
    extras: dict[str, Any] = Field(default_factory=dict, description="validated by the family")

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        return self

    def kv_bytes_per_token(self, dtype: str | None = None, tp_size: int = 1) -> int:
        """Bytes of keys and values that one token takes on one rank, over all layers."""
        heads, kind = max(self.num_kv_heads // tp_size, 1), dtype or self.dtype
        return 2 * self.num_layers * heads * (self.head_size * BYTES[kind] + SCALE_BYTES.get(kind, 0))
