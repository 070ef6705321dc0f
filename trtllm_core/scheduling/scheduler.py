"""``Scheduler``: who starts, who runs how many tokens, who gives way, and who has ended."""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from itertools import compress

import numpy as np

from trtllm_core.decoding.flight import Flight
from trtllm_core.decoding.live import LiveRequest
from trtllm_core.decoding.plan import Plan
from trtllm_core.decoding.request import Delta, Request
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.loop import StepLoop
from trtllm_core.plugin import Hypothesis
from trtllm_core.plugin.kv_policy import OutOfBlocksError
from trtllm_core.scheduling.measuring import Meter, request_stats
from trtllm_core.scheduling.queue import WaitingQueue
from trtllm_core.scheduling.ticket import Ticket, Turn

_POLICY = "the KV pool has no room for a request although nothing runs: a policy's error"


class Scheduler:
    """Drives a ``StepLoop``. It belongs to one thread, and holds nothing but requests that have not ended.

    A step runs one token of every sequence that generates, and what is left of its budget goes to prompts, in order: a
    long prompt takes several steps, and nobody's next token waits for it longer than a step. Requests start in order
    as well, when the KV policy admits them, and leave at once when they end. Where the cache runs out, which happens
    under policies that admit without a promise, the last in order is **put off**: it gives its cache back, goes on
    before anybody new starts, and computes its text anew. The first in order is never put off.

    Args:
        loop: the session's.
        max_num_tokens: of a step; None takes the engine's. Never less than there are slots.
        max_batch_size: requests that are under way at a time; None: as many as have slots.
        priority_seconds: what one priority is worth; None: more than any wait.
        strict: a request that cannot run is raised about, and is not refused alone.
        keep_stats: make statistics of each step, whether or not a plugin observes.
        clock: seconds since some moment.
    """

    def __init__(
        self,
        loop: StepLoop,
        max_num_tokens: int | None = None,
        max_batch_size: int | None = None,
        priority_seconds: float | None = None,
        strict: bool = False,
        keep_stats: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        build = loop.session.config.build
        self._loop = loop
        self._budget = min(max_num_tokens or build.max_num_tokens, build.max_num_tokens)
        if self._budget < build.max_branches:
            raise ConfigError(
                f"max_num_tokens is {self._budget}: the engine runs {build.max_branches} sequences, which need one each"
            )
        self._most = max_batch_size or build.max_branches
        self._priority_seconds = priority_seconds
        self._strict = strict
        self._clock = clock
        self._meter = Meter(loop, min(self._most, build.max_branches), keep_stats)
        self._queue = WaitingQueue()
        self._running: list[Ticket] = []  # in order
        self._off: list[Ticket] = []  # a heap
        self._deadlines: list[tuple[float, int, Ticket]] = []  # a heap
        self._silent: list[Ticket] = []  # running, and without a token yet
        self._slots: np.ndarray | None = None  # of all that runs; None: somebody came or went
        self._owner: np.ndarray | None = None  # whose each of the slots is, where some request has several
        self._has_read = False  # the last step ran a prompt
        self._blocked: tuple[Ticket, tuple[int, int]] | None = None  # who found no room, and how much there was
        self._flights: deque[Flight | None] = deque()  # steps that have not landed; None: one that brings no tokens
        self._turn = Turn()
        self._count = 0
        self._late = 0  # deadlines of requests that are over

    # -- what callers see ----------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self._queue)

    @property
    def active(self) -> int:
        """Requests that have started and not ended, those that were put off included."""
        return len(self._running) + len(self._off)

    @property
    def paused(self) -> int:
        """Requests that were put off."""
        return len(self._off)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do or to tell."""
        return bool(self._queue or self._running or self._off or self._turn)

    def add(
        self,
        request: Request,
        plan: Plan,
        priority: int = 0,
        deadline: float | None = None,
        arrived: float | None = None,
    ) -> Ticket:
        """A request arrives. ``plan`` is its own, made alone.

        ``deadline`` and ``arrived`` are moments of the clock; it arrived now where nothing else is said.
        """
        now = self._clock() if arrived is None else arrived
        self._count += 1
        rank = -priority if self._priority_seconds is None else now - priority * self._priority_seconds
        ticket = Ticket(request, plan, (rank, self._count), now, priority, deadline)
        self._queue.push(ticket)
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, self._count, ticket))
        return ticket

    def end(self, ticket: Ticket, reason: str) -> None:
        """End a request between two steps, wherever it is. The next ``step`` tells it. Nothing where it is over."""
        if ticket.over:
            return
        if ticket.live is None:
            self._queue.discard(ticket)
            ticket.live = _never_started(ticket, reason)
            returns = range(len(ticket.live.sequences or ()))
            self._turn.deltas += [
                Delta(ticket.request.request_id, (), finish_reason=reason, sequence=n) for n in returns
            ]
        else:
            self._turn.deltas += self._loop.end(ticket.live, reason)
        self._finish(ticket)

    def step(self) -> Turn:
        """Start who can start, run the engine once if there is anything to run, and say what happened.

        Raises:
            CapacityError: the KV policy has no room although nothing runs.
            ConfigError, CapacityError: a request cannot run, where that is not told by its ticket.
            Exception: what a KV policy or a backend raised. ``close`` then.
        """
        self._expire()
        self._start()
        if self._flights and not self._loop.looks_ahead:
            self._land()
        launched = self._launch()
        while len(self._flights) > (launched and self._loop.looks_ahead):
            self._land()
        if self._flights and not self._running:
            self._flights.clear()  # all that it ran have ended: there is nothing to wait for
            self._meter.forget()
        turn, self._turn = self._turn, Turn()
        return turn

    def _launch(self) -> bool:
        """Whether there was anything to run. What was launched is the last of the flights."""
        slots, counts = self._reserve()
        if slots:
            self._meter.begin(slots, counts)
            self._flights.append(self._loop.launch(slots, counts))
        return bool(slots)

    def _land(self) -> None:
        """The oldest flight: tell its tokens, and let go who has ended."""
        turn, flight, free = self._turn, self._flights.popleft(), self._loop.branches.slots.free
        if flight is not None:
            turn.deltas += self._loop.land(flight)
        if self._silent:
            self._note_first_tokens()
        if self._loop.branches.slots.free > free:  # whoever ends gives slots back
            # A plugin that fails ends those that were put off, too.
            both = (*self._running, *self._off)
            for ticket in [each for each in both if each.live is not None and each.live.over]:
                self._finish(ticket)
        turn.stats += self._meter.end(turn, self.waiting, self.active, self.paused)

    def close(self) -> Turn:
        """Cancel all that has not ended, whatever one of them raises, and say what happened."""
        with ExitStack() as stack:
            while (ticket := self._queue.first()) is not None:
                self.end(ticket, "cancelled")
            for ticket in [*self._running, *self._off]:
                stack.callback(self._cancel, ticket)
        self._flights.clear()
        turn, self._turn = self._turn, Turn()
        return turn

    # -- starting ------------------------------------------------------------------------------------------------

    def _expire(self) -> None:
        if self._deadlines and self._deadlines[0][0] <= (now := self._clock()):
            while self._deadlines and self._deadlines[0][0] <= now:
                self.end(heapq.heappop(self._deadlines)[2], "timed_out")

    def _start(self) -> None:
        """Let those go on that were put off, and then new ones start, in order, while there is room.

        No more start than the step can read: to start takes time, for which those that run would wait.
        """
        while self._off and not self._is_blocked(self._off[0]):
            ticket = self._off[0]
            assert ticket.live is not None
            if not self._loop.resume(ticket.live):
                self._block(ticket)
                break
            heapq.heappop(self._off)
            self._join(ticket)
        unread = self._unread() if self._queue else 0
        while not self._off and len(self._running) < self._most and unread < self._budget:
            first = self._queue.first()
            if first is None or self._is_blocked(first):
                break
            try:
                live = self._loop.admit(first.request, first.plan)
            except (ConfigError, CapacityError) as error:  # it cannot run here, or not beside the others
                self._queue.pop()
                self._refuse(first, error)
                continue
            if live is None:
                self._block(first)
                break
            self._queue.pop()
            self._admitted(first, live)
            unread += len(first.request.prompt) - live.cached_prompt

    def _admitted(self, ticket: Ticket, live: LiveRequest) -> None:
        ticket.live, ticket.started = live, self._clock()
        self._turn.started.append(ticket)
        if live.error is not None:
            self._turn.deltas += self._loop.end(live, "plugin_error")
            self._finish(ticket)
            return
        self._meter.admitted(live)
        self._silent.append(ticket)
        self._join(ticket)

    def _unread(self) -> int:
        """Tokens that those that run lack in the cache, beyond what they have just generated."""
        if not self._running:
            return 0
        known, cached, _ = self._lengths()
        wanted = known - cached
        return int(wanted[wanted > 1].sum())

    def _is_blocked(self, ticket: Ticket) -> bool:
        """Whether it found no room before, and nothing has changed since: nothing was given back, and no prompt was
        read that it might share."""
        if self._blocked is None or self._blocked[0] is not ticket or not self._running:
            return False
        if self._has_read and ticket.live is None:
            return False
        slots, blocks = self._room()
        return slots <= self._blocked[1][0] and blocks <= self._blocked[1][1]

    def _block(self, ticket: Ticket) -> None:
        if not self._running:
            raise CapacityError(_POLICY)
        self._blocked = ticket, self._room()

    def _room(self) -> tuple[int, int]:
        """Slots that are free: whoever leaves gives some back. And blocks, where those come back in other ways, too."""
        cache = self._loop.cache
        return self._loop.branches.slots.free, cache.usage().free if cache.plan.evicts else 0

    # -- running -------------------------------------------------------------------------------------------------

    def _reserve(self) -> tuple[list[int], list[int]]:
        """Who runs how many tokens, and room for them. Where there is none, the last ones in order are put off."""
        if self._loop.branches.verifying and self._running:
            known, cached, running = self._lengths()
            self._loop.propose(running[known - cached == 1].tolist())
        while self._running:
            slots, counts = self._schedule()
            try:
                self._loop.reserve(slots, counts)
            except OutOfBlocksError as error:
                if self._flights:  # who ends with it gives room back
                    break
                if len(self._running) < 2:
                    self._refuse(self._running[0], error)
                else:
                    self._put_off(self._running.pop())
            else:
                return slots, counts
        return [], []

    def _put_off(self, ticket: Ticket) -> None:
        assert ticket.live is not None
        self._slots = None
        heapq.heappush(self._off, ticket)
        self._loop.preempt(ticket.live)
        self._meter.preemptions += 1
        # What it gave back is for those that go on: it is tried again when somebody leaves.
        self._blocked = self._off[0], self._room()

    def _lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens known and cached of each slot that runs, and the slots, int64 ``[n]``, in order.

        Known are those, too, that only the device knows yet, but of a row that ends with its.
        """
        slots = self._slots
        if slots is None:
            lives = [each.live for each in self._running if each.live is not None]
            slots = np.array([branch.slot for live in lives for branch in live.running], np.int64)
            branching = any(each.plan.branching.max_branches > 1 for each in self._running)
            self._slots = None if branching else slots
            self._owner = np.repeat(np.arange(len(lives)), [len(live.running) for live in lives]) if branching else None
        known, cached = self._loop.branches.slots.lengths[slots], self._loop.cache.cached[slots]
        if self._flights:
            longer = known + self._loop.branches.slots.ahead[slots]
            known = np.where(longer < self._loop.branches.slots.limits[slots], longer, known)
        return known, cached, slots

    def _schedule(self) -> tuple[list[int], list[int]]:
        """The next token of all that generate, then prompts in order, then drafts, cut to the step's budget."""
        known, cached, slots = self._lengths()
        wanted = known - cached
        if self._loop.branches.companions:
            return self._share(slots)
        generate = wanted == 1
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
        self._has_read = len(rows) > len(first)
        if self._loop.branches.verifying:
            self._add_drafts(rows, counts)
        return rows, counts

    def _share(self, slots: np.ndarray) -> tuple[list[int], list[int]]:
        """The same where there are companions, which run beside their branches."""
        companions = self._loop.branches.companions
        wanted = self._loop.branches.slots.lengths - self._loop.cache.cached
        if self._owner is not None:
            groups = [[slot, *companions.of.get(slot, ())] for slot in slots.tolist()]
            ready = np.array([wanted[group].max() == 1 for group in groups])
            for group in compress(groups, self._apart(self._owner, ready)):
                wanted[group] -= 1
        rows, counts = companions.share(slots.tolist(), wanted, self._budget)
        self._has_read = bool((wanted[rows] > 1).any())
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

    # -- ending --------------------------------------------------------------------------------------------------

    def _join(self, ticket: Ticket) -> None:
        insort(self._running, ticket)
        self._slots = None

    def _note_first_tokens(self) -> None:
        now = self._clock()
        for ticket in self._silent:
            live = ticket.live
            assert live is not None
            if any(one.generated for one in live.running) or any(one.tokens for one in live.hypotheses):
                ticket.told = now
        self._silent = [ticket for ticket in self._silent if ticket.told is None]

    def _refuse(self, ticket: Ticket, error: Exception) -> None:
        """It cannot run here, or cannot go on even alone. The others can."""
        if self._strict:
            raise error
        ticket.error = error
        if ticket.live is not None:
            self._loop.end(ticket.live, "refused")
        self._finish(ticket)

    def _cancel(self, ticket: Ticket) -> None:
        """It may have ended in a step that failed, and still hold slots."""
        assert ticket.live is not None
        try:
            self._turn.deltas += self._loop.end(ticket.live, "cancelled")
        finally:
            self._finish(ticket)

    def _finish(self, ticket: Ticket) -> None:
        """It is over: forget it, and tell."""
        ticket.ended = self._clock()
        if ticket in self._running:
            self._running.remove(ticket)
            self._slots = None
        elif ticket in self._off:
            self._off.remove(ticket)
            heapq.heapify(self._off)
        if ticket in self._silent:
            self._silent.remove(ticket)
        if ticket.deadline is not None:
            self._forget_deadlines()
        self._turn.ended.append(ticket)
        ticket.stats = request_stats(ticket)
        self._loop.plugins.on_request_end(ticket.stats)

    def _forget_deadlines(self) -> None:
        """Those of requests that are over leave when half of them are such."""
        self._late += 1
        if 2 * self._late > len(self._deadlines):
            self._deadlines = [each for each in self._deadlines if not each[2].over]
            heapq.heapify(self._deadlines)
            self._late = 0


def _never_started(ticket: Ticket, reason: str) -> LiveRequest:
    """What a request leaves that ended in the queue: as many sequences as it returns, all of them empty."""
    sequences = tuple(Hypothesis((), reason=reason, branch=n) for n in range(ticket.plan.branching.returns))
    return LiveRequest(ticket.request, ticket.plan, (), sequences=sequences)
