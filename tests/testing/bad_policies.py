"""Copies of the built-in KV policies that each break one promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pydantic import BaseModel

from trtllm_core.errors import CapacityError
from trtllm_core.kv_cache import ContiguousPolicy, PagedPolicy, PrefixPolicy
from trtllm_core.plugin import Edits, Move


class Telepathic(PagedPolicy):
    """Needs what there is not."""

    needs = frozenset({"thoughts"})


class TakesAnyOption(ContiguousPolicy):
    """Does not look at its options."""

    class Options(BaseModel, extra="allow"):
        pass


class TooLarge(PagedPolicy):
    """Plans for a token more than there may be."""

    def plan(self, model, budget):
        return super().plan(model, replace(budget, max_tokens=budget.max_tokens + budget.tokens_per_block))


class Remembers(ContiguousPolicy):
    """Slots live on in the next session."""

    def plan(self, model, budget):
        before = self._live
        plan = super().plan(model, budget)
        if len(before) == len(self._live):
            self._start(np.flatnonzero(before).tolist(), [0] * int(before.sum()))
        return plan


class ForgetsCopies(PagedPolicy):
    """New blocks instead of shared ones, but nobody copies the contents."""

    def _make_room(self, rows, want):
        super()._make_room(rows, want)
        return Edits()


class WritesShared(PagedPolicy):
    """Room does not look at owners, so that nothing is copied on write."""

    def _limits(self, rows):
        return np.minimum(self._held[rows] * self._tokens_per_block, self._longest)


class Leaks(PagedPolicy):
    """Forgets the blocks of a destination of fork."""

    def fork(self, src, dst):
        self._table[[target for source, target in zip(src, dst, strict=True) if source not in dst]] = -1
        return super().fork(src, dst)


class FreesTwice(PagedPolicy):
    """Gives the first block of a released slot back twice."""

    def release(self, slots, keep=False):
        first = self._table[self._rows(slots), 0]
        super().release(slots, keep)
        self._pool.drop(first[first >= 0])


class EvictsNothing(PrefixPolicy):
    """Says that it has given up what was asked for."""

    def evict(self, blocks):
        return min(blocks, self._tree.pool.idle)


class ForksOneByOne(PagedPolicy):
    """0←1, 1←0 leaves both equal."""

    def fork(self, src, dst):
        for source, target in zip(src, dst, strict=True):
            super().fork([source], [target])
        return Edits()


class CopiesOneByOne(ContiguousPolicy):
    """Copies block after block: a block that was written already is copied on."""

    def fork(self, src, dst):
        edits = Edits()
        for pair in super().fork(src, dst).copies:
            edits += Edits((pair,))
        return edits


class RewindsTooFar(PagedPolicy):
    """Takes one token more."""

    def rewind(self, slots, counts):
        super().rewind(slots, [n + (n > 0) for n in counts])


class StopsHalfWay(PagedPolicy):
    """Takes blocks slot by slot, and raises when they run out."""

    def _make_room(self, rows, want):
        edits = Edits()
        for i in range(len(rows)):
            edits += super()._make_room(rows[i : i + 1], want[i : i + 1])
        return edits


class BreaksPromises(PagedPolicy):
    """Admits whatever fits in the free blocks now."""

    def _unpromised(self):
        return self._pool.free


class WaitsForEver(PagedPolicy):
    """Has those wait that can never start."""

    def admit(self, slot, tokens, max_new_tokens, extra_key=()):
        try:
            return super().admit(slot, tokens, max_new_tokens, extra_key)
        except CapacityError:
            return None


class SharesAcrossKeys(PrefixPolicy):
    """Looks at the tokens alone."""

    def admit(self, slot, tokens, max_new_tokens, extra_key=(), **more):
        return super().admit(slot, tokens, max_new_tokens, (), **more)


class ClaimsRoom(PagedPolicy):
    """Has blocks for less than it says."""

    def extend(self, slots, counts):
        placement = super().extend(slots, counts)
        return replace(placement, room=placement.room + 1)


class ForgetsBranches(PagedPolicy):
    """Promises nothing to a branch without a prompt."""

    def admit(self, slot, tokens, max_new_tokens, extra_key=()):
        return super().admit(slot, tokens, max_new_tokens if tokens else 0, extra_key)


class MovesShared(PagedPolicy):
    """Swaps two entries after each step, whoever else holds their block."""

    def plan(self, model, budget):
        return replace(super().plan(model, budget), evicts=True, rewindable=0)

    def after_step(self, slots, statistics=None):
        long = [slot for slot in slots if self.length(slot) > 1]
        return Edits(moves=tuple(move for slot in long for move in (Move(slot, 0, 1), Move(slot, 1, 0))))


class DropsAndKeepsCount(ContiguousPolicy):
    """Drops an entry after each step, and counts it all the same."""

    def plan(self, model, budget):
        return replace(super().plan(model, budget), evicts=True, rewindable=0)

    def after_step(self, slots, statistics=None):
        return Edits(drops=tuple((slot, 1) for slot in slots))
