"""When requests end by themselves."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from trtllm_core.scheduling.ticket import Ticket


class Deadlines:
    """Tickets by their deadlines. Every call costs the logarithm of their number at most, over many calls.

    Those of requests that are over leave when half of them are such.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, tuple[float, int], Ticket]] = []
        self._late = 0  # of requests that are over

    def add(self, ticket: Ticket) -> None:
        """A request arrives that may have one."""
        if ticket.deadline is not None:
            heapq.heappush(self._heap, (ticket.deadline, ticket.order, ticket))

    @property
    def next(self) -> float | None:
        """The earliest moment; None: there is none."""
        return self._heap[0][0] if self._heap else None

    def passed(self, now: float) -> Iterator[Ticket]:
        """Take out those whose moment has come, the earliest first. Some may be over already."""
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[2]

    def forget(self, ticket: Ticket) -> None:
        """A request is over."""
        if ticket.deadline is None:
            return
        self._late += 1
        if 2 * self._late > len(self._heap):
            self._heap = [each for each in self._heap if not each[2].over]
            heapq.heapify(self._heap)
            self._late = 0
