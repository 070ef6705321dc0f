"""Statistics of steps and of requests."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trtllm_core.loop import StepLoop
from trtllm_core.plugin.observer import RequestStats, StepStats
from trtllm_core.scheduling.ticket import Ticket


@dataclass(frozen=True, slots=True)
class _Load:
    """What a step runs."""

    step: int
    started: float
    rows: int
    tokens: tuple[int, int]
    """Of prompts, and generated ones."""
    requests: tuple[int, int]
    companion_tokens: int
    started_after: tuple[float, ...]
    """Seconds that each waited who started for it."""
    preemptions: int
    """For it."""


class Meter:
    """Measures steps, where somebody wants to know, and tells the observers.

    Args:
        loop: whose steps.
        max_active: requests that can be under way at a time.
        keep: make the statistics even where no plugin observes.
    """

    def __init__(self, loop: StepLoop, max_active: int, keep: bool) -> None:
        self._loop = loop
        self._max_active = max_active
        self._wanted = keep or loop.plugins.observes_steps
        self._prompts = np.zeros(loop.session.config.build.max_branches, np.int64)
        self._steps: deque[_Load] = deque()  # that are under way
        self._ended = 0.0
        self.preemptions = 0
        """Since the last step that was launched."""
        self._started: list[float] = []  # seconds that each waited who has started since then
        self._completed = 0  # who ended since the last step that landed

    def admitted(self, ticket: Ticket) -> None:
        """A request has its slots, if only to fail at once."""
        assert ticket.live is not None
        self._prompts[list(ticket.live.slots)] = len(ticket.request.prompt)
        if self._wanted:
            self._started.append((ticket.started or 0.0) - ticket.arrived)

    def ended(self) -> None:
        """A request is over."""
        self._completed += 1

    def begin(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """A step is going to run ``counts[i]`` tokens of ``slots[i]``. Several may be under way."""
        if not self._wanted:
            return
        started = time.perf_counter()
        rows, count = np.asarray(slots, np.int64), np.asarray(counts, np.int64)
        beside_tokens = 0
        if companions := self._loop.branches.companions:
            beside = companions.here[rows]
            beside_tokens = int(count[beside].sum())
            rows, count = rows[~beside], count[~beside]
        reading = self._loop.cache.cached[rows] < self._prompts[rows]
        owners, generating = self._loop.branches.owners, rows[~reading].tolist()
        self._steps.append(
            _Load(
                self._loop.steps + 1,
                started,
                len(rows),
                (int(count[reading].sum()), int(count[~reading].sum())),
                (int(reading.sum()), len({id(owners[slot]) for slot in generating})),
                beside_tokens,
                tuple(self._started),
                self.preemptions,
            )
        )
        self._started.clear()
        self.preemptions = 0

    def forget(self) -> None:
        """Those that are under way bring nothing any more."""
        self._steps.clear()

    def end(self, waiting: int, active: int, paused: int) -> list[StepStats]:
        """The oldest one is over: its statistics, where somebody wants them."""
        if not self._wanted:
            return []
        completed, self._completed = self._completed, 0
        load, now = self._steps.popleft(), time.perf_counter()
        # A step that was launched beside the one before it begins when that is over.
        seconds, self._ended = now - max(load.started, self._ended), now
        usage = self._loop.cache.usage()
        stats = StepStats(
            step=load.step,
            rows=load.rows,
            context_tokens=load.tokens[0],
            generation_tokens=load.tokens[1],
            kv_blocks_free=usage.free,
            seconds=seconds,
            timestamp=time.time(),
            active_requests=active,
            max_active_requests=self._max_active,
            queued_requests=waiting,
            paused_requests=paused,
            context_requests=load.requests[0],
            generation_requests=load.requests[1],
            new_requests=len(load.started_after),
            new_requests_queue_seconds=sum(load.started_after),
            completed_requests=completed,
            preemptions=load.preemptions,
            kv_blocks_total=usage.total,
            kv_blocks_cached=usage.cached,
            companion_tokens=load.companion_tokens,
            tokens_per_block=self._loop.cache.plan.tokens_per_block,
        )
        self._loop.plugins.on_step_end(stats)
        return [stats]


def request_stats(ticket: Ticket) -> RequestStats:
    """What there is to say of a request that is over."""
    live, arrived, now = ticket.live, ticket.arrived, ticket.ended
    assert now is not None
    return RequestStats(
        ticket.request.request_id,
        len(ticket.request.prompt),
        0 if live is None else live.generated,
        "refused" if ticket.error is not None or live is None else live.finish_reason or "",
        {} if live is None else live.plugin_seconds,
        0 if live is None else live.cached_prompt,
        0 if live is None else live.preemptions,
        priority=ticket.priority,
        queue_seconds=(now if ticket.started is None else ticket.started) - arrived,
        first_token_seconds=None if ticket.told is None else ticket.told - arrived,
        seconds=now - arrived,
        drafted_tokens=0 if live is None else live.drafted,
        accepted_tokens=0 if live is None else live.accepted,
    )
