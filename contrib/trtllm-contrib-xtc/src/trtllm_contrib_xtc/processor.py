"""XTC ("exclude top choices"): now and then, all likely tokens but the least likely of them are left out."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from pydantic import BaseModel, Field

from trtllm_core.device import SlotTable, batch_uniform, copy_slots, draw_salt, per_row
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import (
    BranchView,
    DecodingContext,
    DeviceLogitsProcessor,
    LogitsBatch,
    LogitsCapabilities,
    Phase,
)

SALT = draw_salt("xtc")


class Xtc(DeviceLogitsProcessor):
    """With ``probability``: of the tokens whose probability is at least ``threshold``, only the least likely stays.

    Where that would remove a protected token (an end token, the newline, or one of ``protected``), nothing happens.
    """

    phase = Phase.TRUNCATION
    capabilities = LogitsCapabilities(speculation="per_position", graph_safe=True)

    class Params(BaseModel, extra="forbid", frozen=True):
        """As in text-generation-webui, where XTC comes from."""

        threshold: float = Field(default=0.1, gt=0, le=1, description="what counts as likely")
        probability: float = Field(default=0.5, ge=0, le=1, description="how often it acts")
        protected: tuple[int, ...] = Field(default=(), description="more tokens that stay")

    _threshold: torch.Tensor
    _probability: torch.Tensor

    def setup(self, context: DecodingContext) -> None:
        """State by slot: the parameters."""
        self._vocab = context.vocab_size
        self._newlines = [i for i, text in enumerate(context.vocabulary or ()) if text == b"\n"]
        self._threshold = torch.ones(context.slots, device=context.device)
        self._probability = torch.zeros(context.slots, device=context.device)
        self._protected = SlotTable(context.slots, context.device, fill=-1)

    @property
    def graph_key(self) -> Hashable:
        """How many tokens are protected at most."""
        return self._protected.shape

    def begin(self, slot: int, view: BranchView) -> None:
        """A branch starts."""
        params = view.params
        if wrong := [token for token in params.protected if not 0 <= token < self._vocab]:
            raise ConfigError(f"xtc: protected token {wrong[0]} is not in the vocabulary of {self._vocab} tokens")
        self._threshold[slot], self._probability[slot] = params.threshold, params.probability
        self._protected.write(slot, [*params.protected, *view.end_ids, *self._newlines])

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        """Leave out what is likely."""
        chances = logits.softmax(dim=1)
        # A row that did not ask has nothing that likely.
        likely = chances >= per_row(self._threshold, batch, neutral=2.0)
        least = torch.where(likely, chances, torch.inf).flip(1).argmin(dim=1, keepdim=True)  # of equals, the last
        removed = likely.scatter(1, logits.shape[1] - 1 - least, False)
        protected = self._protected.rows[batch.slot]
        spared = (removed.gather(1, protected.clamp(min=0)) & (protected >= 0)).any(dim=1)
        acts = batch_uniform(batch, SALT) <= self._probability[batch.slot]
        logits.masked_fill_(removed & (acts & ~spared & batch.active).unsqueeze(1), -torch.inf)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copies."""
        copy_slots(src, dst, self._threshold, self._probability, self._protected.rows)
