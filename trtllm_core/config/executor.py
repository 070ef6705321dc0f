"""How an executor schedules, and how much it remembers."""

from __future__ import annotations

from pydantic import Field

from trtllm_core.config.base import Config


class ExecutorConfig(Config):
    """Limits of an ``Executor``. What the engine was built for bounds them, too."""

    max_queue_size: int = Field(
        default=10_000, ge=1, description="requests that wait for their start; more are refused when they come"
    )
    max_batch_size: int | None = Field(
        default=None, ge=1, description="requests that are under way at a time; None: as many as have slots"
    )
    max_num_tokens: int | None = Field(
        default=None, ge=1, description="tokens that a step runs at most; None: as many as the engine takes"
    )
    priority_seconds: float | None = Field(
        default=60.0,
        gt=0,
        description="seconds of waiting that one priority is worth, so that nobody waits forever; None: a request "
        "never starts before all of higher priority",
    )
    iter_stats_max_iterations: int = Field(
        default=1000, ge=0, description="latest steps whose statistics are kept until they are asked for; 0: none"
    )
    request_stats_max_requests: int = Field(
        default=1000, ge=0, description="latest ended requests whose statistics are kept; 0: none"
    )
