"""Requests, their live branches, and what comes back."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trtllm_core.config import SamplingConfig
from trtllm_core.decoding.plan import Plan
from trtllm_core.plugin import LogitsProcessor, Stop, StoppingCriterion


@dataclass(frozen=True)
class Request:
    """What a user asks for."""

    request_id: str
    prompt: Sequence[int]
    sampling: SamplingConfig
    processors: Sequence[LogitsProcessor] = ()
    """Logits processors passed as objects, beside those that ``sampling`` names."""
    criteria: Sequence[StoppingCriterion] = ()
    text: bool = False
    """Whether deltas carry text. Needs an engine with a tokenizer."""
    seed: int = field(init=False)
    """The seed that is used: the user's, or one drawn now."""

    def __post_init__(self) -> None:
        seed = self.sampling.random_seed
        object.__setattr__(self, "seed", secrets.randbits(63) if seed is None else seed)

    @property
    def reuse_key(self) -> tuple[Any, ...]:
        """All that cached keys and values depend on besides the tokens: requests share them where it is equal."""
        salt = self.sampling.cache_salt
        return () if salt is None else (("salt", salt),)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one request."""

    request_id: str
    tokens: tuple[int, ...]
    """New tokens, the one that ended it included."""
    text: str = ""
    """New text, where the request asked for it: whole characters only, nothing that a stop string may yet cut."""
    finish_reason: str | None = None
    """Why the request ended with this delta; None: it goes on."""
    log_probs: tuple[float, ...] = ()
    """Of ``tokens``, where asked for."""
    error: Exception | None = None
    """What a plugin raised, where ``finish_reason`` is ``plugin_error``."""


@dataclass(slots=True)
class Branch:
    """One live sequence of a request."""

    request: Request
    plan: Plan
    slot: int
    number: int = 0
    cached_prompt: int = 0
    """Tokens of its prompt that were in the cache when it started."""
    generated: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""
    """Text that deltas have carried."""
    stop: Stop | None = None
    finish_reason: str | None = None
    error: Exception | None = None
    plugin_seconds: dict[str, float] = field(default_factory=dict)
    """Its part of each plugin's host time: filled when it leaves its slot."""

    @property
    def length(self) -> int:
        """Tokens of the text: prompt and generated, without an end token."""
        uncounted = self.stop is not None and not self.stop.counted
        return len(self.request.prompt) + len(self.generated) - uncounted

    def finish(self, reason: str, stop: Stop | None = None, error: Exception | None = None) -> None:
        """The branch ends."""
        self.finish_reason, self.stop, self.error = reason, stop, error
