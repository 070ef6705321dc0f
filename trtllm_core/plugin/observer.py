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
    timestamp: float = 0.0
    """When it was over, in seconds since the epoch. This, and what follows, since observer 1.1."""
    active_requests: int = 0
    """Requests that have started and not ended, after the step."""
    max_active_requests: int = 0
    """How many there can be."""
    queued_requests: int = 0
    """Requests that wait for their start."""
    paused_requests: int = 0
    """Of the active ones, those that gave their cache back and wait for room."""
    context_requests: int = 0
    """Requests of which the step ran a part of the prompt."""
    generation_requests: int = 0
    """Requests of which the step ran generated tokens."""
    new_requests: int = 0
    """Requests that started with the step."""
    new_requests_queue_seconds: float = 0.0
    """How long these had waited, added up."""
    completed_requests: int = 0
    """Requests that ended in the step, or since the step before it, whatever the reason."""
    preemptions: int = 0
    """Requests that had to give their cache back for the step."""
    kv_blocks_total: int = 0
    kv_blocks_cached: int = 0
    """Of the free ones, those that are kept for reuse."""
    tokens_per_block: int = 0
    companion_tokens: int = 0
    """Tokens of companions, which are not counted among the others, as their rows are not."""


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
    priority: int = 0
    """This, and what follows, since observer 1.1."""
    queue_seconds: float = 0.0
    """From its arrival to its start, or to its end where it never started."""
    first_token_seconds: float | None = None
    """From its arrival to its first token; None: there was none."""
    seconds: float = 0.0
    """From its arrival to its end."""
    drafted_tokens: int = 0
    """Tokens that were run on trial."""
    accepted_tokens: int = 0
    """Those of them that became text."""
