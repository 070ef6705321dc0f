"""Factual-nucleus sampling: a top-p that falls as a sentence goes on, and starts anew at a token that ends one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trtllm_core.decoding.history import generated, texts
from trtllm_core.decoding.state import copy_slots

if TYPE_CHECKING:
    from trtllm_core.config import SamplingConfig
    from trtllm_core.plugin.views import DecodingContext, LogitsBatch


class TopPDecay:
    """What top-p has become: ``max(p · decay^n, p_min)`` after n ≥ 1 tokens since the last reset token, p after none.

    It is a function of the text, so there is nothing to carry along, copy or take back: drafts, rewinds and forks are
    right by themselves. ``p_min`` may be above ``p``, as in the classic runtime: then p rises once.
    """

    LEAST = 1e-6
    """``top_p_min`` where the request names none."""

    def __init__(self, context: DecodingContext) -> None:
        slots, device = context.slots, context.device
        self._decay = torch.ones(slots, device=device)
        self._least = torch.zeros(slots, device=device)
        self._reset = torch.full((slots,), -1, dtype=torch.int64, device=device)
        self._live: dict[int, bool] = {}  # slot to whether a token resets it

    @staticmethod
    def falls(sampling: SamplingConfig) -> bool:
        """Whether a request's top-p may change at all."""
        return sampling.top_p_decay is not None or sampling.top_p_min is not None

    @property
    def key(self) -> tuple[bool, bool]:
        """For ``graph_key``: whether any live branch's p falls, and whether it may be reset."""
        return bool(self._live), any(self._live.values())

    def begin(self, slot: int, sampling: SamplingConfig) -> None:
        """A branch starts."""
        decay, least, reset = sampling.top_p_decay, sampling.top_p_min, sampling.top_p_reset_ids
        self._decay[slot].fill_(1.0 if decay is None else decay)
        self._least[slot].fill_((0.0 if decay is None else self.LEAST) if least is None else least)
        self._reset[slot].fill_(-1 if reset is None else reset)
        self._live.pop(slot, None)
        if self.falls(sampling):
            self._live[slot] = reset is not None and reset >= 0

    def end(self, slot: int) -> None:
        """A branch is over."""
        self._live.pop(slot, None)

    def fork(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """See ``SlotPlugin``."""
        copy_slots(src, dst, self._decay, self._least, self._reset)

    def apply(self, p: torch.Tensor, batch: LogitsBatch) -> torch.Tensor:
        """``p`` (float32 ``[n]``, as each request began) as it is now."""
        falls, resets = self.key
        if not falls:
            return p
        steps = self._since_reset(batch) if resets else generated(batch)
        fallen = torch.maximum(
            p * self._decay.index_select(0, batch.slot) ** steps, self._least.index_select(0, batch.slot)
        )
        return torch.where(steps > 0, fallen, p)

    def _since_reset(self, batch: LogitsBatch) -> torch.Tensor:
        """Generated tokens after the last reset token, or after the prompt where there is none: int64 ``[n]``."""
        text, end = texts(batch)
        column = torch.arange(text.shape[1], device=text.device)
        start = batch.context.prompt_lengths.index_select(0, batch.slot).unsqueeze(1)
        resets = (
            (text == self._reset.index_select(0, batch.slot).unsqueeze(1))
            & (column >= start)
            & (column < end.unsqueeze(1))
        )
        last = torch.where(resets, column, start - 1).amax(dim=1)
        return end - 1 - last
