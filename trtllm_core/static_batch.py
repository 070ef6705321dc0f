"""``StaticBatch``: which requests of a batch run in a step, until all of them have ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from trtllm_core.decoding.request import Branch, Delta, Request
from trtllm_core.errors import CapacityError
from trtllm_core.loop import StepLoop
from trtllm_core.plugin.observer import RequestStats


class StaticBatch:
    """First come, first served: requests start as soon as there is room, and leave when they end."""

    def __init__(self, loop: StepLoop) -> None:
        self._loop = loop
        self._branches = loop.branches
        self._budget = loop.session.config.build.max_num_tokens

    def run(self, requests: Sequence[Request], branches: dict[str, Branch]) -> Iterator[list[Delta]]:
        """Steps until all requests ended: first come, first served. Whoever stops iterating ends the rest."""
        waiting = deque(requests)
        for request in requests:  # what cannot work is refused before the first token of anybody
            self._branches.planner.plan(request.sampling, request.processors, request.criteria)
        live: list[Branch] = []
        try:
            while waiting or live:
                deltas = self._admit(waiting, live, branches)
                slots, counts = self._schedule(live)
                if slots:
                    deltas += self._loop.step(slots, counts)
                live = [branch for branch in live if branch.finish_reason is None]
                for delta in deltas:
                    if delta.finish_reason is not None:
                        self._tell_end(branches[delta.request_id])
                yield deltas
        finally:
            for branch in live:
                if branch.finish_reason is None:
                    self._loop.release(branch.slot)

    def _admit(self, waiting: deque[Request], live: list[Branch], branches: dict[str, Branch]) -> list[Delta]:
        """Let requests start, in order, while there is room. Those whose plugins fail at once come back as deltas."""
        failed = []
        while waiting:
            branch = self._loop.admit(waiting[0])
            if branch is None:
                if not live:
                    raise CapacityError("the KV pool has no room for a request although nothing runs: a policy's error")
                break
            waiting.popleft()
            branches[branch.request.request_id] = branch
            if branch.finish_reason is None:
                live.append(branch)
            else:
                self._loop.release(branch.slot)
                failed.append(Delta(branch.request.request_id, (), "", branch.finish_reason, (), branch.error))
        return failed

    def _schedule(self, live: Sequence[Branch]) -> tuple[list[int], list[int]]:
        """Who runs how many tokens: the next one of all that generate, then prompts, cut to the step's budget."""
        known, cached = self._branches.slots.lengths, self._loop.cache.cached
        left = self._budget
        ready = sorted((int(known[b.slot] - cached[b.slot]), i) for i, b in enumerate(live))
        slots, counts = [], []
        for wanted, i in ready:
            count = min(wanted, left)
            if count:
                slots.append(live[i].slot)
                counts.append(count)
                left -= count
        return slots, counts

    def _tell_end(self, branch: Branch) -> None:
        self._loop.plugins.on_request_end(
            RequestStats(
                branch.request.request_id,
                len(branch.request.prompt),
                len(branch.generated),
                branch.finish_reason or "",
                self._branches.plugin_seconds(),
            )
        )
