"""DRY ("don't repeat yourself"): the longer the repetition that a token would continue, the dearer the token."""

from __future__ import annotations

import torch
from pydantic import BaseModel, Field

from trtllm_core.device import copy_slots, per_row, recent, texts
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import (
    BranchView,
    DecodingContext,
    DeviceLogitsProcessor,
    LogitsBatch,
    LogitsCapabilities,
    Phase,
)

LONGEST = 50
"""Longer matches are not told apart: by then the penalty is beyond all logits."""


class Dry(DeviceLogitsProcessor):
    """``x[t] −= multiplier · base^(n − allowed_length)``, where ``n >= allowed_length`` is the length of the longest
    end of the text that occurred before with ``t`` after it, within ``range`` tokens and without a breaker in it."""

    phase = Phase.PENALTY
    capabilities = LogitsCapabilities(speculation="per_position", graph_safe=True, needs=frozenset({"text"}))

    class Params(BaseModel, extra="forbid", frozen=True):
        """As in text-generation-webui, where DRY comes from."""

        multiplier: float = Field(default=0.8, ge=0)
        base: float = Field(default=1.75, ge=1)
        allowed_length: int = Field(default=2, ge=1, le=LONGEST, description="repetitions below it cost nothing")
        range: int = Field(default=0, ge=0, description="last tokens to look at; 0 is all")
        breakers: tuple[str, ...] = Field(
            default=("\n", ":", '"', "*"), description="no match goes across a token with them"
        )

    def setup(self, context: DecodingContext) -> None:
        """State by slot: the parameters, and which tokens are breakers."""
        assert context.vocabulary is not None
        slots, device = context.slots, context.device
        self._vocabulary = context.vocabulary
        self._multiplier, self._base = torch.zeros(slots, device=device), torch.ones(slots, device=device)
        self._allowed = torch.ones(slots, dtype=torch.int64, device=device)
        self._range = torch.zeros(slots, dtype=torch.int64, device=device)
        self._breaks = torch.zeros(slots, context.vocab_size_padded, dtype=torch.bool, device=device)
        self._known: dict[tuple[str, ...], list[int]] = {}

    def begin(self, slot: int, view: BranchView) -> None:
        """A branch starts."""
        params = view.params
        self._multiplier[slot], self._base[slot] = params.multiplier, params.base
        self._allowed[slot], self._range[slot] = params.allowed_length, params.range or self._breaks.shape[1] ** 2
        self._breaks[slot] = False
        self._breaks[slot, self._tokens_with(params.breakers)] = True

    def _tokens_with(self, breakers: tuple[str, ...]) -> list[int]:
        """Tokens whose text has one of the breakers in it. Looked for once."""
        if "" in breakers:
            raise ConfigError("dry: an empty breaker would be in every token")
        if breakers not in self._known:
            marks = [breaker.encode() for breaker in breakers]
            found = [i for i, text in enumerate(self._vocabulary) if any(mark in text for mark in marks)]
            self._known[breakers] = found
        return self._known[breakers]

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        """Lower what would go on with a repetition."""
        text, end = texts(batch)
        text.clamp_(max=logits.shape[1] - 1)
        breaks = self._breaks[batch.slot]
        column = torch.arange(text.shape[1], device=text.device)
        first = (end - self._range[batch.slot]).clamp(min=0).unsqueeze(1)
        going = (column < end.unsqueeze(1)) & ~breaks.gather(1, text)  # the token at p, which would come next, counts
        length = torch.zeros_like(text)
        for back, token in enumerate(recent(batch, LONGEST).long().unbind(1), 1):
            open_ = (token >= 0) & ~breaks.gather(1, token.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
            going &= (text.roll(back, 1) == token.unsqueeze(1)) & (column - back >= first) & open_.unsqueeze(1)
            length += going
        excess = (length - per_row(self._allowed, batch, neutral=1)).float()
        penalty = per_row(self._multiplier, batch, neutral=0.0) * per_row(self._base, batch, neutral=1.0) ** excess
        penalty = torch.where(excess >= 0, penalty, 0.0)
        # Of several places with one token after them, the longest match counts: the smallest of their logits.
        logits.scatter_reduce_(1, text, logits.gather(1, text) - penalty, "amin")

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copies."""
        copy_slots(src, dst, self._multiplier, self._base, self._allowed, self._range, self._breaks)
