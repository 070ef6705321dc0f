"""Statistics that observers are given. Frozen: observers watch, they change nothing."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SessionStats:
    """A session starts or ends."""

    family: str
    backend: str
    max_batch_size: int
    kv_blocks: int
    kv_bytes: int
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step is over."""

    step: int
    rows: int
    context_tokens: int
    """Prompt tokens that the step ran."""
    generation_tokens: int
    kv_blocks_free: int
    seconds: float
    """Wall time of the step on the host; on CUDA the device may still be running."""


@dataclass(frozen=True, slots=True)
class RequestStats:
    """One request is over."""

    request_id: str
    prompt_tokens: int
    generated_tokens: int
    finish_reason: str
    plugin_seconds: dict[str, float] = field(default_factory=dict)
    """Host seconds that each of its plugins took for it. A call for several requests is shared equally by those that
    use the plugin then."""
    cached_prompt_tokens: int = 0
    """Tokens of its prompt that were found in the KV cache."""
    preemptions: int = 0
    """How often it had to give its cache back, and to compute its text anew."""
