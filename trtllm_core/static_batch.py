"""``StaticBatch``: which requests of a batch run in a step, until all of them have ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack

from trtllm_core.decoding.plan import PlanItem
from trtllm_core.decoding.request import Branch, Delta, Request
from trtllm_core.errors import CapacityError, ConfigError
from trtllm_core.loop import StepLoop
from trtllm_core.plugin.observer import RequestStats


class StaticBatch:
    """First come, first served: requests start as soon as there is room, and leave when they end."""

    def __init__(self, loop: StepLoop) -> None:
        self._loop = loop
        self._branches = loop.branches
        self._budget = loop.session.config.build.max_num_tokens
        self._running = False

    def run(self, requests: Sequence[Request], branches: dict[str, Branch]) -> Generator[list[Delta]]:
        """Steps until all requests ended: first come, first served. Whoever stops iterating ends the rest.

        Raises:
            ConfigError: another batch is running, or a request cannot work: then nobody gets a token.
            CapacityError: a request could never run.
        """
        if self._running:
            raise ConfigError("another batch is still running on this session: use up or close its stream first")
        self._running = True
        waiting = deque(requests)
        live: list[Branch] = []  # started, and their end not told yet
        try:
            self._check(requests)
            while waiting or live:
                deltas = self._admit(waiting, live, branches)
                slots, counts = self._schedule([branch for branch in live if branch.finish_reason is None])
                if slots:
                    deltas += self._loop.step(slots, counts)
                ended = [branch for branch in live if branch.finish_reason is not None]
                live[:] = [branch for branch in live if branch.finish_reason is None]
                for branch in ended:
                    self._tell_end(branch)
                yield deltas
        finally:
            self._running = False
            with ExitStack() as stack:  # calls all of them, whatever one raises
                for branch in live:
                    stack.callback(self._cancel, branch)

    def _check(self, requests: Sequence[Request]) -> None:
        """Refuse what cannot work before the first token of anybody."""
        processors: dict[object, PlanItem] = {}
        ranks = self._loop.session.config.build.tp_size
        for request in requests:
            plan = self._branches.planner.plan(
                request.sampling, request.processors, request.criteria, processors.values()
            )
            processors |= {item.key: item for item in plan.processors}
            sampling = request.sampling
            self._loop.cache.check(len(request.prompt), sampling.max_new_tokens, sampling.cache_priority)
            draws = not plan.decoder.plugin.capabilities.greedy  # type: ignore[attr-defined]
            if ranks > 1 and draws and request.sampling.random_seed is None:
                raise ConfigError(
                    f"give random_seed: decoder {plan.decoder.name!r} draws, and {ranks} ranks must draw alike"
                )

    def _admit(self, waiting: deque[Request], live: list[Branch], branches: dict[str, Branch]) -> list[Delta]:
        """Let requests start, in order, while there is room. Those whose plugins fail at once come back as deltas."""
        failed = []
        while waiting:
            branch = self._loop.admit(waiting[0])
            if branch is None:
                if all(other.finish_reason is not None for other in live):
                    raise CapacityError("the KV pool has no room for a request although nothing runs: a policy's error")
                break
            waiting.popleft()
            branches[branch.request.request_id] = branch
            live.append(branch)
            if branch.finish_reason is not None:
                self._loop.release(branch.slot)
                failed.append(Delta(branch.request.request_id, (), "", branch.finish_reason, (), branch.error))
        return failed

    def _cancel(self, branch: Branch) -> None:
        """The batch is over before this branch is. One that ended in a step that failed may still hold its slot."""
        try:
            if branch.finish_reason is None:
                self._branches.abort(branch.slot, "cancelled")
            if self._branches.live.get(branch.slot) is branch:
                self._loop.release(branch.slot)
        finally:
            self._branches.take_finished()
            self._tell_end(branch)

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
                branch.plugin_seconds,
                branch.cached_prompt,
            )
        )
