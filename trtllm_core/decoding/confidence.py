"""Stopping where the model is sure, or lost, for some tokens in a row."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from trtllm_core.decoding.state import accepted, copy_slots
from trtllm_core.plugin.lifecycle import Example
from trtllm_core.plugin.stopping import DeviceStoppingCriterion, StoppingCapabilities

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext


class Confidence(DeviceStoppingCriterion):
    """Stops after ``steps`` tokens in a row at which a measure of the processed logits was past a bound.

    The measure is the probability of the token that was chosen, or the entropy of the distribution it was chosen from,
    in nats. How many tokens in a row there were is kept for each position, so that a rewind has nothing to undo.
    """

    reason = "confidence"
    capabilities = StoppingCapabilities(graph_safe=True, needs=frozenset({"logits"}))
    examples = (Example({"above": 0.2}), Example({"measure": "entropy", "below": 1.5, "steps": 2}))

    class Params(BaseModel):
        """``above`` or ``below``, one of the two, is the bound."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        measure: Literal["probability", "entropy"] = "probability"
        above: float | None = None
        below: float | None = None
        steps: int = Field(default=1, ge=1)

        @model_validator(mode="after")
        def _check(self) -> Self:
            if (self.above is None) == (self.below is None):
                raise ValueError("give above or below, one of the two")
            return self

    _bound: torch.Tensor

    def setup(self, context: DecodingContext) -> None:
        def by_slot(dtype: torch.dtype, *width: int) -> torch.Tensor:
            return torch.zeros((context.slots, *width), dtype=dtype, device=context.device)

        self._bound, self._sign = by_slot(torch.float32), by_slot(torch.float32)
        self._entropy, self._steps = by_slot(torch.bool), by_slot(torch.int64)
        self._runs = by_slot(torch.int32, context.max_seq_len)  # tokens in a row that end at each position
        self._live: set[int] = set()  # slots whose measure is the entropy, which costs a pass over all logits

    @property
    def graph_key(self) -> Hashable:
        return bool(self._live)

    def begin(self, slot: int, view: BranchView) -> None:
        params = view.params
        self._sign[slot].fill_(1.0 if params.below is None else -1.0)
        self._bound[slot].fill_(params.above if params.below is None else -params.below)
        self._entropy[slot].fill_(params.measure == "entropy")
        if params.measure == "entropy":
            self._live.add(slot)
        self._steps[slot].fill_(params.steps)

    def check(self, batch: CommitBatch) -> torch.Tensor:
        length = batch.context.lengths[batch.slot]
        hits = (self._counted(batch, length) >= self._steps[batch.slot].unsqueeze(1)) & accepted(batch)
        return torch.where(hits.any(dim=1), hits.int().argmax(dim=1), -1)

    def commit(self, batch: CommitBatch) -> None:
        before = batch.context.lengths[batch.slot] - batch.counts
        runs, keep = self._counted(batch, before).to(torch.int32), accepted(batch)
        for j in range(runs.shape[1]):
            # A row without a j-th token writes back what is there, so that shapes never depend on the data.
            at = (before + j).clamp(max=self._runs.shape[1] - 1)
            self._runs[batch.slot, at] = torch.where(keep[:, j], runs[:, j], self._runs[batch.slot, at])

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._bound, self._sign, self._entropy, self._steps, self._runs)

    def end(self, slot: int) -> None:
        self._live.discard(slot)

    def _counted(self, batch: CommitBatch, before: torch.Tensor) -> torch.Tensor:
        """For each new token, the tokens in a row past the bound that it ends: int64 ``[n, k]``.

        ``before`` (int64 ``[n]``) is the length of the text that the new tokens come after.
        """
        past = self._past(batch)
        generated = before > batch.context.prompt_lengths[batch.slot]
        run = torch.where(generated, self._runs[batch.slot, before - 1].long(), 0)
        runs = []
        for column in past.unbind(dim=1):
            run = torch.where(column, run + 1, 0)
            runs.append(run)
        return torch.stack(runs, dim=1)

    def _past(self, batch: CommitBatch) -> torch.Tensor:
        """Whether the measure of each token is past the bound: bool ``[n, k]``."""
        assert batch.logits is not None
        assert batch.source is not None
        logits, source = batch.logits, batch.source
        norm = logits.logsumexp(dim=1)
        measure = (logits[source, batch.tokens.clamp(0, logits.shape[1] - 1)] - norm[source]).exp()
        if self._live:
            probs = (logits - norm.unsqueeze(1)).exp()
            # A forbidden token has no part in the entropy: 0 · -inf is 0 here.
            entropy = norm - (probs * logits.clamp(min=torch.finfo(logits.dtype).min)).sum(dim=1)
            measure = torch.where(self._entropy[batch.slot].unsqueeze(1), entropy[source], measure)
        return measure * self._sign[batch.slot].unsqueeze(1) >= self._bound[batch.slot].unsqueeze(1)
