"""Requests, and what comes back of each step."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtllm_core.config import SamplingConfig
from trtllm_core.lora import Adapter
from trtllm_core.plugin import LogitsProcessor, StoppingCriterion
from trtllm_core.prompt_table import VirtualTokens


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
    adapter: Adapter | None = None
    """The LoRA adapter that it runs with."""
    virtual: VirtualTokens | None = None
    """What token ids beyond the vocabulary stand for in its prompt."""
    seed: int = field(init=False)
    """The seed that is used: the user's, or one drawn now."""

    def __post_init__(self) -> None:
        seed = self.sampling.random_seed
        object.__setattr__(self, "seed", secrets.randbits(63) if seed is None else seed)

    @property
    def reuse_key(self) -> tuple[Any, ...]:
        """All that cached keys and values depend on besides the tokens: requests share them where it is equal."""
        salt, parts = self.sampling.cache_salt, list[tuple[str, Any]]()
        if salt is not None:
            parts.append(("salt", salt))
        if self.adapter is not None:
            parts.append(("lora", self.adapter.serial))
        if self.virtual is not None:
            parts.append(("prompt_table", self.virtual.key))
        return tuple(parts)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to, or changed in, one sequence of a request."""

    request_id: str
    tokens: tuple[int, ...]
    """New tokens, the one that ended it included."""
    text: str = ""
    """New text, where the request asked for it: whole characters only, nothing that a stop string may yet cut."""
    finish_reason: str | None = None
    """Why the sequence ended with this delta; None: it goes on."""
    log_probs: tuple[float, ...] = ()
    """Of ``tokens``, where asked for."""
    error: Exception | None = None
    """What a plugin raised, where ``finish_reason`` is ``plugin_error``."""
    sequence: int = 0
    """Which of the sequences that the request returns."""
    keep: int | None = None
    """None: append. A number: the sequence is revised, as a search does. Only its first ``keep`` tokens stay (the
    stable prefix), and ``tokens`` follow them."""
    keep_text: int = 0
    """With ``keep``: how many characters of its text stay, before ``text``."""
    top_log_probs: tuple[Mapping[int, float], ...] = ()
    """Beside each of ``tokens``, where asked for (``num_logprobs``): token to log-probability, the likeliest first."""
