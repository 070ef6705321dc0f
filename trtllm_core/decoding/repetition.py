"""Stopping where the text turns in a circle."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from trtllm_core.decoding.criteria import first_hit
from trtllm_core.decoding.history import tokens_before
from trtllm_core.decoding.state import accepted, copy_slots
from trtllm_core.plugin.lifecycle import Example
from trtllm_core.plugin.stopping import DeviceStoppingCriterion, StoppingCapabilities

if TYPE_CHECKING:
    from trtllm_core.plugin.views import BranchView, CommitBatch, DecodingContext


class Repetition(DeviceStoppingCriterion):
    """Stops where the generated text ends with ``count`` copies of one pattern of ``min_size`` to ``max_size`` tokens.

    It keeps nothing of the text: it reads the last tokens of each slot, so that forks and rewinds cost it nothing.
    """

    reason = "repetition"
    capabilities = StoppingCapabilities(graph_safe=True)
    examples = (Example({"count": 2}), Example({"min_size": 2, "max_size": 3, "count": 2}))

    class Params(BaseModel):
        """What counts as a circle."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        min_size: int = Field(default=1, ge=1)
        max_size: int = Field(default=16, ge=1, le=64)
        count: int = Field(default=4, ge=2, le=64, description="copies of the pattern, one after another")

        @model_validator(mode="after")
        def _check(self) -> Self:
            if self.min_size > self.max_size:
                raise ValueError("min_size must be at most max_size")
            return self

    _sizes: torch.Tensor

    def setup(self, context: DecodingContext) -> None:
        self._sizes = torch.zeros(context.slots, 3, dtype=torch.int64, device=context.device)
        self._live: dict[int, tuple[int, int]] = {}  # largest pattern and copies of each slot

    @property
    def graph_key(self) -> Hashable:
        return self._reach()

    def begin(self, slot: int, view: BranchView) -> None:
        params = view.params
        self._live[slot] = params.max_size, params.count
        sizes = torch.tensor([params.min_size, params.max_size, params.count])
        self._sizes[slot].copy_(sizes, non_blocking=True)

    def check(self, batch: CommitBatch) -> torch.Tensor:
        context = batch.context
        n, k = batch.tokens.shape
        largest, window = self._reach()
        after = torch.arange(1, k + 1, device=batch.tokens.device).expand(n, k)
        text = tokens_before(context, batch.slot, after, window, extra=batch.tokens)
        generated = (context.lengths - context.prompt_lengths)[batch.slot].unsqueeze(1) + after
        least, most, copies = (column.unsqueeze(1) for column in self._sizes[batch.slot].unbind(dim=1))
        size = torch.arange(1, largest + 1, device=text.device).view(-1, 1)
        back = torch.arange(window, device=text.device)
        # same[..., p, i]: the token i places back equals the one a pattern of p + 1 tokens before it, or is none of
        # those from the second copy of the pattern to the last.
        copied = back < (copies.unsqueeze(2) - 1).unsqueeze(3) * size
        sizes = size.T
        same = (text.unsqueeze(2) == text[:, :, (back + size).clamp(max=window - 1)]) | ~copied
        fits = (least <= sizes) & (most >= sizes)
        fits = fits.unsqueeze(1) & (copies.unsqueeze(1) * sizes <= generated.unsqueeze(2))
        hits = (same.all(dim=3) & fits).any(dim=2)
        return first_hit(hits & accepted(batch))

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_slots(src, dst, self._sizes)

    def end(self, slot: int) -> None:
        self._live.pop(slot, None)

    def _reach(self) -> tuple[int, int]:
        """The largest pattern of the live slots, and how many tokens back the longest circle reaches."""
        sizes = self._live.values()
        return max((size for size, _ in sizes), default=1), max((size * count for size, count in sizes), default=1)
