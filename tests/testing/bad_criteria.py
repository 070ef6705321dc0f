"""A sound device criterion and a sound host one, and copies of them that each break one promise."""

from __future__ import annotations

import torch
from pydantic import BaseModel, Field

from trtllm_core.plugin import (
    DeviceStoppingCriterion,
    HostStoppingCriterion,
    Stop,
    StoppingCapabilities,
)


class Quota(DeviceStoppingCriterion):
    """Stops at the token that makes ``most`` even ones. All of its promises hold."""

    reason = "quota"
    capabilities = StoppingCapabilities(speculation="rewind", graph_safe=True)

    class Params(BaseModel, extra="forbid"):
        most: int = Field(default=3, ge=1)

    def setup(self, context):
        self.context = context
        self.seen = torch.zeros(context.slots, dtype=torch.int64, device=context.device)
        self.most = torch.zeros(context.slots, dtype=torch.int64, device=context.device)

    def begin(self, slot, view):
        self.seen[slot] = 0
        self.most[slot] = view.params.most

    def evens(self, batch):
        column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        return (batch.tokens % 2 == 0) & (column < batch.counts[:, None]) & batch.active[:, None]

    def check(self, batch):
        seen = self.seen[batch.slot, None] + self.evens(batch).cumsum(1)
        hits = (seen >= self.most[batch.slot, None]) & self.evens(batch)
        return torch.where(hits.any(1), hits.int().argmax(1), -1)

    def commit(self, batch):
        self.seen.index_add_(0, batch.slot, self.evens(batch).sum(1))

    def fork(self, src, dst):
        self.seen[dst] = self.seen[src]
        self.most[dst] = self.most[src]

    def rewind(self, slot, n):
        at = self.context.lengths[slot] + torch.arange(n, device=self.context.device)
        self.seen[slot] -= (self.context.tokens[slot].gather(0, at) % 2 == 0).sum()


class WrongShape(Quota):
    def check(self, batch):
        return super().check(batch)[:1]


class TooFar(Quota):
    def check(self, batch):
        return super().check(batch).clamp(max=-1) + 9


class NoReason(Quota):
    reason = ""


class NoScope(Quota):
    scope = "batch"


class MovesInCheck(Quota):
    def check(self, batch):
        self.seen[batch.slot] += 1
        return super().check(batch)


class ByRow(Quota):
    def check(self, batch):
        rows = torch.arange(len(batch.slot), device=batch.slot.device)
        return torch.where(rows == 0, super().check(batch), -1)


class CommitsOthers(Quota):
    def commit(self, batch):
        super().commit(batch)
        self.seen += 1


class FirstTokenOnly(Quota):
    """It looks at the first of several new tokens."""

    def check(self, batch):
        return super().check(batch).clamp(max=0)


class CountsBeyond(Quota):
    """It counts what is undefined behind a row's tokens."""

    def commit(self, batch):
        self.seen.index_add_(0, batch.slot, ((batch.tokens % 2 == 0) & batch.active[:, None]).sum(1))


class SeesOthers(Quota):
    """Rows that did not ask for it count."""

    def check(self, batch):
        return torch.where(batch.active.all(), super().check(batch), 0)


class Waits(Quota):
    capabilities = StoppingCapabilities(speculation="rewind")

    def check(self, batch):
        if not self.evens(batch).any():
            return torch.full_like(batch.slot, -1)
        return super().check(batch)


class Never(Quota):
    def check(self, batch):
        return torch.full_like(batch.slot, -1)


class Confident(DeviceStoppingCriterion):
    """Sound: stops at a token that was the largest of the logits by far."""

    reason = "confident"
    capabilities = StoppingCapabilities(needs=frozenset({"logits"}), graph_safe=True)

    def check(self, batch):
        rows = batch.logits[batch.source]
        chosen = batch.tokens.clamp(0, rows.shape[2] - 1).unsqueeze(2)
        column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        sure = rows.log_softmax(2).gather(2, chosen).squeeze(2) > -1.5
        sure &= (column < batch.counts[:, None]) & batch.active[:, None]
        return torch.where(sure.any(1), sure.int().argmax(1), -1)


class Twice(HostStoppingCriterion):
    """Sound: stops where a token comes twice in a row, and holds one byte back."""

    capabilities = StoppingCapabilities(speculation="rewind", needs=frozenset({"text"}))

    def setup(self, context):
        self.text = context.text

    def start(self, view):
        return []

    def check(self, state, tokens, new):
        last = state[-1:]
        for at, token in enumerate(new):
            if [token] == last:
                return Stop("twice", at, trim_text=len(self.text([token])), matched=token)
            last = [token]
        return None

    def accept(self, state, tokens):
        return [*state, *tokens]

    def pending_text(self, state):
        return 1 if state else 0

    def take_back(self, state, n):
        return state[: len(state) - n]


class SharesForks(Twice):
    def accept(self, state, tokens):
        state += tokens
        return state

    def copy(self, state):
        return state


class HoldsTooMuch(Twice):
    def pending_text(self, state):
        return 1000


class TakesNothingBack(Twice):
    take_back = HostStoppingCriterion.take_back


class NoStop(Twice):
    def check(self, state, tokens, new):
        return True


class ForgetsTheEnd(Twice):
    """It fails in a session that uses its slot again."""

    seen = 0

    def start(self, view):
        return []

    def end(self, slot):
        self.seen += 1

    def check(self, state, tokens, new):
        if self.seen:
            raise RuntimeError("it was over")
