"""How an engine is built, and what its ``config.json`` records."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from trtllm_core.config.base import Config
from trtllm_core.config.model import DType, KVDType, ModelConfig
from trtllm_core.config.quantization import Quantization, QuantizationConfig

FORMAT_VERSION = 1
"""Version of the engine directory's layout. Raised when an older core could misread a newer engine."""

_MAX_LORAS = 4

Contract = Literal["packed_paged", "padded_linear"]


class BuildConfig(Config):
    """Limits and choices of one build. Sizes are in tokens."""

    backend: str = "torch"
    dtype: DType | None = Field(default=None, description="None keeps the checkpoint's own floating-point type")
    kv_dtype: KVDType | None = Field(
        default=None, description="of cached keys and values: fp8 or int8; None: the engine's dtype"
    )
    max_batch_size: int = Field(default=8, ge=1, le=65536)
    max_input_len: int = Field(default=1024, ge=1)
    max_seq_len: int = Field(default=2048, ge=2, description="prompt and generated tokens together")
    max_num_tokens: int = Field(default=4096, ge=1, description="most tokens that one step may run")
    max_beam_width: int = Field(default=1, ge=1, le=64, description="most branches that a search may have")
    tokens_per_block: int = Field(default=64, ge=1, le=1024)
    tp_size: int = Field(default=1, ge=1)
    gather_context_logits: bool = Field(default=False, description="results carry the logits of every prompt token")
    gather_generation_logits: bool = Field(
        default=False, description="results carry the logits that tokens were chosen from, before processors"
    )
    max_prompt_embedding_table_size: int = Field(
        default=0, ge=0, description="most rows of a request's prompt table, over all its tasks; 0 takes none"
    )
    max_lora_rank: int = Field(default=0, ge=0, le=4096, description="largest rank of an adapter; 0 takes none")
    max_loras: int = Field(default=_MAX_LORAS, ge=1, le=1024, description="adapters that are loaded at once")
    lora_target_modules: tuple[str, ...] = Field(
        default=(), description="layers that adapters may change, by the checkpoint's or the classic names; empty: all"
    )
    quantization: QuantizationConfig | None = Field(default=None, description="None keeps weights in the dtype")
    options: dict[str, Any] = Field(default_factory=dict, description="validated by the backend")

    @model_validator(mode="before")
    @classmethod
    def _default_input_len(cls, data: Any) -> Any:
        """A max_input_len that nobody asked for gives way to a short max_seq_len."""
        longest = data.get("max_seq_len") if isinstance(data, dict) else None
        if isinstance(longest, int) and "max_input_len" not in data:
            default = cls.model_fields["max_input_len"].default
            data = {**data, "max_input_len": max(min(default, longest - 1), 1)}
        return data

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.max_input_len >= self.max_seq_len:
            raise ValueError(
                f"max_input_len ({self.max_input_len}) must be below max_seq_len ({self.max_seq_len}), "
                "or no token could be generated"
            )
        if self.max_num_tokens < self.max_branches:
            beams = f" times max_beam_width ({self.max_beam_width})" if self.max_beam_width > 1 else ""
            raise ValueError(
                f"max_num_tokens ({self.max_num_tokens}) must be at least max_batch_size ({self.max_batch_size}){beams}"
            )
        if not self.max_lora_rank and (self.lora_target_modules or self.max_loras != _MAX_LORAS):
            raise ValueError("max_loras and lora_target_modules need max_lora_rank, the largest rank of an adapter")
        return self

    @property
    def max_branches(self) -> int:
        """Live sequences that run together, each of them in a slot: ``max_batch_size`` times ``max_beam_width``."""
        return self.max_batch_size * self.max_beam_width


class Provider(Config):
    """Who provided a part of an engine: a registered name, and the distribution that it came from."""

    name: str
    distribution: str
    version: str


class RankFile(Config):
    """One rank's engine on disk."""

    name: str
    bytes: int = Field(ge=0)
    companions: tuple[RankFile, ...] = Field(default=(), description="files beside it that it needs, such as weights")

    @property
    def total_bytes(self) -> int:
        """Bytes of the file and of those that it needs."""
        return self.bytes + sum(file.total_bytes for file in self.companions)


class LoraLayer(Config):
    """A linear layer that adapters may change, in sizes of the whole model."""

    inputs: int = Field(gt=0)
    rows: tuple[int, ...] = Field(description="output features that each tensor of the weight map makes, in order")


class EngineConfig(Config):
    """``config.json`` of an engine directory: all that must be known, and checked, before weights are touched."""

    format_version: int = FORMAT_VERSION
    core_version: str
    family: Provider
    backend: Provider
    contract: Contract
    model: ModelConfig
    build: BuildConfig
    ranks: tuple[RankFile, ...] = ()
    lora_layers: dict[str, LoraLayer] = Field(
        default_factory=dict, description="layers that adapters may change, by their names in the family's module"
    )
    quantization: Quantization | None = Field(default=None, description="how layers are stored; None: in the dtype")
    record: dict[str, Any] = Field(default_factory=dict, description="what the backend says of the build")
    source: str = Field(default="", description="what it was built from, for people")
    source_digest: str = Field(default="", description="fingerprint of the checkpoint's files")

    @property
    def kv_dtype(self) -> KVDType:
        """How keys and values are cached."""
        return self.build.kv_dtype or self.model.dtype

    @property
    def vocab_size_padded(self) -> int:
        """Vocabulary rounded up to a multiple of the tensor-parallel size, as the logits have it."""
        size = self.build.tp_size
        return -(-self.model.vocab_size // size) * size


class KVCacheConfig(Config):
    """How much room the KV cache takes, and who manages it."""

    policy: str | None = Field(
        default=None,
        description="a registered KV allocation policy; None: paged, or contiguous over linear caches",
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="tokens of room; None holds max_batch_size times max_beam_width of max_seq_len"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="validated by the policy")
