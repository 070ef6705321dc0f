"""``KVCacheConfig.options`` of the built-in policies."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from trtllm_core.config import Config
from trtllm_core.plugin.eviction import EvictionOrder


class BlockOptions(Config):
    """What all policies that hand out blocks on demand have in common."""

    admission: Literal["worst_case", "optimistic"] = Field(
        default="worst_case",
        description="what a request must find before it starts: room for all that it may generate, or for its prompt "
        "alone; in the second case one that runs out is put off and computed anew",
    )
    watermark: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="share of the pool that admission leaves free, for forks to grow into"
    )


class PagedOptions(BlockOptions):
    """Of the ``paged`` policy."""

    max_attention_window: int | None = Field(
        default=None, ge=1, description="entries of a slot's cache, then the oldest are overwritten; None keeps all"
    )
    sink_token_length: int = Field(default=0, ge=0, description="first tokens of a slot that are never overwritten")
    follow_sliding_window: bool = Field(
        default=True,
        description="whether a model all of whose layers see a window of tokens alone gets a ring that holds no more",
    )

    @model_validator(mode="after")
    def _ring(self) -> Self:
        if self.sink_token_length and self.max_attention_window is None:
            raise ValueError("sink_token_length only means something with max_attention_window, which is not set")
        if self.max_attention_window is not None and self.sink_token_length >= self.max_attention_window:
            raise ValueError(
                f"sink_token_length ({self.sink_token_length}) must be below "
                f"max_attention_window ({self.max_attention_window}), or no new token could be kept"
            )
        return self


class PrefixOptions(BlockOptions):
    """Of the ``prefix`` policy."""

    eviction: str | type[EvictionOrder] = Field(
        default="lru", description="which kept block goes first: lru, lfu, fifo, priority, or 'package.module:Class'"
    )
    partial_blocks: bool = Field(
        default=True, description="whether the beginning of a kept block is reused, too; it is copied"
    )
    host_tokens: int = Field(
        default=0,
        ge=0,
        description="tokens of given-up blocks that the host's memory keeps, to be copied back when they are found",
    )
    wait_for_prefix: bool = Field(
        default=True, description="whether a request waits while another one computes what it could reuse"
    )
