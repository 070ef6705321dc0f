"""The watermark: green tokens get a bonus."""

from __future__ import annotations

import torch
from pydantic import BaseModel, Field

from trtllm_contrib_kgw.green import MAX_CONTEXT, draws_of, keys_of
from trtllm_core.device import copy_slots, per_row, recent
from trtllm_core.plugin import (
    BranchView,
    DecodingContext,
    DeviceLogitsProcessor,
    LogitsBatch,
    LogitsCapabilities,
    Phase,
)


class Watermark(DeviceLogitsProcessor):
    """``x[token] += delta`` for tokens of the green list, a share ``gamma`` of the vocabulary that a hash of the last
    ``context`` tokens and a secret ``key`` chooses anew at each position (algorithm 2 of the paper)."""

    phase = Phase.BIAS
    capabilities = LogitsCapabilities(speculation="per_position", graph_safe=True)

    class Params(BaseModel, extra="forbid", frozen=True):
        """As in the paper; ``key`` and ``context`` must be given to the detector too."""

        gamma: float = Field(default=0.25, gt=0, lt=1, description="share of green tokens")
        delta: float = Field(default=2.0, ge=0, description="what their logits are raised by")
        key: int = Field(default=15485863, ge=0, lt=2**63, description="the secret")
        context: int = Field(default=1, ge=1, le=MAX_CONTEXT, description="tokens that choose the list")

    def setup(self, context: DecodingContext) -> None:
        """State by slot: the parameters."""
        self._vocab = context.vocab_size
        self._tokens = torch.arange(context.vocab_size, device=context.device)
        slots, device = context.slots, context.device
        self._gamma, self._delta = torch.zeros(slots, device=device), torch.zeros(slots, device=device)
        self._key = torch.zeros(slots, dtype=torch.int64, device=device)
        self._width = torch.zeros(slots, dtype=torch.int64, device=device)

    def begin(self, slot: int, view: BranchView) -> None:
        """A branch starts."""
        params = view.params
        self._gamma[slot], self._delta[slot] = params.gamma, params.delta
        self._key[slot], self._width[slot] = params.key, params.context

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        """Raise what is green."""
        slot = batch.slot
        keys = keys_of(self._key[slot], recent(batch, MAX_CONTEXT), self._width[slot])
        green = draws_of(keys.unsqueeze(1), self._tokens) <= self._gamma[slot].unsqueeze(1)
        logits[:, : self._vocab] += green * per_row(self._delta, batch, neutral=0.0)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copies."""
        copy_slots(src, dst, self._gamma, self._delta, self._key, self._width)
