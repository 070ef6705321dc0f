"""The policy: a ring with sinks, in which positions are those within the cache (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from trtllm_core.kv_cache import PagedOptions, PagedPolicy
from trtllm_core.plugin import KVBudget, KVModel, KVPlan


class StreamingOptions(PagedOptions):
    """``KVCacheConfig.options``."""

    max_attention_window: int | None = Field(default=1024, ge=1, description="tokens that a slot keeps, sinks included")
    sink_token_length: int = Field(default=4, ge=0, description="first tokens, which are never given up")


class StreamingPolicy(PagedPolicy):
    """The paged policy's ring; the newest token of a full cache is at its last position, however long the text."""

    Options: ClassVar[type[StreamingOptions]] = StreamingOptions

    def plan(self, model: KVModel, budget: KVBudget) -> KVPlan:
        """See ``KVPolicy.plan``."""
        return replace(super().plan(model, budget), positions="cache")
