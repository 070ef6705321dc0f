"""A sound device processor, and copies of it that each break one promise of processors; see ``breaks`` for others."""

from __future__ import annotations

import math

import breaks
import torch
from pydantic import BaseModel, Field

from trtllm_core.errors import ConfigError
from trtllm_core.plugin import (
    DeviceLogitsProcessor,
    LogitsCapabilities,
    Phase,
)


class Counting(DeviceLogitsProcessor):
    """Lowers each token by ``weight`` for each time that it was generated. All of its promises hold."""

    phase = Phase.PENALTY
    capabilities = LogitsCapabilities(speculation="rewind", graph_safe=True)

    class Params(BaseModel, extra="forbid"):
        weight: float = Field(default=0.5, gt=0)

    def setup(self, context):
        self.context = context
        self.vocab = context.vocab_size_padded
        self.counts = torch.zeros(context.slots, self.vocab, device=context.device)
        self.weights = torch.zeros(context.slots, device=context.device)

    def begin(self, slot, view):
        self.counts[slot] = 0
        self.weights[slot] = view.params.weight

    def apply(self, logits, batch):
        counts = self.counts[batch.slot]
        if batch.draft is not None:
            draft = batch.draft[batch.slot].long().clamp(0, self.vocab - 1)
            before = torch.arange(draft.shape[1], device=draft.device) < batch.offset[:, None]
            counts = counts.scatter_add(1, draft, before.float())
        logits.sub_(counts * self.weights[batch.slot, None] * batch.active[:, None])

    def commit(self, batch):
        new = torch.arange(batch.tokens.shape[1], device=batch.tokens.device) < batch.counts[:, None]
        new &= batch.active[:, None]
        flat = batch.slot[:, None] * self.vocab + torch.where(new, batch.tokens, 0)
        self.counts.view(-1).scatter_add_(0, flat.view(-1), new.float().view(-1))

    def fork(self, src, dst):
        self.counts[dst] = self.counts[src]
        self.weights[dst] = self.weights[src]

    def rewind(self, slot, n):
        at = self.context.lengths[slot] + torch.arange(n, device=self.context.device)
        tokens = self.context.tokens[slot].gather(0, at).long()
        self.counts[slot].scatter_add_(0, tokens, -torch.ones_like(tokens, dtype=torch.float32))


class Shape(Counting):
    def apply(self, logits, batch):
        return logits[:, :-1]


class Nan(Counting):
    def apply(self, logits, batch):
        logits.mul_(0 * batch.active[:, None] + 1.0).sub_(logits.amax(1, keepdim=True)).div_(logits.isinf() * 1.0 + 1)
        logits.masked_fill_(logits.isinf() & batch.active[:, None], math.nan)


class Everything(Counting):
    """Forbids all tokens."""

    def apply(self, logits, batch):
        logits.masked_fill_(batch.active[:, None], -math.inf)


class Padding(Counting):
    """Its bias reaches the padding."""

    def apply(self, logits, batch):
        logits[:, -1] = torch.where(batch.active, 1e9, logits[:, -1])


class Others(Counting):
    """It forgets who asked."""

    def apply(self, logits, batch):
        logits.sub_(0.25)


class MovesInApply(Counting):
    def apply(self, logits, batch):
        super().apply(logits, batch)
        self.counts[batch.slot] += batch.active[:, None] * 1.0


class ByRow(Counting):
    """Its state is that of rows, not of slots."""

    def apply(self, logits, batch):
        logits.sub_(self.counts[: len(logits)] * batch.active[:, None])


class Neighbours(Counting):
    """It measures the batch, not the row."""

    def apply(self, logits, batch):
        logits.sub_((logits[:, :30].mean() + self.counts[batch.slot]) * batch.active[:, None])


class CommitsOthers(Counting):
    """It counts the whole batch's tokens for each slot."""

    def commit(self, batch):
        super().commit(batch)
        self.counts[0] += 0.1 * len(batch.slot)


class NoFork(Counting):
    def fork(self, src, dst):
        pass


class OneTokenACommit(Counting):
    def commit(self, batch):
        self.counts.view(-1).scatter_add_(
            0, batch.slot * self.vocab + batch.tokens[:, 0], (batch.active & (batch.counts > 0)).float()
        )


class BlindToDrafts(Counting):
    capabilities = LogitsCapabilities(speculation="per_position")

    def apply(self, logits, batch):
        logits.sub_(self.counts[batch.slot] * self.weights[batch.slot, None] * batch.active[:, None])


class NotInvariant(Counting):
    capabilities = LogitsCapabilities(speculation="rewind", argmax_invariant=True)

    def apply(self, logits, batch):
        logits[:, 0] += batch.active * 50.0


class Waits(Counting):
    capabilities = LogitsCapabilities(speculation="rewind")

    def apply(self, logits, batch):
        if float(self.counts.sum()) > 0:
            super().apply(logits, batch)


class WaitsForAList(Counting):
    capabilities = LogitsCapabilities(speculation="rewind")

    def commit(self, batch):
        self.last = batch.tokens.tolist()
        super().commit(batch)


class MaskAsIndex(Counting):
    capabilities = LogitsCapabilities(speculation="rewind")

    def apply(self, logits, batch):
        logits[batch.active] -= (self.counts[batch.slot] * self.weights[batch.slot, None])[batch.active]


class KeyIsAList(Counting):
    graph_key = [1]  # noqa: RUF012 (that is what is wrong with it)


class OtherOnAGpu(Counting):
    def apply(self, logits, batch):
        super().apply(logits, batch)
        if logits.is_cuda:
            logits.sub_(0.1 * batch.active[:, None])


class FrozenInAGraph(Counting):
    """Its Python state is that of the capture for ever."""

    steps = 0

    def apply(self, logits, batch):
        super().apply(logits, batch)
        logits.sub_(0.1 * self.steps * batch.active[:, None])

    def commit(self, batch):
        super().commit(batch)
        self.steps += 1


class ForksOneByOne(breaks.ForksOneByOne, Counting):
    """With a name that a package can give to its registrar."""


class RaisesItsOwn(breaks.loose(Counting)):
    """It refuses, but not by an error that is told as the user's."""

    def begin(self, slot, view):
        if view.params.weight <= 0:
            raise RuntimeError("weight")
        super().begin(slot, view)


class Refuses(breaks.loose(Counting)):
    """Sound: a ``ConfigError`` from ``begin`` is the user's mistake."""

    def begin(self, slot, view):
        if view.params.weight <= 0:
            raise ConfigError(f"counting: weight is {view.params.weight}, but must be above 0")
        super().begin(slot, view)


class NoPhase(Counting):
    phase = "penalty!"


class OrderIsText(Counting):
    after = "penalties"


class Idle(Counting):
    def apply(self, logits, batch):
        pass


class EmptyCompanion(Counting):
    def companions(self, view):
        return [view.prompt[1:]]


class OtherCompanions(Counting):
    """What it wants depends on how often anybody was asked."""

    asked = 0

    def companions(self, view):
        OtherCompanions.asked += 1
        return [[self.asked % 5]]


class ForgetsTheEnd(Counting):
    """It fails in a session, where a slot that ended is not in its books."""

    def setup(self, context):
        super().setup(context)
        self.live = set()

    def begin(self, slot, view):
        super().begin(slot, view)
        self.live.add(slot)

    def commit(self, batch):
        super().commit(batch)
        if not set(batch.slot.tolist()) <= self.live:
            raise RuntimeError("a slot that is not mine")
