"""A sound sampler with state, and copies of it that each break one promise."""

from __future__ import annotations

import torch
from pydantic import BaseModel, Field

from trtllm_core.decoding.random import batch_uniform, draw_salt
from trtllm_core.plugin import DecoderCapabilities, Sampler

_SALT = draw_salt("cooling")


class Cooling(Sampler):
    """Draws from the softmax, sharper with each even token of the text. All of its promises hold."""

    capabilities = DecoderCapabilities(graph_safe=True, per_position=True)

    class Params(BaseModel, extra="forbid"):
        rate: float = Field(default=0.3, ge=0)

    def setup(self, context):
        self.context = context
        self.rates = torch.zeros(context.slots, device=context.device)
        self.seen = torch.zeros(context.slots, device=context.device)

    def begin(self, slot, view):
        self.rates[slot] = view.params.rate
        self.seen[slot] = 0

    def drafted(self, batch):
        draft = batch.draft[batch.slot]
        before = torch.arange(draft.shape[1], device=draft.device) < batch.offset[:, None]
        return ((draft % 2 == 0) & before).sum(1)

    def scaled(self, logits, batch):
        seen = self.seen[batch.slot]
        if batch.draft is not None:
            seen = seen + self.drafted(batch)
        return logits * (1 + self.rates[batch.slot] * seen)[:, None]

    def uniform(self, batch):
        return batch_uniform(batch, _SALT)

    def sample(self, logits, batch):
        sums = self.scaled(logits, batch).softmax(1).cumsum(1)
        share = self.uniform(batch)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, share).squeeze(1).clamp(max=logits.shape[1] - 1)

    def evens(self, batch):
        column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        return (batch.tokens % 2 == 0) & (column < batch.counts[:, None]) & batch.active[:, None]

    def commit(self, batch):
        self.seen.index_add_(0, batch.slot, self.evens(batch).sum(1).float())

    def fork(self, src, dst):
        self.seen[dst] = self.seen[src]
        self.rates[dst] = self.rates[src]

    def rewind(self, slot, n):
        at = self.context.lengths[slot] + torch.arange(n, device=self.context.device)
        self.seen[slot] -= (self.context.tokens[slot].gather(0, at) % 2 == 0).sum()


class Everything(Cooling):
    """It takes tokens that are forbidden."""

    def sample(self, logits, batch):
        return (self.uniform(batch) * (logits.shape[1] - 5)).long()


class OutOfTheVocabulary(Cooling):
    def sample(self, logits, batch):
        return torch.full_like(batch.slot, logits.shape[1] - 1)


class WrongShape(Cooling):
    def sample(self, logits, batch):
        return super().sample(logits, batch)[:, None]


class NotGreedy(Cooling):
    capabilities = DecoderCapabilities(greedy=True)


class NoCapabilities(Cooling):
    capabilities = frozenset({"greedy"})


class TorchRandom(Cooling):
    """A generator of its own: its numbers depend on how often it was asked."""

    def uniform(self, batch):
        return torch.rand(len(batch.slot), device=batch.slot.device)


class ByRow(Cooling):
    """Its draws depend on the row."""

    def uniform(self, batch):
        return torch.linspace(0.01, 0.99, len(batch.slot), device=batch.slot.device)


class BySlot(Cooling):
    """Its draws depend on the slot."""

    def uniform(self, batch):
        return batch.slot / 8 + super().uniform(batch) / 8


class BlindToOffsets(Cooling):
    """All positions of a verify step draw the same number."""

    def uniform(self, batch):
        still = type(batch)(batch.context, batch.slot, batch.offset * 0, batch.active, batch.draft)
        return super().uniform(still)


class OthersShift(Cooling):
    """Rows of others change its draws."""

    def uniform(self, batch):
        return super().uniform(batch) * (0.5 + 0.5 * batch.active.float().mean())


class CommitsOthers(Cooling):
    def commit(self, batch):
        super().commit(batch)
        self.seen += 1


class SharedState(Cooling):
    """A branch's copies count for it too."""

    def commit(self, batch):
        super().commit(batch)
        self.seen[0] = torch.maximum(self.seen[0], self.seen[1])


class FirstTokenOnly(Cooling):
    def commit(self, batch):
        self.seen.index_add_(0, batch.slot, self.evens(batch)[:, 0].float())


class Waits(Cooling):
    capabilities = DecoderCapabilities()

    def sample(self, logits, batch):
        return torch.tensor([int(token) for token in super().sample(logits, batch)])


class ForgetsTheEnd(Cooling):
    def end(self, slot):
        self.over = True

    def sample(self, logits, batch):
        if getattr(self, "over", False):
            raise RuntimeError("it was over")
        return super().sample(logits, batch)
