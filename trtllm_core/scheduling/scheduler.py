"""``Scheduler``: who starts, who runs how many tokens, who gives way, and who has ended."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack

from trtllm_core.decoding.flight import Flight
from trtllm_core.decoding.live import LiveRequest
from trtllm_core.decoding.plan import Plan
from trtllm_core.decoding.request import Request
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.loop import StepLoop
from trtllm_core.plugin.kv_policy import OutOfBlocksError
from trtllm_core.scheduling.deadlines import Deadlines
from trtllm_core.scheduling.measuring import Meter, request_stats
from trtllm_core.scheduling.queue import WaitingQueue
from trtllm_core.scheduling.room import Room
from trtllm_core.scheduling.running import Running
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
        self._running = Running(loop, self._budget)
        self._off: list[Ticket] = []  # a heap
        self._deadlines = Deadlines()
        self._silent: list[Ticket] = []  # running, and without a token yet
        self._room = Room(loop, self._running)
        self._flights: deque[Flight | None] = deque()  # steps that have not landed; None: one that brings no tokens
        self._turn = Turn()
        self._count = 0

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
        self._deadlines.add(ticket)
        return ticket

    def end(self, ticket: Ticket, reason: str) -> None:
        """End a request between two steps, wherever it is. The next ``step`` tells it. Nothing where it is over."""
        if ticket.over:
            return
        if ticket.live is None:
            self._queue.discard(ticket)
            self._turn.deltas += ticket.end_in_queue(reason)
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
            self._forget()  # all that it ran have ended: there is nothing to wait for
        turn, self._turn = self._turn, Turn()
        return turn

    def _forget(self) -> None:
        """What is under way brings nothing to anybody any more."""
        self._flights.clear()
        self._loop.forget()
        self._meter.forget()

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
        turn.stats += self._meter.end(self.waiting, self.active, self.paused)

    def close(self) -> Turn:
        """Cancel all that has not ended, whatever one of them raises, and say what happened."""
        with ExitStack() as stack:
            while (ticket := self._queue.first()) is not None:
                self.end(ticket, "cancelled")
            for ticket in [*self._running, *self._off]:
                stack.callback(self._cancel, ticket)
        self._forget()
        turn, self._turn = self._turn, Turn()
        return turn

    # -- starting ------------------------------------------------------------------------------------------------

    def _expire(self) -> None:
        if self._deadlines.next is not None:
            for ticket in self._deadlines.passed(self._clock()):
                self.end(ticket, "timed_out")

    def _start(self) -> None:
        """Let those go on that were put off, and then new ones start, in order, while there is room.

        No more start than the step can read: to start takes time, for which those that run would wait.
        """
        while self._off and not self._room.lacks(self._off[0]):
            ticket = self._off[0]
            assert ticket.live is not None
            if not self._loop.resume(ticket.live):
                self._found_none(ticket)
                break
            heapq.heappop(self._off)
            self._running.join(ticket)
        unread = self._running.unread if self._queue else 0
        while not self._off and len(self._running) < self._most and unread < self._budget:
            first = self._queue.first()
            if first is None or self._room.lacks(first):
                break
            try:
                live = self._loop.admit(first.request, first.plan)
            except (ConfigError, CapacityError) as error:  # it cannot run here, or not beside the others
                self._queue.pop()
                self._refuse(first, error)
                continue
            if live is None:
                self._found_none(first)
                break
            self._queue.pop()
            self._admitted(first, live)
            unread += len(first.request.prompt) - live.cached_prompt

    def _admitted(self, ticket: Ticket, live: LiveRequest) -> None:
        ticket.live, ticket.started = live, self._clock()
        self._turn.started.append(ticket)
        self._meter.admitted(ticket)
        if live.error is not None:
            self._turn.deltas += self._loop.end(live, "plugin_error")
            self._finish(ticket)
            return
        self._silent.append(ticket)
        self._running.join(ticket)

    def _found_none(self, ticket: Ticket) -> None:
        if not self._running:
            raise CapacityError(_POLICY)
        self._room.none_for(ticket)

    # -- running -------------------------------------------------------------------------------------------------

    def _reserve(self) -> tuple[list[int], list[int]]:
        """Who runs how many tokens, and room for them. Where there is none, the last ones in order are put off."""
        if self._loop.branches.verifying and self._running:
            self._loop.propose(self._running.generating)
        while self._running:
            slots, counts = self._running.share()
            try:
                self._loop.reserve(slots, counts)
            except OutOfBlocksError as error:
                if self._flights:  # who ends with it gives room back
                    break
                if len(self._running) < 2:
                    self._refuse(self._running.first, error)
                else:
                    self._put_off(self._running.pop())
            else:
                return slots, counts
        return [], []

    def _put_off(self, ticket: Ticket) -> None:
        assert ticket.live is not None
        heapq.heappush(self._off, ticket)
        self._loop.preempt(ticket.live)
        self._meter.preemptions += 1
        # What it gave back is for those that go on: it is tried again when somebody leaves.
        self._room.none_for(self._off[0])

    # -- ending --------------------------------------------------------------------------------------------------

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
        if not self._running.leave(ticket) and ticket in self._off:
            self._off.remove(ticket)
            heapq.heapify(self._off)
        if ticket in self._silent:
            self._silent.remove(ticket)
        self._deadlines.forget(ticket)
        self._turn.ended.append(ticket)
        self._meter.ended()
        ticket.stats = request_stats(ticket)
        self._loop.plugins.on_request_end(ticket.stats)
