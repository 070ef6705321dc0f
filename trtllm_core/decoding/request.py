"""Requests, and what comes back of each step."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtllm_core.config import SamplingConfig
from trtllm_core.lora import Adapter
from trtllm_core.plugin import LogitsProcessor, StoppingCriterion
from trtllm_core.prompt_table import VirtualTokens

if TYPE_CHECKING:
    import torch


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
    context_logits: bool = False
    """Whether the logits of its prompt are kept."""
    generation_logits: bool = False
    """Whether the logits that its tokens are chosen from are kept."""
    streaming: bool = True
    """Whether deltas tell its tokens as they come. Without, only what it left at its end is good."""
    seed: int = field(init=False)
    """The seed that is used: the user's, or one drawn now."""
    _own: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        seed = self.sampling.random_seed
        if self.scores_prompt:
            object.__setattr__(self, "_own", secrets.randbits(63))
        object.__setattr__(self, "seed", secrets.randbits(63) if seed is None else seed)

    def with_seed(self, seed: int) -> Request:
        """The same request, with another seed."""
        one = copy.copy(self)
        object.__setattr__(one, "seed", seed)
        return one

    @property
    def scores_prompt(self) -> bool:
        """Whether it wants logits or log-probabilities of its prompt. Then all of the prompt is computed."""
        return self.context_logits or self.sampling.prompt_logprobs is not None

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
        if self.scores_prompt:  # what is cached has no logits: nobody else's prefix is its own
            parts.append(("own", self._own))
        return tuple(parts)


@dataclass(slots=True)
class Delta:
    """What one step added to, or changed in, one sequence of a request.

    One is made a row and a step: a frozen class would take three times as long.
    """

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
    context_logits: torch.Tensor | None = None
    """float32 ``[prompt, vocab_size_padded]``: in the first delta of a request, where the engine gathers them."""
    generation_logits: torch.Tensor | None = None
    """float32 ``[tokens, vocab_size_padded]``: what ``tokens`` were chosen from, where the engine gathers it."""
    prompt_log_probs: tuple[float, ...] = ()
    """Of the prompt's tokens, where asked for: in the first delta of a request."""
    prompt_top_log_probs: tuple[Mapping[int, float], ...] = ()
    """Beside each of them, where asked for."""
