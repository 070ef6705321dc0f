"""A limit on the time that a request may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trtllm_core.decoding.state import copy_slots
from trtllm_core.errors import ConfigError
from trtllm_core.plugin.lifecycle import Example
from trtllm_core.plugin.stopping import DeviceStoppingCriterion

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext


class MaxTime(DeviceStoppingCriterion):
    """Stops a request ``max_time`` seconds after it started, its prompt included, with all of its branches.

    The clock is read once a step, for all rows: what a step has chosen when the time is over still stays.
    """

    reason = "timed_out"
    scope = "request"
    examples = (Example(sampling={"max_time": 5.0}),)

    _deadline: torch.Tensor

    def setup(self, context: DecodingContext) -> None:
        self._clock = context.clock
        self._deadline = torch.full((context.slots,), torch.inf, dtype=torch.float64, device=context.device)

    def begin(self, slot: int, view: BranchView) -> None:
        if view.sampling.max_time is None:
            raise ConfigError("max_time has no limit: set the request's max_time to seconds")
        self._deadline[slot].fill_(self._clock() + view.sampling.max_time)

    def check(self, batch: CommitBatch) -> torch.Tensor:
        late = self._deadline[batch.slot] <= self._clock()
        return torch.where(late & batch.active, batch.counts - 1, -1)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._deadline)
