"""``Running``: the requests that share the steps, and how a step's tokens are shared among them."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from itertools import compress

import numpy as np

from trtllm_core.loop import StepLoop
from trtllm_core.scheduling.ticket import Ticket


class Running:
    """Tickets in order. A step runs one token of every sequence that generates, and prompts share what is left.

    Args:
        loop: whose steps.
        budget: tokens of a step.
    """

    def __init__(self, loop: StepLoop, budget: int) -> None:
        self._loop = loop
        self._budget = budget
        self._tickets: list[Ticket] = []
        self._slots: np.ndarray | None = None  # of all that run; None: somebody came or went
        self._by_slot: list[int] | None = None  # the same, sorted; None: nobody asked
        self._owner: np.ndarray | None = None  # whose each of the slots is, where some request has several
        self.has_read = False
        """Whether the last step that was shared out runs a prompt."""

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets)

    def join(self, ticket: Ticket) -> None:
        """A request starts or goes on."""
        insort(self._tickets, ticket)
        self._slots = None

    def leave(self, ticket: Ticket) -> bool:
        """A request is over. Returns whether it was here."""
        if ticket not in self._tickets:
            return False
        self._tickets.remove(ticket)
        self._slots = None
        return True

    def pop(self) -> Ticket:
        """Take out the last in order."""
        self._slots = None
        return self._tickets.pop()

    @property
    def first(self) -> Ticket:
        """The first in order."""
        return self._tickets[0]

    @property
    def unread(self) -> int:
        """Tokens that they lack in the cache, beyond what they have just generated."""
        if not self._tickets:
            return 0
        known, cached, _ = self._lengths()
        wanted = known - cached
        return int(wanted[wanted > 1].sum())

    @property
    def generating(self) -> list[int]:
        """Slots that lack nothing but their last token."""
        known, cached, slots = self._lengths()
        return slots[known - cached == 1].tolist()  # type: ignore[no-any-return]

    def share(self) -> tuple[list[int], list[int]]:
        """A step's slots, and tokens of each: the next one of all that generate, then prompts in order, then drafts,
        cut to the budget."""
        known, cached, slots = self._lengths()
        wanted = known - cached
        if self._loop.branches.companions:
            return self._share_with_companions(slots)
        generate = wanted == 1
        if self._slots is not None and len(slots) <= self._budget and generate.all():
            return self._next_of_all(slots)
        if self._owner is not None:
            apart = self._apart(self._owner, generate | (wanted == 0))
            generate, wanted = generate & ~apart, wanted - apart
        # By slot, because neighbours may be neighbours in a linear cache.
        first = np.sort(slots[generate])[: self._budget]
        wanted, rest = wanted[~generate], slots[~generate]
        before = np.cumsum(wanted) - wanted
        parts = np.clip(self._budget - len(first) - before, 0, wanted)
        rows = [*first.tolist(), *rest[parts > 0].tolist()]
        counts = [1] * len(first) + parts[parts > 0].tolist()
        self.has_read = len(rows) > len(first)
        if self._loop.branches.verifying:
            self._add_drafts(rows, counts)
        return rows, counts

    def _next_of_all(self, slots: np.ndarray) -> tuple[list[int], list[int]]:
        """What nearly all steps do."""
        if self._by_slot is None:
            self._by_slot = np.sort(slots).tolist()
        rows, counts = self._by_slot.copy(), [1] * len(slots)
        self.has_read = False
        if self._loop.branches.verifying:
            self._add_drafts(rows, counts)
        return rows, counts

    def _share_with_companions(self, slots: np.ndarray) -> tuple[list[int], list[int]]:
        """The same where there are companions, which run beside their branches."""
        companions = self._loop.branches.companions
        wanted = self._loop.branches.slots.lengths - self._loop.cache.cached
        if self._owner is not None:
            groups = [[slot, *companions.of.get(slot, ())] for slot in slots.tolist()]
            ready = np.array([wanted[group].max() == 1 for group in groups])
            for group in compress(groups, self._apart(self._owner, ready)):
                wanted[group] -= 1
        rows, counts = companions.share(slots.tolist(), wanted, self._budget)
        self.has_read = bool((wanted[rows] > 1).any())
        if self._loop.branches.verifying:
            self._add_drafts(rows, counts)
        return rows, counts

    def _apart(self, owner: np.ndarray, ready: np.ndarray) -> np.ndarray:
        """bool ``[n]``: rows of requests whose branches do not lack the same, because they compute their texts anew.

        A search chooses among all of its branches at once: each of them waits with its last token for the others.
        """
        late = np.bincount(owner, ~ready) > 0
        return (late & (np.bincount(owner) > 1))[owner]  # type: ignore[no-any-return]

    def _add_drafts(self, slots: list[int], counts: list[int]) -> None:
        known, cached = self._loop.branches.slots.lengths, self._loop.cache.cached
        left = self._budget - sum(counts)
        for place, (slot, count) in enumerate(zip(slots, counts, strict=True)):
            more = min(int(self._loop.branches.drafts.counts[slot]), left)
            if more and count == known[slot] - cached[slot]:
                counts[place] += more
                left -= more

    def _lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens known and cached of each slot that runs, and the slots, int64 ``[n]``, in order.

        Known are those, too, that only the device knows yet, but of a row that ends with its.
        """
        slots = self._slots
        if slots is None:
            self._by_slot = None
            lives = [each.live for each in self._tickets if each.live is not None]
            slots = np.array([branch.slot for live in lives for branch in live.running], np.int64)
            branching = any(each.plan.branching.max_branches > 1 for each in self._tickets)
            self._slots = None if branching else slots
            self._owner = np.repeat(np.arange(len(lives)), [len(live.running) for live in lives]) if branching else None
        state = self._loop.branches.slots
        known, cached = state.lengths[slots], self._loop.cache.cached[slots]
        ahead = state.ahead[slots]
        if ahead.any():
            longer = known + ahead
            known = np.where(longer < state.limits[slots], longer, known)
        return known, cached, slots
