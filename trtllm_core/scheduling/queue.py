"""Requests that wait for their start."""

from __future__ import annotations

import heapq

from trtllm_core.scheduling.ticket import Ticket


class WaitingQueue:
    """Tickets by their order. Every call costs the logarithm of their number at most, over many calls.

    A ticket that is taken out from the middle stays in the heap until it comes up, or until half of the heap is such.
    """

    def __init__(self) -> None:
        self._heap: list[Ticket] = []
        self._gone: set[Ticket] = set()

    def __len__(self) -> int:
        return len(self._heap) - len(self._gone)

    def push(self, ticket: Ticket) -> None:
        """A request arrives."""
        heapq.heappush(self._heap, ticket)

    def first(self) -> Ticket | None:
        """Who is next; None: nobody."""
        while self._heap and self._heap[0] in self._gone:
            self._gone.remove(heapq.heappop(self._heap))
        return self._heap[0] if self._heap else None

    def pop(self) -> Ticket:
        """Take the next one out. There must be one."""
        ticket = self.first()
        assert ticket is not None, "there is nobody to take"
        return heapq.heappop(self._heap)

    def discard(self, ticket: Ticket) -> None:
        """Take one of them out, wherever it stands."""
        self._gone.add(ticket)
        if 2 * len(self._gone) > len(self._heap):
            self._heap = [each for each in self._heap if each not in self._gone]
            heapq.heapify(self._heap)
            self._gone.clear()
