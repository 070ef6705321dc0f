"""Classifier-free guidance: what a prompt makes likelier than no prompt does, or than another one, counts more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, Field

from trtllm_core.device import copy_slots
from trtllm_core.plugin import (
    BranchView,
    DecodingContext,
    DeviceLogitsProcessor,
    LogitsBatch,
    LogitsCapabilities,
    Phase,
)


class Guidance(DeviceLogitsProcessor):
    """``x = uncond + scale · (cond − uncond)``, where ``cond`` are the log-probabilities of the request and ``uncond``
    those of its companion, which runs the same tokens behind another prompt."""

    phase = Phase.BIAS
    before = ("embedding_bias",)
    after = ("log_softmax",)
    capabilities = LogitsCapabilities(graph_safe=True)

    class Params(BaseModel, extra="forbid", frozen=True):
        """As in transformers."""

        scale: float = Field(
            default=1.5, ge=0, allow_inf_nan=False, description="1 changes nothing; above, follows more"
        )
        negative_prompt_ids: tuple[int, ...] = Field(
            default=(), description="what to keep away from; empty: the prompt's last token, which stands for no prompt"
        )

    def setup(self, context: DecodingContext) -> None:
        """State by slot: the scale."""
        self._scale = torch.ones(context.slots, 1, device=context.device)

    def companions(self, view: BranchView) -> Sequence[Sequence[int]]:
        """One, unless the scale asks for nothing."""
        if view.params.scale == 1:
            return ()
        return [view.params.negative_prompt_ids or view.prompt[-1:]]

    def begin(self, slot: int, view: BranchView) -> None:
        """A branch starts."""
        self._scale[slot] = view.params.scale

    def apply(self, logits: torch.Tensor, batch: LogitsBatch) -> None:
        """Move each row away from its companion's."""
        cond = logits.log_softmax(dim=1)
        if batch.companion_logits is not None and batch.companions is not None:
            other = batch.companions[:, 0]
            uncond = batch.companion_logits[other.clamp(min=0)].log_softmax(dim=1)
            guided = self._scale[batch.slot] * (cond - uncond) + uncond
            # What both forbid, as the vocabulary's padding, stays forbidden: it must not become NaN or likely.
            cond = torch.where((other >= 0).unsqueeze(1) & (cond > -1e30), guided, cond)
        logits.copy_(torch.where(batch.active.unsqueeze(1), cond, logits))

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copies."""
        copy_slots(src, dst, self._scale)
