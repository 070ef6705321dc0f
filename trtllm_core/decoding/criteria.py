"""Stopping criteria that look at single tokens and lengths: end tokens and the token limit."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch

from trtllm_core.decoding import kernels
from trtllm_core.decoding.state import SlotTable, accepted, copy_slots
from trtllm_core.plugin.lifecycle import Example
from trtllm_core.plugin.stopping import DeviceStoppingCriterion, StoppingCapabilities

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext


def first_hit(hits: torch.Tensor) -> torch.Tensor:
    """Index of the first True of each row of ``hits`` (bool ``[n, k]``), or -1: int64 ``[n]``."""
    if hits.shape[1] == 1:
        return hits.squeeze(1).long() - 1
    return torch.where(hits.any(dim=1), hits.int().argmax(dim=1), -1)


class EndId(DeviceStoppingCriterion):
    """Stops at any of the request's end tokens. The token is written, but does not count in the length."""

    reason = "end_id"
    counted = False
    capabilities = StoppingCapabilities(graph_safe=True)

    _end_ids: SlotTable

    def setup(self, context: DecodingContext) -> None:
        self._end_ids = SlotTable(context.slots, context.device, fill=-1)

    @property
    def graph_key(self) -> Hashable:
        return self._end_ids.shape

    def begin(self, slot: int, view: BranchView) -> None:
        self._end_ids.write(slot, view.end_ids)

    def check(self, batch: CommitBatch) -> torch.Tensor:
        if kernels.takes(batch.tokens) and batch.tokens.shape[1] == 1:
            from trtllm_core.decoding.kernels.ends import end_tokens

            return end_tokens(batch.slot, batch.tokens, batch.counts, batch.active, self._end_ids.rows)
        ends = batch.tokens.unsqueeze(2) == self._end_ids.rows.index_select(0, batch.slot).unsqueeze(1)
        return first_hit(ends.any(dim=2) & accepted(batch))

    def matched(self, slot: int, tokens: Sequence[int]) -> int:
        return tokens[-1]

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._end_ids.rows)


class MaxTokens(DeviceStoppingCriterion):
    """Stops after ``max_new_tokens`` tokens, or where the sequence has no more room."""

    reason = "length"
    capabilities = StoppingCapabilities(graph_safe=True)
    examples = (Example(sampling={"max_new_tokens": 5}), Example(sampling={"max_new_tokens": 2}))

    _limit: torch.Tensor

    def setup(self, context: DecodingContext) -> None:
        self._max_seq_len = context.max_seq_len
        self._limit = torch.full((context.slots,), context.max_seq_len, dtype=torch.int64, device=context.device)

    def begin(self, slot: int, view: BranchView) -> None:
        self._limit[slot].fill_(min(len(view.prompt) + view.sampling.max_new_tokens, self._max_seq_len))

    def check(self, batch: CommitBatch) -> torch.Tensor:
        if kernels.takes(batch.slot):
            from trtllm_core.decoding.kernels.ends import limits_reached

            return limits_reached(batch.slot, batch.counts, batch.active, batch.context.lengths, self._limit)
        last = (self._limit.index_select(0, batch.slot) - batch.context.lengths.index_select(0, batch.slot) - 1).clamp(
            min=0
        )
        return torch.where(batch.active & (last < batch.counts), last, -1)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._limit)
