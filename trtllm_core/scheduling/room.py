"""Whether there may be room for a request that found none before."""

from __future__ import annotations

from trtllm_core.loop import StepLoop
from trtllm_core.scheduling.running import Running
from trtllm_core.scheduling.ticket import Ticket


class Room:
    """Remembers who found no room, and how much there was then: to ask again costs the KV policy a search."""

    def __init__(self, loop: StepLoop, running: Running) -> None:
        self._loop = loop
        self._running = running
        self._lacked: tuple[Ticket, tuple[int, int]] | None = None

    def lacks(self, ticket: Ticket) -> bool:
        """Whether it found none, and nothing has changed since: nothing was given back, and no prompt was read that it
        might share."""
        if self._lacked is None or self._lacked[0] is not ticket or not self._running:
            return False
        if self._running.has_read and ticket.live is None:
            return False
        slots, blocks = self._there()
        return slots <= self._lacked[1][0] and blocks <= self._lacked[1][1]

    def none_for(self, ticket: Ticket) -> None:
        """It found none."""
        self._lacked = ticket, self._there()

    def forget(self) -> None:
        """Whoever it was may be asked for again."""
        self._lacked = None

    def _there(self) -> tuple[int, int]:
        """Slots that are free: whoever leaves gives some back. And blocks, where those come back in other ways, too."""
        cache = self._loop.cache
        return self._loop.branches.slots.free, cache.usage().free if cache.plan.evicts else 0
