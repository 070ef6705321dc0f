"""A sound search, and copies of it that each break one promise."""

from __future__ import annotations

from dataclasses import replace

import torch

from trtllm_core.decoding.beam_search import BeamSearch
from trtllm_core.errors import ConfigError
from trtllm_core.plugin import BranchPlan, DecoderRegistrar, hookimpl


def register(search: type) -> object:
    """The search as a plugin that honours ``num_beams``."""

    class Plugin:
        hook_api = "decoder>=1.1,<2"

        @hookimpl
        def trtllm_register_decoders(self, registrar: DecoderRegistrar) -> None:
            registrar.add("search", search, consumes=("num_beams", "num_return_sequences", "length_penalty"))

    Plugin.__name__ = search.__name__
    return Plugin()


class Sound(BeamSearch):
    """The core's own."""


class PlansAtRandom(Sound):
    planned = 0

    def plan(self, view):
        self.planned += 1
        return replace(super().plan(view), max_branches=1 + self.planned)


class PlansNothing(Sound):
    def plan(self, view):
        return BranchPlan(branches=0, max_branches=3)


class MovesInSelect(Sound):
    def select(self, logits, batch):
        found = super().select(logits, batch)
        self._scores[batch.slot] -= 0.5
        return found


class MovesInSurvive(Sound):
    asked = 0

    def survive(self, candidates, stops):
        self.asked += 1
        found = super().survive(candidates, stops)
        return replace(found, branches=found.branches[: 1 + self.asked % 2])


class Forbidden(Sound):
    def select(self, logits, batch):
        found = super().select(logits, batch)
        return replace(found, tokens=torch.where(found.tokens % 2 == 0, 2, found.tokens))


class Padding(Sound):
    def select(self, logits, batch):
        found = super().select(logits, batch)
        return replace(found, tokens=found.tokens + 40)


class WorstFirst(Sound):
    def finalize(self, request_id, hypotheses):
        return super().finalize(request_id, hypotheses)[::-1]


class TooFew(Sound):
    def finalize(self, request_id, hypotheses):
        return super().finalize(request_id, hypotheses)[:1]


class ByBatch(Sound):
    """It adds to the scores of a request what others have."""

    def values(self, logits):
        return super().values(logits) - 0.2 * len(logits) * torch.arange(logits.shape[1]) % 3


class LeavesStateBehind(Sound):
    """Its second request in a session is not like its first."""

    def end(self, slot):
        super().end(slot)
        self.over = True

    def values(self, logits):
        return super().values(logits.flip(1).contiguous() if getattr(self, "over", False) else logits)


class Picky(Sound):
    """Sound: it refuses in ``plan`` what it does not do."""

    def plan(self, view):
        if view.sampling.num_beams > 3:
            raise ConfigError("num_beams: at most 3")
        return super().plan(view)
